"""Blocks of 256 whose codes are numbers of vectors of a grid: iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq1_s and iq1_m.

A value is a magnitude of the grid, with a sign of its own in iq2 and iq3 and an eighth of a unit more or less in iq1, times the
scale of its group, times one f16. Each product is exact in f32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.ops.formats.bits import read_f16, scale_groups, unpack
from tensorgraph.ops.formats.blocks import F32, U8, declare
from tensorgraph.ops.formats.grid_encoders import ENCODERS
from tensorgraph.ops.formats.grids import I8, grid

_NUMBERS = np.arange(256, dtype=np.uint8)
EVEN_SIGNS: U8 = _NUMBERS[:128] | (np.bitwise_count(_NUMBERS[:128]) & np.uint8(1)) << np.uint8(7)
"""Signs of eight by their first seven: the number of negative ones is even."""
_NEGATIVE: I8 = -unpack(_NUMBERS[:, None], 1, 1).view(np.int8)
"""By signs of eight: -1 where one is set."""


def _vectors(of: I8, numbers: NDArray[Any]) -> I8:
    """The vectors with some numbers [n, groups], as a row [n, 256]."""
    words = of.view(np.uint64 if of.shape[1] == 8 else np.uint32)[:, 0]
    found: I8 = words[numbers].view(np.int8)
    return found


def _signed(magnitudes: I8, signs: U8) -> I8:
    """A bit for each of eight, [n, 32], says which are negative."""
    negative = _vectors(_NEGATIVE, signs)
    return (magnitudes ^ negative) - negative


def _halves(scales: U8 | NDArray[np.uint32]) -> F32:
    """Scales that are a half and so many more."""
    return scales.astype(np.float32) + np.float32(0.5)


def _odd(scales: U8 | NDArray[np.uint16]) -> F32:
    """Scales that are the odd numbers from 1."""
    return scales.astype(np.float32) * np.float32(2) + np.float32(1)


def _words(raw: U8, size: int) -> NDArray[Any]:
    """Little-endian numbers of `size` bytes."""
    found: NDArray[Any] = np.ascontiguousarray(raw).view(f"<u{size}")
    return found


def _even_signs(words: NDArray[np.uint32]) -> tuple[U8, F32]:
    """What words of 32 bits [n, 8] hold for groups of 32: signs of four times eight in seven bits each, and a scale in four."""
    sevens = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
    return EVEN_SIGNS[sevens].reshape(len(words), 32), _halves(words >> np.uint32(28))


def _decode_iq2_xxs(raw: U8) -> F32:
    groups = raw[:, 2:].reshape(len(raw), 8, 8)
    signs, scales = _even_signs(_words(groups[:, :, 4:], 4)[:, :, 0])
    magnitudes = _vectors(grid("iq2_xxs"), groups[:, :, :4].reshape(len(raw), 32))
    return scale_groups(_signed(magnitudes, signs), scales * (read_f16(raw, 0) * np.float32(0.25)))


def _decode_iq2_xs(raw: U8) -> F32:
    words = _words(raw[:, 2:66], 2)
    signs, scales = EVEN_SIGNS[words >> np.uint16(9)], _halves(unpack(raw[:, 66:], 4, 1))
    magnitudes = _vectors(grid("iq2_xs"), words & np.uint16(511))
    return scale_groups(_signed(magnitudes, signs), scales * (read_f16(raw, 0) * np.float32(0.25)))


def _decode_iq2_s(raw: U8) -> F32:
    numbers = raw[:, 2:34] | unpack(raw[:, 66:74], 2, 1).astype(np.uint16) << np.uint16(8)
    scales = _halves(unpack(raw[:, 74:], 4, 1))
    values = _signed(_vectors(grid("iq2_s"), numbers), raw[:, 34:66])
    return scale_groups(values, scales * (read_f16(raw, 0) * np.float32(0.25)))


def _decode_iq3_xxs(raw: U8) -> F32:
    signs, scales = _even_signs(_words(raw[:, 66:], 4))
    values = _signed(_vectors(grid("iq3_xxs"), raw[:, 2:66]), signs)
    return scale_groups(values, scales * (read_f16(raw, 0) * np.float32(0.5)))


def _decode_iq3_s(raw: U8) -> F32:
    numbers = raw[:, 2:66] | unpack(raw[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8)
    values = _signed(_vectors(grid("iq3_s"), numbers), raw[:, 74:106])
    return scale_groups(values, _odd(unpack(raw[:, 106:], 4, 1)) * read_f16(raw, 0))


def _shifted(numbers: NDArray[np.uint16], down: NDArray[Any]) -> I8:
    """Eighths of the vectors with some numbers [n, 32], each one more or, where `down`, less."""
    more = np.where(down, np.int8(-1), np.int8(1))
    return (_vectors(grid("iq1"), numbers).reshape(*numbers.shape, 8) + more[:, :, None]).reshape(len(numbers), 256)


def _decode_iq1_s(raw: U8) -> F32:
    words = _words(raw[:, 34:], 2)
    high = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)).reshape(len(raw), 32)
    values = _shifted(raw[:, 2:34] | high << np.uint16(8), np.repeat(words >> np.uint16(15), 4, axis=1))
    return scale_groups(values, _odd(words >> np.uint16(12) & np.uint16(7)) * (read_f16(raw, 0) * np.float32(0.125)))


def _decode_iq1_m(raw: U8) -> F32:
    words, fields = _words(raw[:, 48:], 2), unpack(raw[:, 32:48], 4, 1)
    d = np.bitwise_or.reduce(words >> np.uint16(12) << np.arange(0, 16, 4, dtype=np.uint16), axis=1, keepdims=True)
    scales = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)).reshape(len(raw), 16)
    numbers = raw[:, :32] | (fields & np.uint8(7)).astype(np.uint16) << np.uint16(8)
    values = _shifted(numbers, fields >> np.uint8(3))
    return scale_groups(values, _odd(scales) * (d.view(np.float16).astype(np.float32) * np.float32(0.125)))


iq2_xxs = declare("iq2_xxs", 256, 66, _decode_iq2_xxs, ENCODERS["iq2_xxs"])
iq2_xs = declare("iq2_xs", 256, 74, _decode_iq2_xs, ENCODERS["iq2_xs"])
iq2_s = declare("iq2_s", 256, 82, _decode_iq2_s, ENCODERS["iq2_s"])
iq3_xxs = declare("iq3_xxs", 256, 98, _decode_iq3_xxs, ENCODERS["iq3_xxs"])
iq3_s = declare("iq3_s", 256, 110, _decode_iq3_s, ENCODERS["iq3_s"])
iq1_s = declare("iq1_s", 256, 50, _decode_iq1_s, ENCODERS["iq1_s"])
iq1_m = declare("iq1_m", 256, 56, _decode_iq1_m, ENCODERS["iq1_m"])
