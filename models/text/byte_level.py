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
from tensorgraph.models.text.vocabulary import Kind, Vocabulary, special_ids, strings


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
FEW_MERGES = 10_000
SHORT, LONGEST_PIECE = 2_000, 64  # characters


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

    Handing a library 10^5 tokens and merges takes a good part of a process's start, and a prompt needs some hundred: until texts
    have come to `SHORT` characters, each is encoded with what it can need alone. That gives the same ids: merges only make parts
    of a piece, and those that can keep their order.
    """

    space_prefix = False

    def __init__(self, metadata: Mapping[str, Any], vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> None:
        """Read `tokenizer.ggml.merges`; more than `FEW_MERGES` are checked when all of them are first needed.

        Raises: FormatError where a merge is no pair of tokens that make a token.
        """
        self._vocabulary, self._tokens, self._pre_tokenizer = vocabulary, vocabulary.tokens, pre_tokenizer
        self._merges = strings(metadata, "tokenizer.ggml.merges")
        self._ids = _ordinary(vocabulary)
        self._cut = pre_tokenizer.build()
        self._all: tokenizers.Tokenizer | None = None
        self._characters_left = SHORT
        if len(self._merges) <= FEW_MERGES:
            self._encoder()

    def encode(self, stretches: Sequence[str]) -> list[list[int]]:
        """Ids of each of several stretches of ordinary text.

        Raises: FormatError where a merge is no pair of tokens that make a token.
        """
        self._characters_left -= sum(map(len, stretches))
        some = self._some(stretches) if self._all is None and self._characters_left >= 0 else None
        encoder = self._encoder() if some is None else some
        return [encoder.encode(text, add_special_tokens=False).ids for text in stretches]

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an ordinary token stands for."""
        return bytes_of_token(self._tokens[token_id])

    def _encoder(self) -> tokenizers.Tokenizer:
        if self._all is None:
            tokens, kinds, control = self._tokens, self._vocabulary.kinds, Kind.CONTROL.value
            controls = cache(lambda: {token for token, kind in zip(tokens, kinds, strict=True) if kind == control})
            self._all = self._encoder_of(self._ids, _merges(self._merges, self._ids, controls))
        return self._all

    def _some(self, stretches: Sequence[str]) -> tokenizers.Tokenizer | None:
        """With the tokens and merges that these texts can need; None where a piece is so long that these are too many."""
        pieces = {piece for text in stretches for piece, _ in self._cut.pre_tokenize_str(text)}
        if max(map(len, pieces), default=0) > LONGEST_PIECE:
            return None
        ids: dict[str, int] = {}
        pairs: dict[str, tuple[str, str]] = {}
        for piece in pieces:
            known = "".join(filter(self._ids.__contains__, piece))  # the others are left out, and what was beside them merges
            ends = range(1, len(known) + 1)
            found = [part for end in ends for start in range(end) if (part := known[start:end]) in self._ids]
            ids.update((part, self._ids[part]) for part in (*found, *({piece} & self._ids.keys())))
            halves = ((part[:at], part[at:]) for part in found for at in range(1, len(part)))
            pairs.update((f"{left} {right}", (left, right)) for left, right in halves if left in ids and right in ids)
        return self._encoder_of(ids, [pairs[merge] for merge in self._merges if merge in pairs])

    def _encoder_of(self, ids: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
        encoder = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=self._pre_tokenizer.ignore_merges))
        encoder.pre_tokenizer = self._cut
        return encoder


def _ordinary(vocabulary: Vocabulary) -> dict[str, int]:
    """The ids of all tokens but control tokens, the last of equal ones."""
    tokens, kinds = vocabulary.tokens, vocabulary.kinds
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        return {token: i for i, token in enumerate(tokens) if kinds[i] != Kind.CONTROL}
    for i in special_ids(kinds):
        if kinds[i] == Kind.CONTROL:
            del ids[tokens[i]]
    return ids
