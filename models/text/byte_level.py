"""Byte-level BPE: text becomes UTF-8 bytes, each byte a printable character, and pairs merge by rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from itertools import repeat
from operator import contains
from typing import Any

import tokenizers
from tokenizers import models

from tensorgraph.errors import FormatError
from tensorgraph.models.text.pretokenizers import PreTokenizer
from tensorgraph.models.text.vocabulary import Kind, Vocabulary, strings


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def bytes_of_token(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a text outside the alphabet stands for itself."""
    with contextlib.suppress(KeyError):
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    return token.encode()


def _merges(
    texts: Sequence[str], ids: Mapping[str, int], controls: Callable[[], Collection[str]]
) -> list[tuple[str, str]]:
    """The two tokens of each merge, without the merges that have to do with control tokens.

    Raises: FormatError where another one is no pair of tokens that make a token.
    """
    parts = " ".join(texts).split(" ")  # all at once: a vocabulary has 10^5
    made = "\n".join(texts).replace(" ", "").split("\n")
    if len(parts) == 2 * len(texts) and len(made) == len(texts) and all(map(contains, texts, repeat(" "))):
        if "" not in ids and all(map(ids.__contains__, parts)) and all(map(ids.__contains__, made)):
            return list(zip(parts[::2], parts[1::2], strict=True))  # as nearly always
    found = []
    for index, merge in enumerate(texts):
        left, _, right = merge.partition(" ")
        if left in ids and right in ids and left + right in ids and left and right:
            found.append((left, right))
        elif {left, right, left + right}.isdisjoint(controls()):
            where = f'"tokenizer.ggml.merges"[{index}]'
            raise FormatError(f"[tokenizer] wanted two tokens that make a third in {where}; got {merge!r}")
    return found


class ByteLevelBPE:
    """Ordinary text to ids and back by byte-level BPE.

    Text never becomes a control token. A byte that the vocabulary lacks is left out, as the `tokenizers` library does.
    """

    space_prefix = False

    def __init__(self, metadata: Mapping[str, Any], vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> None:
        """Build the merges from `tokenizer.ggml.merges`.

        Raises: FormatError where a merge is no pair of tokens that make a token.
        """
        tokens, control = vocabulary.tokens, Kind.CONTROL.value
        self._tokens = tokens
        ids = {token: i for i, (token, kind) in enumerate(zip(tokens, vocabulary.kinds, strict=True)) if kind != control}
        controls = cache(lambda: {token for token, kind in zip(tokens, vocabulary.kinds, strict=True) if kind == control})
        merges = _merges(strings(metadata, "tokenizer.ggml.merges"), ids, controls)
        model = models.BPE(ids, merges, ignore_merges=pre_tokenizer.ignore_merges)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizer.build()

    def encode(self, text: str) -> list[int]:
        """Ids of a stretch of ordinary text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an ordinary token stands for."""
        return bytes_of_token(self._tokens[token_id])
