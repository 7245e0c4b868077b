"""Codes of block types in layout r16: how a unit lies, and how its codes and scales are read.

A unit is 32 elements of each of 16 rows, or 256 of a type whose scales have scales. It begins with its rows' scales, and minima
if any; then for each 32 elements, a block, come whole numbers that these are multiplied by, if the type has them, and codes in
planes: of a code of 5 bits, say, 4 in one and the highest in another. A plane of p bits takes p words of 4 bytes of each row, the
first word of all 16 rows before the second; four consecutive elements, a group, lie in the four bytes of a word, group g in word
g mod p from bit p * (g // p) of each byte on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel

ROWS = 16
BLOCK = 32
GROUPS = BLOCK // 4
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Of a code of so many bits: the lowest bits first."""
Head = Literal["f16", "e8m0"]


@dataclass(frozen=True)
class Codes:
    """An element is `(value - centre) * factor * scale`, plus a minimum if any: `minimum`, or `-factor * minimum` where there are
    factors. Its value is its code, or what a table has for it.

    Attributes:
        bits: of a code as it is held, a key of PLANES.
        centre: what is taken off a value; with a table, what its numbers were raised by to be at least 0.
        table: of values by code, each below 256.
        head: how a scale is held, and a minimum.
        unit: what a scale is still to be multiplied by, a power of two.
        has_min: whether there are minima.
        n_blocks: of a unit.
        factors: whole numbers that multiply scales: none; of 8 bits, signed or not; or of 4 bits, and those of minima in the
            upper half of the same byte.
        per_factor: elements, 16 or 32.
    """

    bits: int
    centre: int = 0
    table: tuple[int, ...] = ()
    head: Head = "f16"
    unit: float = 1.0
    has_min: bool = False
    n_blocks: int = 1
    factors: Literal["", "u8", "i8", "nibbles"] = ""
    per_factor: int = BLOCK

    @cached_property
    def most(self) -> int:
        """The largest value."""
        return max(self.table) if self.table else (1 << self.bits) - 1

    @cached_property
    def n_factors(self) -> int:
        """Of a block: factors of scales."""
        return BLOCK // self.per_factor if self.factors else 0

    @cached_property
    def fields(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes of what a row has in a unit's head, and in a block, in order."""
        head = (1 if self.head == "e8m0" else 2,) * (1 + self.has_min)
        n_bytes = self.n_factors * (2 if self.has_min and self.factors != "nibbles" else 1)
        return head, (1,) * n_bytes + (4,) * self.bits

    @property
    def block(self) -> int:
        """Elements of a row in a unit."""
        return BLOCK * self.n_blocks

    @cached_property
    def head_bytes(self) -> int:
        return ROWS * sum(self.fields[0])

    @cached_property
    def block_bytes(self) -> int:
        """Of a block of 16 rows."""
        return ROWS * sum(self.fields[1])

    @cached_property
    def row_bytes(self) -> int:
        """Of one row's part of a unit."""
        return sum(self.fields[0]) + self.n_blocks * sum(self.fields[1])

    @property
    def unit_bytes(self) -> int:
        return ROWS * self.row_bytes

    def at(self, unit: Value, n: Int) -> Value:
        """The address of a unit's block."""
        return unit + (unit.fn.i64(n) * self.block_bytes + self.head_bytes)

    def _planes(self) -> Iterator[tuple[int, int, int]]:
        """Of each plane: where its words begin in a block, its bits, and where they go in a code."""
        at, to = self.block_bytes - 4 * ROWS * self.bits, 0
        for bits in PLANES[self.bits]:
            yield at, bits, to
            at, to = at + 4 * ROWS * bits, to + bits

    # Of the rows in a part of a panel: `lanes` of them from row `part * lanes`.

    def heads(self, k: Kernel, unit: Value, part: int, lanes: int) -> tuple[Value, Value | None]:
        """Scales and minima of a unit, f32."""
        size = self.fields[0][0]
        found = [self._head(k, unit + (n * ROWS + part * lanes) * size, lanes) for n in range(1 + self.has_min)]
        return found[0], found[1] if self.has_min else None

    def _head(self, k: Kernel, at: Value, lanes: int) -> Value:
        if self.head == "f16":
            found = k.half_to_f32(k.load(at, I16.x(lanes)))
            return found * self.unit if self.unit != 1 else found
        exponent = k.convert(k.load(at, I8.x(lanes)), I32, signed=False)  # half of 2^(e - 127)
        small = k.const(1 << 21, I32.x(lanes)) << exponent
        return k.select(exponent.lt(2), small, (exponent - 1) << 23).bits_as(F32.x(lanes))

    def factors_at(self, k: Kernel, at: Value, part: int, lanes: int) -> tuple[list[Value], list[Value]]:
        """Factors of a block's scales and of its minima, i32."""
        n, signed = self.n_factors, self.factors == "i8"
        count = sum(size == 1 for size in self.fields[1])
        raw = [k.convert(k.load(at + (i * ROWS + part * lanes), I8.x(lanes)), I32, signed=signed) for i in range(count)]
        if self.factors == "nibbles":
            return [v & 15 for v in raw], [v.shift_right(4) for v in raw] if self.has_min else []
        return raw[:n], raw[n:]

    def order(self) -> Sequence[int]:
        """Groups, those that share words of the first plane next to each other."""
        words = PLANES[self.bits][0]
        return sorted(range(GROUPS), key=lambda g: (g % words, g))

    def group(self, k: Kernel, at: Value, part: int, lanes: int, g: int) -> Value:
        """The values of group g, u8 of `4 * lanes`."""
        code = None
        for start, bits, to in self._planes():
            word = k.load(at + (start + 4 * (g % bits * ROWS + part * lanes)), I8.x(4 * lanes), align=4)
            moved = _moved(word, bits * (g // bits), bits, to)
            code = moved if code is None else code | moved
        assert code is not None
        return lookup(k, self.table, code) if self.table else code

    def values(self, k: Kernel, heads: tuple[Value, Value | None], at: Value, part: int, lanes: int) -> Iterator[Value]:
        """The elements of a block in order, f32."""
        scale, least = heads
        factors, of_minima = self.factors_at(k, at, part, lanes)
        if of_minima:
            assert least is not None
            minima = [-(least * k.convert(m, F32)) for m in of_minima]
        else:
            minima = [least] if least is not None else []
        whole = [k.convert(f, F32) for f in factors]
        for g in range(GROUPS):
            n = 4 * g // self.per_factor
            word = self.group(k, at, part, lanes, g).bits_as(I32.x(lanes))
            for byte in range(4):
                code = word.shift_right(8 * byte) if byte else word
                value = k.convert((code & 255 if byte < 3 else code) - self.centre, F32)
                if whole:
                    value = value * whole[n]
                yield k.fma(value, scale, minima[n]) if minima else value * scale

    def row_values(self, k: Kernel, unit: Value, row: Value, first: Value, lanes: int) -> Value:
        """f32 of 4, 8 or 16 consecutive elements of one row, all within one block; `first` counts in the unit."""
        at, inside = self.at(unit, first // BLOCK), first % BLOCK
        words = [self._row_group(k, at, row, inside // 4 + i) for i in range(lanes // 4)]
        joined = Value(k, "poison", I32.x(len(words)))
        for i, word in enumerate(words):
            joined = joined.with_lane(i, word)
        codes = joined.bits_as(I8.x(lanes))
        value = k.convert(lookup(k, self.table, codes) if self.table else codes, F32, signed=False) - float(self.centre)
        size, n = self.fields[0][0], inside // self.per_factor
        scale, least = (k.splat(self._head(k, unit + row * size + h * ROWS * size, 1)[0], lanes) for h in (0, self.has_min))
        if self.factors:
            byte = k.load(at + n * ROWS + row, I8)
            factor = k.convert(byte & 15 if self.factors == "nibbles" else byte, F32, signed=self.factors == "i8")
            value = value * k.splat(factor, lanes)
            if self.has_min:
                other = byte.shift_right(4) if self.factors == "nibbles" else k.load(at + (n + self.n_factors) * ROWS + row, I8)
                least = -(least * k.splat(k.convert(other, F32, signed=False), lanes))
        return k.fma(value, scale, least) if self.has_min else value * scale

    def _row_group(self, k: Kernel, at: Value, row: Value, g: Value) -> Value:
        """The codes of a row's group, a byte each, as i32."""
        code = k.const(0, I32)
        for start, bits, to in self._planes():
            word = k.load(at + (g % bits * ROWS + row) * 4 + start, I32)
            mask = ((1 << bits) - 1) * 0x01010101
            moved = word.shift_right(k.convert(g // bits * bits, I32)) & (mask if mask < 1 << 31 else mask - (1 << 32))
            code = code | (moved << to if to else moved)
        return code


def _moved(word: Value, start: int, bits: int, to: int) -> Value:
    """Of each byte some bits, from one place to another."""
    mask = ((1 << bits) - 1) << to
    wide = I16.x(word.lanes // 2)
    if start > to:
        word = word.bits_as(wide).shift_right(start - to).bits_as(word.type)
    elif start < to:
        word = (word.bits_as(wide) << (to - start)).bits_as(word.type)
    return word & mask if bits < 8 else word


_SHUFFLES = {64: ("avx512", "llvm.x86.avx512.pshuf.b.512"), 32: ("avx2", "llvm.x86.avx2.pshuf.b")}


def lookup(k: Kernel, table: Sequence[int], codes: Value) -> Value:
    """Bytes of a table of at most 16, by number."""
    padded = [n - 256 if n > 127 else n for n in (*table, *(0,) * (16 - len(table)))]
    feature, name = _SHUFFLES.get(codes.lanes, ("", ""))
    if feature and feature in k.target.has:
        return k.call(name, codes.type, k.vector(padded * (codes.lanes // 16), I8), codes)
    found = k.const(padded[0], codes.type)
    for n, value in enumerate(table[1:], 1):
        found = k.select(codes.eq(n), k.const(padded[n], codes.type), found)
        assert value < 256
    return found
