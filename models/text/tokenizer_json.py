"""Reading a `tokenizer.json`: the `tokenizers` library encodes, the vocabulary and the bytes of tokens come from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from tensorgraph.errors import FormatError, InputError, UnsupportedError
from tensorgraph.models.text.byte_level import bytes_of_token
from tensorgraph.models.text.json_file import ends_of_generation, parse_object, read_if_there
from tensorgraph.models.text.sentencepiece import SPACE, byte_of_token
from tensorgraph.models.text.vocabulary import Kind, Vocabulary, end_ids
from tensorgraph.models.text.wordpiece import bytes_of_piece


class _JSONCodec:
    """Encodes with the `tokenizers` library as the file says."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, tokens: list[str], *, bytes_of: Callable[[str], bytes], space_prefix: bool
    ) -> None:
        self._tokenizer, self._tokens, self._bytes_of = tokenizer, tokens, bytes_of
        self.space_prefix = space_prefix
        self._lock = threading.Lock()  # whether special tokens are parsed is a setting of the shared tokenizer

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not parse_special
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes_of(self._tokens[token_id])


def _bytes_with_spaces(token: str) -> bytes:
    """What a token of a SentencePiece-style vocabulary stands for."""
    byte = byte_of_token(token)
    return token.replace(SPACE, " ").encode() if byte is None else bytes([byte])


def read_tokenizer_json(path: Path) -> tuple[_JSONCodec, Vocabulary, list[int], list[int]]:
    """Codec, vocabulary and the ids put before and after a text.

    Raises: InputError where there is no such file; FormatError where it is damaged; UnsupportedError for another kind
    of vocabulary.
    """
    if not path.is_file():
        raise InputError(f"[tokenizer] wanted a tokenizer.json; there is no file {path}")
    content = path.read_text(encoding="utf-8", errors="replace")
    described = parse_object(content, path, "tokenizer")
    kind = described["model"].get("type") if isinstance(described.get("model"), dict) else None
    if kind not in ("BPE", "WordPiece"):
        raise UnsupportedError(f"[tokenizer] the kinds that are there: BPE, WordPiece; {path} holds {kind!r}")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except BaseException as error:  # the library's panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise FormatError(f"[tokenizer] wanted a tokenizer.json; {path} is damaged: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check(tokenizer, described["model"], path, len(content))
    steps = [step for part in ("pre_tokenizer", "decoder") for step in _steps(described.get(part))]
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    space_prefix = any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in steps)
    bytes_of = bytes_of_piece if kind == "WordPiece" else bytes_of_token if byte_level else _bytes_with_spaces
    vocabulary, prefix, suffix = _vocabulary(tokenizer, path, *(("cls", "sep") if kind == "WordPiece" else ("bos", "eos")))
    space_prefix = space_prefix or kind == "WordPiece"
    codec = _JSONCodec(tokenizer, vocabulary.tokens, bytes_of=bytes_of, space_prefix=space_prefix)
    return codec, vocabulary, prefix, suffix


def _check(tokenizer: tokenizers.Tokenizer, model: dict[str, Any], path: Path, size: int) -> None:
    """What the library takes and would fail on later: ids that no file of this size numbers, words that have no token.

    Raises: FormatError.
    """
    most = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if most > size:
        raise FormatError(f"[tokenizer] wanted ids of tokens below {size}, the characters of {path}; got {most}")
    unknown = model.get("unk_token", "[UNK]")
    if model["type"] == "WordPiece" and tokenizer.token_to_id(unknown) is None:
        raise FormatError(f"[tokenizer] wanted a token for unknown words; {path} has no {unknown!r}")


def _vocabulary(
    tokenizer: tokenizers.Tokenizer, path: Path, first: str, last: str
) -> tuple[Vocabulary, list[int], list[int]]:
    """The vocabulary, and what is put before and after a text; `first` and `last` name what begins and ends a sequence."""
    texts = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [texts.get(i, "") for i in range(max(texts, default=-1) + 1)]
    kinds = [Kind.NORMAL.value if i in texts else Kind.UNUSED.value for i in range(len(tokens))]
    for i, token in tokenizer.get_added_tokens_decoder().items():
        kinds[i] = (Kind.CONTROL if token.special else Kind.USER_DEFINED).value

    config = read_if_there(path.with_name("tokenizer_config.json"), "tokenizer")
    bos_id, eos_id = (_named_id(tokenizer, config.get(f"{name}_token")) for name in (first, last))
    named = ends_of_generation(path.parent, len(tokens))
    if eos_id is not None:
        named.add(eos_id)

    if tokenizer.post_processor is None:
        prefix = [bos_id] if bos_id is not None and config.get("add_bos_token") is True else []
        suffix = [eos_id] if eos_id is not None and config.get("add_eos_token") is True else []
    else:
        plain, full = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        prefix, suffix = full[:at], full[at + len(plain) :]
    eog_ids = end_ids(tokens, kinds, named)
    return Vocabulary(tokens, kinds, bos_id, eos_id, None, eog_ids), prefix, suffix


def _named_id(tokenizer: tokenizers.Tokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _steps(described: Any) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer or decoder and the steps of its sequence."""
    if isinstance(described, dict):
        yield described
        for key in ("pretokenizers", "decoders"):
            for step in described.get(key) or ():
                yield from _steps(step)
