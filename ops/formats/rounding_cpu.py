"""Rounding to the types of one scale for a block, or for 16 numbers: the values, kept as f32, to the bit as `encode` and `decode`
give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import F32, I32, I64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Row
from tensorgraph.ops.formats.searches import TINY
from tensorgraph.ops.formats.tabled import FP4, FP4_MIDPOINTS, IQ4, IQ4_MIDPOINTS

_A_NAN = 0x7F800001  # its bits, as all NaN are compared
PART = 32  # elements of a block that are held at once


@dataclass(frozen=True)
class Block:
    """A block of `size` elements of x from `first` on, and where its values go."""

    k: Kernel
    x: Row
    y: Row
    first: Value
    size: int

    def load(self, i: Value | int = 0, lanes: int = PART) -> Value:
        return self.k.convert(self.x.load(self.first + i, lanes), F32)

    def store(self, values: Value, i: Value | int = 0) -> None:
        self.y.store(self.first + i, values)

    def each_part(self, value: Callable[[Value], Value]) -> None:
        """Every part becomes a value of it."""
        with self.k.loop(0, self.size, PART) as loop:
            self.store(value(self.load(loop.i)), loop.i)
            loop.next()

    def largest(self) -> Value:
        """The largest magnitude."""
        k = self.k
        with k.loop(0, self.size, PART, [k.zero(F32.x(PART))]) as loop:
            loop.next(k.max(loop.values[0], k.unary("fabs", self.load(loop.i))))
        return k.fold(loop.results[0], k.max)


def stored_scale(k: Kernel, scale: Value, lanes: int = PART) -> Value:
    """A scale as f16 keeps it, in every lane."""
    return k.splat(k.half_to_f32(k.f32_to_half(scale)), lanes)


def times_reciprocal(k: Kernel, values: Value, scale: Value) -> Value:
    """Divided by a scale through 1 / scale, which counts as 0 where it is not finite."""
    inverse = 1.0 / scale
    inverse = k.select(k.unary("fabs", inverse).lt(math.inf), inverse, 0.0)
    return values * k.splat(inverse, values.lanes)


def nearest(k: Kernel, q: Value) -> Value:
    """The nearest whole numbers, halves away from zero."""
    whole = k.unary("trunc", q)
    return whole + k.unary("trunc", (q - whole) * 2.0)


def extreme(k: Kernel, x: Value) -> Value:
    """The value of largest magnitude, the first of those; NaN is larger than all."""
    size = k.min(k.unary("fabs", x).bits_as(I32.x(x.lanes)), _A_NAN)
    places = k.select(size.eq(k.fold(size, k.max)), k.lane_numbers(x.lanes), x.lanes - 1)
    return x[k.convert(k.fold(places, k.min), I64)]


def unless_tiny(k: Kernel, scale: Value, most: Value) -> Value:
    """0 where nothing is as large as TINY."""
    return k.select(k.unary("fabs", most).lt(float(TINY)), 0.0, scale)


def _in_order(k: Kernel, x: Value) -> Value:
    """The sum of all lanes, one after another."""
    total = x[0]
    for i in range(1, x.lanes):
        total = total + x[i]
    return total


# Codes times a scale.


def round_whole(block: Block, centre: float) -> None:
    """Signed codes, `centre` for the largest magnitude."""
    k = block.k
    scale = block.largest() / centre
    block.each_part(lambda x: nearest(k, times_reciprocal(k, x, scale)) * stored_scale(k, scale))


def round_signs(block: Block) -> None:
    k = block.k
    with k.loop(0, block.size, PART, [k.const(0.0, F32)]) as loop:
        total = loop.values[0]
        sizes = k.unary("fabs", block.load(loop.i))
        for i in range(PART):
            total = total + sizes[i]
        loop.next(total)
    scale = stored_scale(k, loop.results[0] / float(block.size))
    block.each_part(lambda x: k.select(x.ge(0.0), scale, -scale))


def round_centred(block: Block, bits: int) -> None:
    """The value of largest magnitude becomes code 0, the lowest."""
    k, x, centre = block.k, block.load(), 1 << (bits - 1)
    scale = extreme(k, x) / -float(centre)
    code = _code(k, times_reciprocal(k, x, scale) + (centre + 0.5), bits)
    block.store((code - float(centre)) * stored_scale(k, scale))


def round_from_minimum(block: Block, bits: int) -> None:
    k, x = block.k, block.load()
    start = k.fold(x, k.min)
    scale = (k.fold(x, k.max) - start) / float((1 << bits) - 1)
    code = _code(k, times_reciprocal(k, x - k.splat(start, PART), scale) + 0.5, bits)
    block.store(code * stored_scale(k, scale) + stored_scale(k, start))


def _code(k: Kernel, q: Value, bits: int) -> Value:
    """A number that is not negative, cut to a code."""
    return k.unary("trunc", k.min(q, float((1 << bits) - 1)))


# Codes that index a table.


def entry(k: Kernel, q: Value, table: Sequence[float], above: Callable[[int], Value]) -> Value:
    """The entry behind as many midpoints as `above` says q lies above."""
    found = k.const(table[0], q.type)
    for i in range(len(table) - 1):
        found = found + k.select(above(i), k.const(table[i + 1] - table[i], q.type), 0.0)
    return found


def _fp4(k: Kernel, x: Value, half: Value) -> Value:
    """The nearest of FP4 times half a scale; of two the smaller magnitude."""
    half = k.splat(half, x.lanes)
    q = k.unary("fabs", x) / k.select(half.gt(0.0), half, math.inf)
    size = entry(k, q, FP4[:8].tolist(), lambda i: q.gt(float(FP4_MIDPOINTS[i])))
    return k.select(x.lt(0.0), 0.0 - size, size) * half


def round_mxfp4(block: Block) -> None:
    k, x = block.k, block.load()
    exponent = k.max((k.fold(k.unary("fabs", x), k.max).bits_as(I32) >> 23) - 2, 0)
    subnormal = k.const(1 << 21, I32) << k.min(exponent, 1)
    block.store(_fp4(k, x, k.select(exponent.lt(2), subnormal, (exponent - 1) << 23).bits_as(F32)))


def round_nvfp4(block: Block) -> None:
    k, lanes = block.k, 16
    with k.loop(0, block.size, lanes) as loop:
        x = block.load(loop.i, lanes)
        wanted = k.fold(k.unary("fabs", x), k.max) / 6.0
        rounded = ((wanted.bits_as(I32) + (1 << 19)) & -(1 << 20)).bits_as(F32)
        rounded = k.select(rounded.lt(256.0), rounded, 448.0)
        few = k.min(k.unary("floor", wanted * 512.0 + 0.5), 7.0) * 2.0**-9
        block.store(_fp4(k, x, k.select(wanted.lt(2.0**-6), few, rounded) * 0.5), loop.i)
        loop.next()


def round_iq4_nl(block: Block) -> None:
    k, x = block.k, block.load()
    most = extreme(k, x)
    q = times_reciprocal(k, x, most / float(IQ4[0]))
    values = entry(k, q, IQ4.tolist(), lambda i: q.ge(float(IQ4_MIDPOINTS[i])))
    weighted = x * x * values
    scale = _in_order(k, weighted * x) / _in_order(k, weighted * values)
    block.store(values * stored_scale(k, unless_tiny(k, scale, most)))
