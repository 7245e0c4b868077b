"""The vocabulary that a GGUF file carries: texts, kinds and special ids of its tokens, checked while they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from tensorgraph.errors import FormatError


class Kind(IntEnum):
    """What a token is, as `tokenizer.ggml.token_type` numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts by which models end a turn or a document, whatever the metadata names as end of sequence.
_END_TEXTS = frozenset(
    (
        "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>",
        "<|eot|>", "<|eom|>", "<end_of_turn>", "<end_of_utterance>", "<|end|>", "<|return|>", "<|call|>",
        "<EOT>", "<_EOT>", "< EOT >", "</s>",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Texts and kinds of all tokens, and the ids that have a meaning of their own.

    Attributes:
        eog_ids: every id that ends a generation.
    """

    tokens: list[str]
    kinds: list[int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    eog_ids: frozenset[int]

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read the vocabulary from a GGUF file's metadata.

        Raises: FormatError where an entry is missing, is of another type, or does not fit the others.
        """
        tokens = strings(metadata, "tokenizer.ggml.tokens")
        named = {name: token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown")}
        kinds = [Kind.NORMAL.value] * len(tokens)
        if "tokenizer.ggml.token_type" in metadata:
            kinds = list(map(int, numbers(metadata, "tokenizer.ggml.token_type", len(tokens))))
        else:
            for i in named.values():
                if i is not None:
                    kinds[i] = Kind.CONTROL.value
        ends = {i for name in ("eos", "eot", "eom") if (i := named[name]) is not None}
        eog_ids = end_ids(tokens, kinds, ends)
        for i in eog_ids:
            if kinds[i] == Kind.USER_DEFINED and tokens[i] in _END_TEXTS:  # Gemma's </s>: plain text must not end a turn
                kinds[i] = Kind.CONTROL.value
        return cls(tokens, kinds, named["bos"], named["eos"], named["unknown"], eog_ids)


def special_ids(kinds: Sequence[int]) -> list[int]:
    """The ids of all tokens that are not normal ones."""
    found: list[int] = np.flatnonzero(np.asarray(kinds, np.int64) != Kind.NORMAL.value).tolist()
    return found


def end_ids(tokens: Sequence[str], kinds: Sequence[int], named: set[int]) -> frozenset[int]:
    """Every id that ends a generation: those that the metadata names, and special tokens with a known text."""
    known = {tokens[i]: i for i in special_ids(kinds) if tokens[i] in _END_TEXTS}
    if "<|return|>" in known:  # gpt-oss ends each message with <|end|>, a turn only with the others
        known.pop("<|end|>", None)
    return frozenset(named | set(known.values()))


def strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """An array of strings.

    Raises: FormatError where it is missing or not of strings.
    """
    values = list(_array(metadata, key))
    if not set(map(type, values)) <= {str}:
        wrong = next(value for value in values if type(value) is not str)
        raise FormatError(f'[tokenizer] wanted strings in "{key}"; got {wrong!r}')
    return values


def numbers(metadata: Mapping[str, Any], key: str, count: int) -> list[float]:
    """An array of `count` numbers.

    Raises: FormatError where it is missing, of another length or not of numbers.
    """
    values = _array(metadata, key)
    real = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iuf"
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(values) != count or not (real or set(map(type, values)) <= {int, float}):
        raise FormatError(f'[tokenizer] wanted {count} numbers in "{key}", one per token; got {len(values)} values')
    return values


def flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """A yes or no."""
    return bool(metadata.get(key, default))


def token_id(metadata: Mapping[str, Any], name: str, n_tokens: int) -> int | None:
    """The id that an entry such as `tokenizer.ggml.bos_token_id` names.

    Raises: FormatError where there is no such token.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < n_tokens:
        raise FormatError(f'[tokenizer] wanted an id below {n_tokens} in "{key}"; got {value!r}')
    return value


def _array(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise FormatError(f'[tokenizer] wanted "{key}" in the metadata; it is not there')
    values = metadata[key]
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise FormatError(f'[tokenizer] wanted an array in "{key}"; got {type(values).__name__}')
    return values
