"""Mistakes in Llama, in what all models share, and in sessions."""

from __future__ import annotations

from tests.models.planting import Mistake

_SESSIONS = "tests.models.test_sessions:test_"
_LLAMA, _DECODER, _BLOCKS, _SESSION = "models/llama.py", "models/decoder.py", "models/blocks.py", "tensorgraph/session.py"
_EXTENTS, _STEP, _COMPILER = (f"tensorgraph/{name}.py" for name in ("extents", "state_step", "compiler"))

LLAMA = (
    Mistake("half-split rope", _LLAMA, 'layout="interleaved"', 'layout="half_split"', "llama"),
    Mistake("rope's base is fixed", _LLAMA, "base=c.rope_theta", "base=5e5", "llama"),
    Mistake(
        "keys are not rotated",
        _LLAMA,
        "rotate(g, k, c)",
        "k",
        "llama",
    ),
    Mistake("scaled by the hidden size", _DECODER, "scale = c.head_size**-0.5", "scale = c.hidden_size**-0.5", "llama"),
    Mistake("keys taken for values", _DECODER, 'g.append("v", v)  # [S', 'g.append("v", k)  # [S', "llama"),
    Mistake(
        "heads share keys in turns",
        "ops/attention/attend.py",
        "q.reshape(n_tokens, n_kv, n_heads // n_kv, d_k)",
        "q.reshape(n_tokens, n_heads // n_kv, n_kv, d_k).swapaxes(1, 2)",
        "llama",
    ),
    Mistake(
        "Llama's window is left out",
        _LLAMA,
        "window=c.sliding_window)",
        "window=None)",
        "window_of_llama",
    ),
    Mistake("one residual less", _DECODER, "x + (feed_forward(", "(feed_forward(", "llama"),
    Mistake("gate and up swapped", _BLOCKS, "unit(gate, up), width", "unit(up, gate), width", "llama"),
    Mistake("epsilon is fixed", _BLOCKS, "eps=eps)", "eps=1e-6)", "epsilons"),
    Mistake(
        "no norm before the head",
        _BLOCKS,
        'norm(g, "output_norm", get_rows(x, g.out_ids), eps)',
        "get_rows(x, g.out_ids)",
        "llama",
    ),
    Mistake("a head of its own is required", _BLOCKS, 'g.optional("output.weight"', 'g.weight("output.weight"', "tied_head"),
    Mistake("the head is always tied", _BLOCKS, "if weight is None else weight", "if True else weight", "llama"),
    Mistake(
        "logits of the token before the last",
        _SESSION,
        "np.arange(end - c.n_out, end, dtype",
        "np.arange(end - c.n_out - 1, end - 1, dtype",
        "last_token",
    ),
    Mistake(
        "logits of the token before the last, of a sequence alone",
        _SESSION,
        "np.arange(len(ids) - n_out, len(ids), dtype",
        "np.arange(len(ids) - n_out - 1, len(ids) - 1, dtype",
        "last_token_alone",
    ),
    Mistake(
        "rows given to the wrong session", _SESSION, "split.append({name: _rows_of", "split.insert(0, {name: _rows_of", "llama"
    ),
    Mistake(
        "a fork forgets its tokens",
        _SESSION,
        "self._store.fork(self._open()), self.ids)",
        "self._store.fork(self._open()), ())",
        f"{_SESSIONS}fork_at_77_and_continue_both:llama",
    ),
    Mistake(
        "a fork is the session itself",
        _SESSION,
        "self._store.fork(self._open())",
        "self._open()",
        f"{_SESSIONS}fork_at_77_and_continue_both:llama",
    ),
    Mistake(
        "restore keeps the tokens", _SESSION, "self._ids = list(snapshot.ids)", "pass", f"{_SESSIONS}snapshot_then_restore:llama"
    ),
    Mistake(
        "tokens after a trim follow those that it took away",
        _SESSION,
        "chunk.session._ids[chunk.session.length :] = chunk.ids.tolist()",
        "chunk.session._ids.extend(chunk.ids.tolist())",
        f"{_SESSIONS}trim_by_5_and_continue:llama:133",
    ),
    Mistake(
        "the gap after a snapshot is left out",
        _SESSION,
        "        if gap:\n",
        "        if False:\n",
        f"{_SESSIONS}trim_below_what_is_retained",
    ),
    Mistake("sequences see each other's rows", _STEP, "return self._tokens[1]", "return self._tokens[1] * 0", "llama"),
    Mistake("rows of all sequences are the first's", _EXTENTS, "rows: rows.seen.seqs", "rows: rows.seen.seqs * 0", "llama"),
    Mistake(
        "positions start with the step",
        _STEP,
        "return self._tokens[0]",
        "return self._tokens[0] - self._tokens[0][0]",
        "llama",
    ),
    Mistake(
        "a graph found by its outputs alone",
        "tensorgraph/engine.py",
        "key = (extents, outputs)",
        "key = (Extents(), outputs)",
        "plans_do_not_mix",
    ),
    Mistake("a plan found without its graph", _COMPILER, 'f"{graph.key}|', 'f"|', "plans_do_not_mix"),
    Mistake("a plan found without its options", _COMPILER, "|{options.key}", "|", "plans_do_not_mix"),
    Mistake(
        "add_bos is ignored",
        "models/text/tokenizer.py",
        "if not flag(metadata, key, default):",
        "if not default:",
        "beginning_of_text",
    ),
    Mistake(
        "BOS is always added",
        "models/text/tokenizer.py",
        "return [*self._prefix, *ids, *self.suffix] if add_special else ids",
        "return [*self._prefix, *ids, *self.suffix]",
        "beginning_of_text",
    ),
)
