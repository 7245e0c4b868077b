"""Rounding to the types of 256 numbers whose groups have scales of their own: a lane is a group, so that every sum runs over its
elements one after another, as in `searches`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.emit import Values
from tensorgraph.backends.cpu.ir import F32, Number, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Row, stored_type
from tensorgraph.ops.formats.rounding_cpu import Block, entry, extreme, stored_scale, unless_tiny
from tensorgraph.ops.formats.tabled import IQ4, IQ4_MIDPOINTS

Code = Callable[[Value], Value]
Try = tuple[int, int, Callable[[Value], Value]]  # steps, and an inverse for each
_TO_WHOLE = 1.5 * 2.0**23  # added to a small number, its last bit is worth 1


@dataclass(frozen=True)
class Groups:
    """A block as groups of `size` consecutive elements; a vector holds one element of each."""

    block: Block
    size: int

    @property
    def k(self) -> Kernel:
        return self.block.k

    @property
    def lanes(self) -> int:
        return self.block.size // self.size

    def const(self, value: float) -> Value:
        return self.k.const(value, F32.x(self.lanes))

    def load(self, i: Value | int) -> Value:
        return self.k.convert(self._elements(self.block.x, i).load(0, self.lanes), F32)

    def _elements(self, row: Row, i: Value | int) -> Row:
        place = (self.block.first + i) * row.stride * stored_type(row.dtype).size_bytes
        return Row(self.k, row.dtype, row.address + place, row.stride * self.size)

    def replace(self, value: Callable[[Value], Value]) -> None:
        """Every element becomes a value of it."""
        with self.k.loop(0, self.size) as loop:
            self._elements(self.block.y, loop.i).store(0, value(self.load(loop.i)))
            loop.next()

    def walk(self, carried: Values, following: Callable[[Value, list[Value]], Values]) -> list[Value]:
        """`following(x, carried)` for the elements of the groups, one after another."""
        with self.k.loop(0, self.size, 1, carried) as loop:
            loop.next(*following(self.load(loop.i), loop.values))
        return loop.results

    def sums(self, n: int, terms: Callable[[Value], Values]) -> list[Value]:
        """Of n terms of each element."""
        return self.walk([self.const(0.0)] * n, lambda x, sums: [s + t for s, t in zip(sums, terms(x), strict=True)])

    def extreme(self) -> Value:
        """The value of largest magnitude, the first of those."""

        def larger(x: Value, most: list[Value]) -> Values:
            size = self.k.unary("fabs", x)
            found = size.gt(most[1])
            return [self.k.select(found, x, most[0]), self.k.select(found, size, most[1])]

        return self.walk([self.const(0.0)] * 2, larger)[0]


def quotient(k: Kernel, a: Number, b: Value) -> Value:
    """a / b, and 0 where b is 0."""
    return k.select(b.ne(0.0), a / b, 0.0)


def whole(k: Kernel, q: Value, low: float, high: float) -> Value:
    """The nearest whole numbers, ties to even, within bounds."""
    return (k.max(k.min(q, high), low) + _TO_WHOLE) - _TO_WHOLE


def _kept(k: Kernel, q: Value, low: float, high: float, instead: float) -> Value:
    """The nearest whole numbers within bounds, as a code keeps them: NaN is a 0 in its bits, which stands for `instead`."""
    return k.select(q.is_nan(), instead, whole(k, q, low, high))


def _largest(k: Kernel, x: Value) -> Value:
    """The largest of all lanes, NaN where one is."""
    some = k.fold(k.select(x.is_nan(), k.const(1.0, x.type), 0.0), k.max)
    return k.select(some.gt(0.0), math.nan, k.fold(x, k.max))


def _tenths(k: Kernel, step: Value, start: float) -> Value:
    """start + 0.1 * step, each rounded to f32."""
    return k.convert(step, F32) * k.const(0.1, F32) + start


# Scales, as the functions of these names in `searches` find them.


def _best_scale(
    groups: Groups, most: Value, tries: Sequence[Try], found: Code, product: Callable[[Value, Value], Value]
) -> Value:
    """Of those whose inverses are said for some steps; `product(x, found(q))` is what the error is lessened by."""
    k, best = groups.k, [groups.const(0.0)] * 2
    for first, last, inverse in tries:
        with k.loop(first, last, 1, best) as loop:
            (scale, least), by = loop.values, inverse(loop.i)

            def terms(x: Value, by: Value = by) -> Values:
                value = found(x * by)
                return [product(x, value), x * x * value * value]

            products, squares = groups.sums(2, terms)
            better = squares.gt(0.0) & (products * products).gt(least * squares)
            scale = k.select(better, quotient(k, products, squares), scale)
            loop.next(scale, k.select(better, scale * products, least))
        best = loop.results
    return unless_tiny(k, best[0], most)


def centred_scale(groups: Groups, half: int) -> Value:
    k, most = groups.k, groups.extreme()

    def inverse(step: Value) -> Value:
        return quotient(k, k.splat(-_tenths(k, step, float(half)), groups.lanes), most)

    tries = [(first, last, inverse) for first, last in ((0, 1), (-9, 0), (1, 10))]
    return _best_scale(groups, most, tries, lambda q: whole(k, q, -half, half - 1), lambda x, code: x * x * x * code)


def _table_scale(groups: Groups, found: Code, first: float) -> Value:
    k, most = groups.k, groups.extreme()

    def inverse(step: Value) -> Value:
        return quotient(k, k.splat(k.convert(step, F32) + first, groups.lanes), most)

    tries: list[Try] = [(0, 1, lambda step: quotient(k, 1.0, most / -first)), (-7, 8, inverse)]
    return _best_scale(groups, most, tries, found, lambda x, value: x * x * value * x)


def descended_scale(groups: Groups, half: int) -> Value:
    k, most = groups.k, groups.extreme()
    x = [groups.load(i) for i in range(groups.size)]
    codes = [whole(k, v * quotient(k, groups.const(-half), most), -half, half - 1) for v in x]
    sums = [groups.const(0.0)] * 2
    for v, code in zip(x, codes, strict=True):
        sums = [sums[0] + v * v * v * code, sums[1] + v * v * code * code]
    with k.loop(0, 5, 1, [*sums, *codes]) as loop:
        products, squares, *codes = loop.values
        for i, v in enumerate(x):
            code, weight = codes[i], v * v
            rest, rest_squares = products - weight * v * code, squares - weight * code * code
            moved = whole(k, quotient(k, v * rest_squares, rest), -half, half - 1)
            new, new_squares = rest + weight * v * moved, rest_squares + weight * moved * moved
            better = rest.gt(0.0) & moved.ne(code) & new_squares.gt(0.0)
            better = better & (new * new * squares).gt(products * products * new_squares)
            pairs = ((moved, code), (new, products), (new_squares, squares))
            codes[i], products, squares = (k.select(better, *pair) for pair in pairs)
        loop.next(products, squares, *codes)
    return unless_tiny(k, quotient(k, loop.results[0], loop.results[1]), most)


def _affine_scale(
    groups: Groups, weight: Callable[[Value], Value], top: int, first: float, steps: int, absolute: bool
) -> tuple[Value, Value]:
    k = groups.k

    def gather(x: Value, found: list[Value]) -> Values:
        low, high, total, total_x = found
        return [k.min(low, x), k.max(high, x), total + weight(x), total_x + weight(x) * x]

    zeros, start = groups.const(0.0), groups.load(0)
    low, high, total, total_x = groups.walk([k.min(zeros, start), start, zeros, zeros], gather)

    def error(start: Value, inverse: Value, new_scale: Value, new_start: Value) -> Value:
        def term(x: Value) -> Values:
            difference = new_scale * whole(k, (x - start) * inverse, 0, top) + new_start - x
            return [weight(x) * (k.unary("fabs", difference) if absolute else difference * difference)]

        return groups.sums(1, term)[0]

    inverse = quotient(k, groups.const(top), high - low)
    scale = quotient(k, 1.0, inverse)
    with k.loop(0, steps + 1, 1, [scale, low, error(low, inverse, scale, low)]) as loop:
        scale, start, least = loop.values
        ends = k.splat(_tenths(k, loop.i, first) + float(top), groups.lanes)
        inverse = quotient(k, ends, high - start)

        def terms(x: Value, start: Value = start, inverse: Value = inverse) -> Values:
            code = whole(k, (x - start) * inverse, 0, top)
            weighted = weight(x) * code
            return [weighted, weighted * code, weighted * x]

        sums, squares, products = groups.sums(3, terms)
        determinant = total * squares - sums * sums
        new_scale = quotient(k, total * products - total_x * sums, determinant)
        new_start = quotient(k, squares * total_x - sums * products, determinant)
        new_scale = k.select(new_start.gt(0.0), quotient(k, products, squares), new_scale)
        new_start = k.min(new_start, 0.0)
        found = error(start, inverse, new_scale, new_start)
        better = determinant.gt(0.0) & found.lt(least)
        loop.next(*(k.select(better, *pair) for pair in ((new_scale, scale), (new_start, start), (found, least))))
    scale, start, _ = loop.results
    return k.select(low.eq(high), 0.0, scale), 0.0 - start


# Types.


def round_centred(block: Block, bits: int, scale_bits: int, search: Callable[[Groups, int], Value]) -> None:
    k, groups, half, top = block.k, Groups(block, 16), 1 << (bits - 1), 1 << (scale_bits - 1)
    scales = search(groups, half)
    inverse = quotient(k, k.const(-top, F32), extreme(k, scales))
    stored = _kept(k, scales * k.splat(inverse, groups.lanes), -top, top - 1, 0.0)
    scale = stored * stored_scale(k, quotient(k, 1.0, inverse), groups.lanes)
    groups.replace(lambda x: _kept(k, quotient(k, x, scale), -half, half - 1, -half) * scale)


def round_affine(block: Block, size: int, bits: int, scale_bits: int, first: float, steps: int) -> None:
    k, groups, top = block.k, Groups(block, size), (1 << scale_bits) - 1
    if bits == 2:
        found = _affine_scale(groups, lambda x: k.unary("fabs", x), 3, first, steps, True)
    else:
        (squares,) = groups.sums(1, lambda x: [x * x])
        size_of = k.unary("sqrt", squares / float(size))
        found = _affine_scale(groups, lambda x: size_of + k.unary("fabs", x), (1 << bits) - 1, first, steps, False)
    scaled = []
    for each in found:
        most = _largest(k, each)
        stored = _kept(k, each * k.splat(quotient(k, k.const(top, F32), most), groups.lanes), 0, top, 0.0)
        scaled.append(stored * stored_scale(k, most / float(top), groups.lanes))
    scale, minimum = scaled
    groups.replace(lambda x: _kept(k, quotient(k, x + minimum, scale), 0, (1 << bits) - 1, 0.0) * scale - minimum)


def round_iq4_xs(block: Block) -> None:
    k, groups = block.k, Groups(block, 32)

    def value(q: Value) -> Value:
        return entry(k, q, IQ4.tolist(), lambda i: q.lt(float(IQ4_MIDPOINTS[i])).invert())  # NaN is above all

    scales = _table_scale(groups, value, float(IQ4[0]))
    d = extreme(k, scales) / -32.0
    wanted = scales * k.splat(quotient(k, 1.0, d), groups.lanes)
    inverse = quotient(k, 1.0, whole(k, wanted, -32, 31) * k.splat(d, groups.lanes))
    scale = _kept(k, wanted, -32, 31, -32.0) * stored_scale(k, d, groups.lanes)
    groups.replace(lambda x: value(x * inverse) * scale)
