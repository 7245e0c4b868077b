"""Mistakes in BERT, in vectors of texts, and in WordPiece."""

from __future__ import annotations

from tests.models.planting import Mistake

_BERT, _EMBEDDING, _WORDS, _JSON = (
    f"models/{name}.py" for name in ("bert", "text/embedding", "text/wordpiece", "text/tokenizer_json")
)
_CHECKS = "tests.models.planted_encoders"
_SEEN = "Segment(k, v, seq=g.seqs, causal=False), scale=scale, seq=g.seqs)"


def _mistake(about: str, file: str, old: str, new: str, check: str) -> Mistake:
    return Mistake(about, file, old, new, f"{_CHECKS}:{check}")


ENCODERS = (
    _mistake("GELU by tanh in BERT", _BERT, '"gelu": gelu_erf', '"gelu": gelu', "alone"),
    _mistake(
        "tokens of no type",
        _BERT,
        'tokens + positions + get_rows(types, g.literal("first_type", np.zeros(1, np.int32)))',
        "tokens + positions",
        "alone",
    ),
    _mistake("tokens of the second type", _BERT, "np.zeros(1, np.int32)", "np.ones(1, np.int32)", "alone"),
    _mistake("no positions", _BERT, "return tokens + positions + ", "return tokens + ", "alone"),
    _mistake("embeddings are not normed", _BERT, 'layer_norm(g, "token_embd_norm", embed(g, c), c))', "embed(g, c))", "alone"),
    _mistake(
        "an encoder that looks back alone",
        _BERT,
        _SEEN,
        "Segment(k, v, g.positions, g.seqs), scale=scale, pos=g.positions, seq=g.seqs)",
        "alone",
    ),
    _mistake("texts see each other", _BERT, _SEEN, "Segment(k, v, causal=False), scale=scale)", "together"),
    _mistake(
        "norms before attention",
        _BERT,
        'layer_norm(b, "attn_output_norm", x + attention(b, x, c), c)',
        'x + attention(b, layer_norm(b, "attn_output_norm", x, c), c)',
        "alone",
    ),
    _mistake("no residual beside the feed-forward", _BERT, "x + feed_forward(b, x, c)", "feed_forward(b, x, c)", "alone"),
    _mistake("attention's norm takes the last norm's weights", _BERT, '"attn_output_norm", x', '"layer_output_norm", x', "alone"),
    _mistake(
        "LayerNorm as RMS norm",
        _BERT,
        "norm, relu\n",
        "relu, rms_norm\nnorm = lambda x, w, b, eps: rms_norm(x, w, eps=eps) + b\n",
        "alone",
    ),
    _mistake("an epsilon that is fixed", _BERT, "eps=c.layer_norm_eps", "eps=1e-12", "alone"),
    _mistake(
        "BERT is scaled by the hidden size",
        _BERT,
        "(c.hidden_size // c.num_attention_heads) ** -0.5",
        "c.hidden_size**-0.5",
        "alone",
    ),
    _mistake("keys are made as queries", _BERT, '"attn_k": "attention.self.key"', '"attn_k": "attention.self.query"', "alone"),
    _mistake("names without a prefix alone", _BERT, 'f"bert.{old}", old, f"bert.{name}", name', "old, name", "old_names"),
    _mistake("the sum for the mean", _EMBEDDING, "rows.mean(0,", "rows.sum(0,", "vectors"),
    _mistake("the first for the last", _EMBEDDING, 'rows[0 if pooling == "cls" else -1]', "rows[0]", "vectors"),
    _mistake("the last for the first", _EMBEDDING, 'rows[0 if pooling == "cls" else -1]', "rows[-1]", "vectors"),
    _mistake("lengths as they are", _EMBEDDING, "normalized(vector) if normalize else vector", "vector", "vectors"),
    _mistake(
        "a length of 1 as the largest number",
        _EMBEDDING,
        "np.sqrt((wide * wide).sum(-1, keepdims=True))",
        "np.abs(wide).max(-1, keepdims=True)",
        "vectors",
    ),
    _mistake(
        "texts cut by steps",
        _EMBEDDING,
        "step = max(batch, context) if model.model.encodes else batch",
        "step = batch",
        "vectors",
    ),
    _mistake(
        "a text that is cut has no end", _EMBEDDING, "model.tokenizer.suffix if isinstance(text, str) else []", "[]", "vectors"
    ),
    _mistake(
        "one text's rows for all",
        _EMBEDDING,
        "(store.sibling(), sequences[i]) for i in group",
        "(store.sibling(), sequences[0]) for i in group",
        "vectors",
    ),
    _mistake(
        "pooling by numbers from one",
        _EMBEDDING,
        '("none", "mean", "cls", "last", "rank")',
        '("mean", "cls", "last", "none", "rank")',
        "vectors",
    ),
    _mistake("parts of words begin words", _WORDS, "else INNER + token", "else token", "words"),
    _mistake("capital letters are kept", _WORDS, "lowercase=lowercase, strip", "lowercase=False, strip", "words"),
    _mistake(
        "accents are kept",
        _WORDS,
        "strip_accents=strip_accents, handle",
        "strip_accents=False, handle",
        "words",
    ),
    _mistake(
        "Chinese in words",
        _WORDS,
        "handle_chinese_chars=chinese",
        "handle_chinese_chars=False",
        "words",
    ),
    _mistake("letters of no vocabulary are small", _WORDS, "token != token.lower() for", "False for", "words"),
    _mistake("words of any length", _WORDS, "_LONGEST_WORD = 100", "_LONGEST_WORD = 200", "words"),
    _mistake("texts do not end", _WORDS, "around[0], around[1]", "around[0], []", "words"),
    _mistake(
        "spaces within words", _WORDS, "return token[len(INNER) :].encode()", 'return f" {token[len(INNER) :]}".encode()', "words"
    ),
    _mistake("padding stays", _JSON, "tokenizer.no_padding()", "pass", "words"),
    _mistake("a file's truncation stays", _JSON, "tokenizer.no_truncation()", "pass", "files_of_words"),
    _mistake(
        "a list's letters are small",
        _WORDS,
        "WordPiece(tokens, vocabulary, **said)",
        "WordPiece(tokens, vocabulary)",
        "files_of_words",
    ),
)
