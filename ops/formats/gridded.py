"""Blocks of 256 whose codes are numbers of vectors of a grid: iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq1_s and iq1_m.

A value is a magnitude of the grid, with a sign of its own in iq2 and iq3 and an eighth of a unit more or less in iq1, times the
scale of its group, times one f16. Each product is exact in f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.ops.formats.bits import read_f16, scale_groups, unpack
from tensorgraph.ops.formats.blocks import F32, U8, BlockFormat, Parts, Scale, declare
from tensorgraph.ops.formats.grid_encoders import ENCODERS
from tensorgraph.ops.formats.grid_searches import CODINGS
from tensorgraph.ops.formats.grids import I8, grid, grid_values

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


def _odd(scales: NDArray[Any]) -> U8:
    """Of scales the odd numbers from 1."""
    return scales.astype(np.uint8) * np.uint8(2) + np.uint8(1)


def _words(raw: U8, size: int) -> NDArray[Any]:
    """Little-endian numbers of `size` bytes."""
    found: NDArray[Any] = np.ascontiguousarray(raw).view(f"<u{size}")
    return found


def _even_signs(words: NDArray[np.uint32]) -> tuple[U8, U8]:
    """What words of 32 bits [n, 8] hold for groups of 32: signs of four times eight in seven bits each, and a scale in four."""
    sevens = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
    return EVEN_SIGNS[sevens].reshape(len(words), 32), _odd(words >> np.uint32(28))


Values = tuple[I8, U8]
"""Whole numbers [n, 256], and the scales of their groups [n, groups]: what one f16 multiplies."""


def _iq2_xxs(raw: U8) -> Values:
    groups = raw[:, 2:66].reshape(len(raw), 8, 8)
    signs, scales = _even_signs(_words(groups[:, :, 4:], 4)[:, :, 0])
    return _signed(_vectors(grid("iq2_xxs"), groups[:, :, :4].reshape(len(raw), 32)), signs), scales


def _iq2_xs(raw: U8) -> Values:
    words = _words(raw[:, 2:66], 2)
    values = _signed(_vectors(grid("iq2_xs"), words & np.uint16(511)), EVEN_SIGNS[words >> np.uint16(9)])
    return values, _odd(unpack(raw[:, 66:], 4, 1))


def _iq2_s(raw: U8) -> Values:
    numbers = raw[:, 2:34] | unpack(raw[:, 66:74], 2, 1).astype(np.uint16) << np.uint16(8)
    return _signed(_vectors(grid("iq2_s"), numbers), raw[:, 34:66]), _odd(unpack(raw[:, 74:], 4, 1))


def _iq3_xxs(raw: U8) -> Values:
    signs, scales = _even_signs(_words(raw[:, 66:], 4))
    return _signed(_vectors(grid("iq3_xxs"), raw[:, 2:66]), signs), scales


def _iq3_s(raw: U8) -> Values:
    numbers = raw[:, 2:66] | unpack(raw[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8)
    return _signed(_vectors(grid("iq3_s"), numbers), raw[:, 74:106]), _odd(unpack(raw[:, 106:], 4, 1))


def _shifted(numbers: NDArray[np.uint16], down: NDArray[Any]) -> I8:
    """Eighths of the vectors with some numbers [n, 32], each one more or, where `down`, less."""
    more = np.where(down, np.int8(-1), np.int8(1))
    return (_vectors(grid("iq1"), numbers).reshape(*numbers.shape, 8) + more[:, :, None]).reshape(len(numbers), 256)


def _iq1_s(raw: U8) -> Values:
    words = _words(raw[:, 34:], 2)
    high = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)).reshape(len(raw), 32)
    values = _shifted(raw[:, 2:34] | high << np.uint16(8), np.repeat(words >> np.uint16(15), 4, axis=1))
    return values, _odd(words >> np.uint16(12) & np.uint16(7))


def _iq1_m(raw: U8) -> Values:
    words, fields = _words(raw[:, 48:], 2), unpack(raw[:, 32:48], 4, 1)
    scales = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)).reshape(len(raw), 16)
    numbers = raw[:, :32] | (fields & np.uint8(7)).astype(np.uint16) << np.uint16(8)
    return _shifted(numbers, fields >> np.uint8(3)), _odd(scales)


def iq1_m_scale(raw: U8) -> U8:
    """The f16 whose bits lie in the highest four of four words, as bytes [n, 2]."""
    top = _words(raw[:, 48:], 2) >> np.uint16(12) << np.arange(0, 16, 4, dtype=np.uint16)
    return np.bitwise_or.reduce(top, axis=1, keepdims=True).view(np.uint8)


def _declare(name: str, block_bytes: int, values: Callable[[U8], Values]) -> BlockFormat:
    """A step times the f16 at the front (of iq1_m, that in the words) is what scales multiply."""
    numbers = np.zeros(256, np.uint8)
    numbers[grid_values(name).view(np.uint8)] = np.arange(len(grid_values(name)))

    def decode(raw: U8) -> F32:
        whole, scales = values(raw)
        d = read_f16(iq1_m_scale(raw) if name == "iq1_m" else raw, 0)
        return scale_groups(whole, scales * (d * np.float32(CODINGS[name].step)))

    def parts(raw: U8) -> Parts:
        whole, scales = values(raw)
        return Parts(numbers[whole.view(np.uint8)], scales)

    scales = Scale(48, "f16_nibbles") if name == "iq1_m" else Scale(0)
    return declare(name, 256, block_bytes, decode, ENCODERS[name], parts=parts, scales=(scales,))


iq2_xxs = _declare("iq2_xxs", 66, _iq2_xxs)
iq2_xs = _declare("iq2_xs", 74, _iq2_xs)
iq2_s = _declare("iq2_s", 82, _iq2_s)
iq3_xxs = _declare("iq3_xxs", 98, _iq3_xxs)
iq3_s = _declare("iq3_s", 110, _iq3_s)
iq1_s = _declare("iq1_s", 50, _iq1_s)
iq1_m = _declare("iq1_m", 56, _iq1_m)
