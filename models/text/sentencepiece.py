"""SentencePiece-style BPE: characters merge by the score of what they make, unknown characters fall back to bytes."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tensorgraph.errors import FormatError
from tensorgraph.models.text.vocabulary import Kind, Vocabulary, flag, numbers

SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD = re.compile(f"{SPACE}*[^{SPACE}]*")
_INNER_SPACE = re.compile(f"[^{SPACE}]{SPACE}")
_LONGEST_CACHED = 64  # characters; longer stretches are rarely met twice


def byte_of_token(token: str) -> int | None:
    """The byte that a token such as `<0x0A>` stands for."""
    match = _BYTE.fullmatch(token)
    return int(match[1], 16) if match else None


class SentencePieceBPE:
    """Ordinary text to ids and back by SentencePiece's BPE.

    Of all neighbouring pairs that make a token, the one whose token has the highest score merges first, the leftmost
    of equals. (The `tokenizers` library ranks pairs, which orders equal scores differently, so it is not used here.)
    Text never becomes a control, unknown or byte token by its spelling.

    Attributes:
        space_prefix: whether a text starts as if a space stood before it.
    """

    def __init__(self, metadata: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        """Read scores and byte tokens.

        Raises: FormatError where scores are missing or a byte token is none.
        """
        tokens, kinds = vocabulary.tokens, vocabulary.kinds
        self._tokens, self._unknown_id = tokens, vocabulary.unknown_id
        self._scores = numbers(metadata, "tokenizer.ggml.scores", len(tokens))
        spelled = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
        self._ids = {token: i for i, token in enumerate(tokens) if kinds[i] in spelled}
        self._bytes: dict[int, int] = {}
        for i, kind in enumerate(kinds):
            if kind == Kind.BYTE:
                byte = byte_of_token(tokens[i])
                if byte is None:
                    raise FormatError(f"[tokenizer] wanted a text like <0x0A> for byte token {i}; got {tokens[i]!r}")
                self._bytes[i] = byte
        self._id_of_byte = {byte: i for i, byte in self._bytes.items()}
        self.space_prefix = flag(metadata, "tokenizer.ggml.add_space_prefix", True)
        # No merge crosses from a character to a space after it unless a token does, so words can be merged apart.
        self._by_words = not any(_INNER_SPACE.search(token) for token in self._ids)
        self._merge_cached = lru_cache(maxsize=20_000)(self._merge)

    def encode(self, stretches: Sequence[str]) -> list[list[int]]:
        """Ids of each of several stretches of ordinary text."""
        return [self._encode(text) for text in stretches]

    def _encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        ids: list[int] = []
        for word in _WORD.findall(text) if self._by_words else [text]:
            ids.extend(self._merge_cached(word) if len(word) <= _LONGEST_CACHED else self._merge(word))
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an ordinary token stands for."""
        if token_id in self._bytes:
            return bytes([self._bytes[token_id]])
        return self._tokens[token_id].replace(SPACE, " ").encode()

    def _merge(self, text: str) -> tuple[int, ...]:
        """Merge the characters of `text`: symbol i spans text[i:ends[i]], and ends[i] is its right neighbour."""
        n = len(text)
        ends, before = list(range(1, n + 1)), list(range(-1, n))
        queue: list[tuple[float, int, int, int]] = []  # -score, left, middle, right: stale once a symbol has changed

        def offer(left: int) -> None:
            if left >= 0 and (middle := ends[left]) < n:
                token_id = self._ids.get(text[left : ends[middle]])
                if token_id is not None:
                    heapq.heappush(queue, (-self._scores[token_id], left, middle, ends[middle]))

        for i in range(n - 1):
            offer(i)
        while queue:
            _, left, middle, right = heapq.heappop(queue)
            if ends[left] != middle or ends[middle] != right:
                continue
            ends[left], ends[middle] = right, -1
            if right < n:
                before[right] = left
            offer(before[left])
            offer(left)
        ids: list[int] = []
        start = 0
        while start < n:
            ids.extend(self._ids_of_symbol(text[start : ends[start]]))
            start = ends[start]
        return tuple(ids)

    def _ids_of_symbol(self, symbol: str) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        data = symbol.encode()
        if all(byte in self._id_of_byte for byte in data):
            return [self._id_of_byte[byte] for byte in data]
        return [] if self._unknown_id is None else [self._unknown_id]
