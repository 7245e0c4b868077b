"""Codes that are more than moved bits of their block: base-3 digits, and elements of the vectors of a grid.

Each function prepares a kernel, and gives what reads the codes of four elements of a block at an address, a byte each in an i32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tensorgraph.backends.cpu.ir import I8, I16, I32, Type, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.ops.formats.blocks import U8
from tensorgraph.ops.formats.gridded import EVEN_SIGNS
from tensorgraph.ops.formats.grids import I8 as Vectors
from tensorgraph.ops.formats.grids import grid, grid_values

ReadGroup = Callable[[Value, int], Value]
_EACH = 0x01010101
_FOUR_BITS = 0x00204081
"""Times a number of four bits: bit i of it is bit 8 i."""


def _load(k: Kernel, address: Value, type: Type) -> Value:
    return k.convert(k.load(address, type, align=1), I32, signed=False)


def _codes(name: str, values: Vectors) -> U8:
    return np.searchsorted(grid_values(name), values).astype(np.uint8)


def _table(k: Kernel, codes: U8) -> Value:
    return k.table(codes.ravel().view(np.int8).tolist(), I8)


class _Signed:
    """Vectors whose elements have signs of their own: eight bits for eight elements, or seven where negative ones are even."""

    def __init__(self, k: Kernel, name: str) -> None:
        vectors = grid(name)
        self.k, self.size, self.beyond = k, vectors.shape[1], 256 - len(grid_values(name))
        self.vectors, self.even_signs = _table(k, _codes(name, vectors)), _table(k, EVEN_SIGNS)

    def even(self, sevens: Value) -> Value:
        """All signs of eight by the first seven."""
        return _load(self.k, self.even_signs + self.k.convert(sevens, Type("i", 64), signed=False), I8)

    def codes(self, number: Value, signs: Value, element: int) -> Value:
        """Of a negative element, the code as far from the last as the positive one's is from the first."""
        at = self.k.convert(number, Type("i", 64), signed=False) * self.size + element % self.size
        found = self.k.load(self.vectors + at, I32, align=4)
        negative = ((signs.shift_right(element % 8) & 15) * _FOUR_BITS & _EACH) * 255
        return (found ^ negative) - (negative & (self.beyond * _EACH - (1 << 32)))


def iq2_xxs(k: Kernel) -> ReadGroup:
    of = _Signed(k, "iq2_xxs")

    def read(block: Value, element: int) -> Value:
        eight, inside = divmod(element // 8, 4)
        at = block + (2 + 8 * eight)
        sevens = _load(k, at + 4, I32).shift_right(7 * inside) & 127
        return of.codes(_load(k, at + inside, I8), of.even(sevens), element)

    return read


def iq2_xs(k: Kernel) -> ReadGroup:
    of = _Signed(k, "iq2_xs")

    def read(block: Value, element: int) -> Value:
        word = _load(k, block + (2 + element // 8 * 2), I16)
        return of.codes(word & 511, of.even(word.shift_right(9)), element)

    return read


def iq2_s(k: Kernel) -> ReadGroup:
    of = _Signed(k, "iq2_s")

    def read(block: Value, element: int) -> Value:
        n = element // 8
        high = _load(k, block + (66 + n // 4), I8).shift_right(2 * (n % 4)) & 3
        return of.codes(_load(k, block + (2 + n), I8) | high << 8, _load(k, block + (34 + n), I8), element)

    return read


def iq3_xxs(k: Kernel) -> ReadGroup:
    of = _Signed(k, "iq3_xxs")

    def read(block: Value, element: int) -> Value:
        sevens = _load(k, block + (66 + element // 32 * 4), I32).shift_right(7 * (element // 8 % 4)) & 127
        return of.codes(_load(k, block + (2 + element // 4), I8), of.even(sevens), element)

    return read


def iq3_s(k: Kernel) -> ReadGroup:
    of = _Signed(k, "iq3_s")

    def read(block: Value, element: int) -> Value:
        n = element // 4
        high = _load(k, block + (66 + n // 8), I8).shift_right(n % 8) & 1
        return of.codes(_load(k, block + (2 + n), I8) | high << 8, _load(k, block + (74 + element // 8), I8), element)

    return read


class _Shifted:
    """Vectors whose elements are all an eighth more, or all an eighth less: the next code or the one before."""

    def __init__(self, k: Kernel, name: str) -> None:
        more, less = (_codes(name, grid("iq1") + np.int8(shift)) for shift in (1, -1))
        assert np.array_equal(more, less + 1)
        self.k, self.vectors = k, _table(k, more)

    def codes(self, number: Value, less: Value, element: int) -> Value:
        at = self.k.convert(number, Type("i", 64), signed=False) * 8 + element % 8
        return self.k.load(self.vectors + at, I32, align=4) - less * _EACH


def iq1_s(k: Kernel) -> ReadGroup:
    of = _Shifted(k, "iq1_s")

    def read(block: Value, element: int) -> Value:
        n = element // 8
        word = _load(k, block + (34 + n // 4 * 2), I16)
        high = word.shift_right(3 * (n % 4)) & 7
        return of.codes(_load(k, block + (2 + n), I8) | high << 8, word.shift_right(15), element)

    return read


def iq1_m(k: Kernel) -> ReadGroup:
    of = _Shifted(k, "iq1_m")

    def read(block: Value, element: int) -> Value:
        n = element // 8
        field = _load(k, block + (32 + n // 2), I8).shift_right(4 * (n % 2))
        return of.codes(_load(k, block + n, I8) | (field & 7) << 8, field.shift_right(3) & 1, element)

    return read


def tq1_0(k: Kernel) -> ReadGroup:
    def read(block: Value, element: int) -> Value:
        """Digits of four bytes, which hold them as fractions of 256: two bytes at a time have room for their products."""
        first, run, begin = (0, 32, 0) if element < 160 else (32, 16, 160) if element < 240 else (48, 4, 240)
        digit, byte = divmod(element - begin, run)
        times = (1, 3, 9, 27, 81)[digit]
        word = k.load(block + (first + byte), I32, align=1)
        halves = [half & 0x00FF00FF for half in (word, word.shift_right(8))]
        low, high = [((half * times & 0x00FF00FF) * 3).shift_right(8) & 0x00FF00FF for half in halves]
        return low | high << 8

    return read


READERS: dict[str, Callable[[Kernel], ReadGroup]] = {
    "iq1_s": iq1_s,
    "iq1_m": iq1_m,
    "iq2_xxs": iq2_xxs,
    "iq2_xs": iq2_xs,
    "iq2_s": iq2_s,
    "iq3_xxs": iq3_xxs,
    "iq3_s": iq3_s,
    "tq1_0": tq1_0,
}
"""By type."""
