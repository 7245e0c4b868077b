"""Encoding of iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq1_s and iq1_m: where each puts scales, numbers of vectors, and signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.ops.formats.bits import pack
from tensorgraph.ops.formats.blocks import F32, U8
from tensorgraph.ops.formats.grid_searches import CODINGS, Codes, encode_blocks


def _concatenated(*parts: NDArray[Any]) -> U8:
    """Fields of a block one after another, numbers as little-endian bytes."""
    return np.concatenate([part.astype(part.dtype.newbyteorder("<")).view(np.uint8) for part in parts], axis=1)


def _low(codes: Codes) -> U8:
    return (codes.numbers & 255).astype(np.uint8)


def _high(codes: Codes) -> U8:
    """The bits of numbers that are above a byte."""
    return (codes.numbers >> 8).astype(np.uint8)


def _as_words(codes: Codes, scales: U8) -> NDArray[np.uint32]:
    """A word for each group of 32: four signs of eight in seven bits each, and a scale in the four bits left."""
    sevens = (codes.marks & np.uint8(127)).reshape(-1, 8, 4).astype(np.uint32) << np.arange(0, 28, 7, dtype=np.uint32)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(sevens, axis=2) | scales.astype(np.uint32) << np.uint32(28)
    return words


def _threes(fields: U8) -> NDArray[np.uint16]:
    """Four fields of three bits in each word."""
    parts = fields.reshape(len(fields), -1, 4).astype(np.uint16) << np.arange(0, 12, 3, dtype=np.uint16)
    words: NDArray[np.uint16] = np.bitwise_or.reduce(parts, axis=2)
    return words


def _encode_iq2_xxs(x: F32) -> U8:
    head, scales, codes = encode_blocks(CODINGS["iq2_xxs"], x)
    groups = _concatenated(_low(codes).reshape(-1, 4), _as_words(codes, scales).reshape(-1, 1))
    return np.concatenate([head, groups.reshape(len(x), 64)], axis=1)


def _encode_iq2_xs(x: F32) -> U8:
    head, scales, codes = encode_blocks(CODINGS["iq2_xs"], x)
    words = codes.numbers.astype(np.uint16) | (codes.marks & np.uint8(127)).astype(np.uint16) << np.uint16(9)
    return _concatenated(head, words, pack(scales, 4, 1))


def _encode_iq2_s(x: F32) -> U8:
    head, scales, codes = encode_blocks(CODINGS["iq2_s"], x)
    return _concatenated(head, _low(codes), codes.marks, pack(_high(codes), 2, 1), pack(scales, 4, 1))


def _encode_iq3_xxs(x: F32) -> U8:
    head, scales, codes = encode_blocks(CODINGS["iq3_xxs"], x)
    return _concatenated(head, _low(codes), _as_words(codes, scales))


def _encode_iq3_s(x: F32) -> U8:
    head, scales, codes = encode_blocks(CODINGS["iq3_s"], x)
    return _concatenated(head, _low(codes), pack(_high(codes), 1, 1), codes.marks, pack(scales, 4, 1))


def _encode_iq1_s(x: F32) -> U8:
    head, scales, codes = encode_blocks(CODINGS["iq1_s"], x)
    words = _threes(_high(codes)) | (scales | codes.marks << np.uint8(3)).astype(np.uint16) << np.uint16(12)
    return _concatenated(head, _low(codes), words)


def _encode_iq1_m(x: F32) -> U8:
    head, scales, codes = encode_blocks(CODINGS["iq1_m"], x)
    d = head.view("<u2") >> np.arange(0, 16, 4, dtype=np.uint16) << np.uint16(12)
    return _concatenated(_low(codes), pack(_high(codes) | codes.marks << np.uint8(3), 4, 1), _threes(scales) | d)


ENCODERS: Mapping[str, Callable[[F32], U8]] = {
    "iq2_xxs": _encode_iq2_xxs,
    "iq2_xs": _encode_iq2_xs,
    "iq2_s": _encode_iq2_s,
    "iq3_xxs": _encode_iq3_xxs,
    "iq3_s": _encode_iq3_s,
    "iq1_s": _encode_iq1_s,
    "iq1_m": _encode_iq1_m,
}
