"""Rounding to the types whose codes are numbers of vectors of a grid: the values, as `grid_searches` finds them. A lane of the
search is a vector of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensorgraph.backends.cpu.ir import F32, I8, I32, I64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.ops.formats.grid_searches import CODINGS, FARTHEST, PARTS, Coding
from tensorgraph.ops.formats.grids import grid
from tensorgraph.ops.formats.rounding_cpu import Block, stored_scale
from tensorgraph.ops.formats.searches import TINY
from tensorgraph.ops.formats.searches_cpu import quotient, whole

_EIGHT = 8
_LEAST = -(2.0**30)  # below every gain


@dataclass(frozen=True)
class _Grid:
    """A grid as constants, `k.lanes` vectors side by side.

    Attributes:
        size, turns: elements of a vector, and how often so many vectors are read.
        elements: i8, in each turn the first elements of all its vectors, then the second ones, ...
        losses: i32, in each turn for each shift what each vector lessens the error less for its length.
    """

    k: Kernel
    coding: Coding
    size: int
    turns: int
    elements: Value
    losses: Value

    @classmethod
    def of(cls, k: Kernel, coding: Coding) -> _Grid:
        vectors = grid(coding.grid)
        lanes, size = k.lanes, vectors.shape[1]
        losses = np.stack([PARTS // 2 * (shifted.astype(np.int64) ** 2).sum(axis=1) for shifted in coding.vectors])
        elements = vectors.reshape(-1, lanes, size).transpose(0, 2, 1)
        by_turn = losses.reshape(len(losses), -1, lanes).transpose(1, 0, 2)
        tables = k.table(elements.ravel().tolist(), I8), k.table(by_turn.ravel().tolist(), I32)
        return cls(k, coding, size, len(vectors) // lanes, *tables)

    def nearest(self, x: Sequence[Value]) -> list[tuple[Value, Value]]:
        """For each shift the number of the nearest vector, the first of those, and by how much it lessens the error."""
        k, lanes, n = self.k, self.k.lanes, len(self.coding.shifts)
        wide = [k.splat(v, lanes) for v in x]
        start = [k.const(_LEAST, F32.x(lanes))] * n + [k.const(0, I32.x(lanes))] * n
        with k.loop(0, self.turns, 1, start) as loop:
            at, losses = self.elements + loop.i * (self.size * lanes), self.losses + loop.i * (4 * n * lanes)
            product = k.const(0.0, F32.x(lanes))
            for i, v in enumerate(wide):
                product = k.fma(v, k.convert(k.load(at + i * lanes, I8.x(lanes)), F32), product)
            gains, turns = loop.values[:n], loop.values[n:]
            for i in range(n):
                gain = product - k.convert(k.load(losses + 4 * i * lanes, I32.x(lanes)), F32)
                better = gain.gt(gains[i])
                gains[i] = k.select(better, gain, gains[i])
                turns[i] = k.select(better, k.splat(k.narrow(loop.i, I32), lanes), turns[i])
            loop.next(*gains, *turns)
        total = sum(x[1:], x[0])
        found = []
        for gain, turn, shift in zip(loop.results[:n], loop.results[n:], self.coding.shifts, strict=True):
            most = k.fold(gain, k.max)
            numbers = k.select(gain.eq(most), turn * lanes + k.lane_numbers(lanes), self.turns * lanes - 1)
            number = k.convert(k.fold(numbers, k.min), I64)
            found.append((number, most + total * float(shift) if self.coding.shared else most))
        return found

    def vector(self, number: Value) -> Value:
        """The vector with a number, in f32."""
        k, lanes = self.k, self.k.lanes
        first = self.elements + number // lanes * (self.size * lanes) + number % lanes
        return k.convert(k.gather(first, k.lane_numbers(self.size, I64) * lanes, I8.x(self.size)), F32)


def _with_signs(of: _Grid, x: Value) -> Value:
    """The nearest of what eight numbers can be."""
    k = of.k
    negative, sizes = x.lt(0.0), k.unary("fabs", x)
    if of.coding.even:
        odd = (k.fold(k.convert(negative, I32, signed=False), lambda a, b: a + b) & 1).ne(0)
        numbers = k.lane_numbers(_EIGHT)
        smallest = k.fold(k.select(sizes.eq(k.fold(sizes, k.min)), numbers, _EIGHT - 1), k.min)
        changed = numbers.eq(smallest) & k.splat(odd, _EIGHT)
        sizes, negative = k.select(changed, -sizes, sizes), negative ^ changed
    parts = []
    for start in range(0, _EIGHT, of.size):
        ((number, _),) = of.nearest([sizes[start + i] for i in range(of.size)])
        parts.append(of.vector(number))
    values = parts[0] if len(parts) == 1 else k.join(*parts)
    return k.select(negative, -values, values)


def _shifted(of: _Grid, parts: Sequence[Value]) -> list[Value]:
    """The nearest of what numbers that are shifted together can be, by eights."""
    k = of.k
    found = [of.nearest([x[i] for i in range(of.size)]) for x in parts]
    more, less = (sum((each[i][1] for each in found[1:]), found[0][i][1]) for i in range(2))
    down = less.gt(more)
    shift = k.select(down, k.const(of.coding.shifts[1], F32), float(of.coding.shifts[0]))
    return [of.vector(k.select(down, lower, upper)) + k.splat(shift, of.size) for (upper, _), (lower, _) in found]


def _nearest(of: _Grid, parts: Sequence[Value]) -> list[Value]:
    return _shifted(of, parts) if of.coding.shared else [_with_signs(of, x) for x in parts]


def round_to_grid(block: Block, name: str) -> None:
    k, coding = block.k, CODINGS[name]
    of, size, unit = _Grid.of(k, coding), coding.group, max(coding.shared, _EIGHT)
    count = block.size // size
    tries = [k.table(numbers, F32) for numbers in zip(*coding.tries, strict=True)]

    def rounded(first: Value, inverse: Value) -> list[Value]:
        places = (first + start for start in range(0, unit, _EIGHT))
        return [whole(k, block.load(at, _EIGHT) * k.splat(inverse, _EIGHT), -FARTHEST, FARTHEST) for at in places]

    with k.loop(0, count, 1, [k.zero(F32.x(count))]) as loop:
        start = loop.i * size
        top = k.fold(k.unary("fabs", block.load(start, size)), k.max)
        top = k.select(top.lt(float(TINY)), 0.0, top)
        with k.loop(0, len(coding.tries), 1, [k.const(0.0, F32)] * 2) as attempt:
            end, per_unit, per_square = (k.load(table + attempt.i * 4, F32) for table in tries)
            inverse = quotient(k, end, top)
            with k.loop(0, size, unit, [k.zero(F32.x(_EIGHT))] * 2) as part:
                products, squares = part.values
                x = rounded(start + part.i, inverse)
                for q, values in zip(x, _nearest(of, x), strict=True):
                    products, squares = products + q * values, squares + values * values
                part.next(products, squares)
            product, square = (k.sum(each) for each in part.results)
            fit = quotient(k, product, square)
            gain = product * fit * per_square
            better = product.gt(0.0) & gain.gt(attempt.values[1])
            pairs = (fit * (top * per_unit), attempt.values[0]), (gain, attempt.values[1])
            attempt.next(*(k.select(better, *pair) for pair in pairs))
        loop.next(loop.values[0].with_lane(loop.i, attempt.results[0]))
    (scales,) = loop.results
    head = k.fold(scales, k.max) / (coding.step * (2 * coding.scales - 1))
    scale = stored_scale(k, head, count) * coding.step
    stored = whole(k, (scales * quotient(k, 1.0, scale) - 1.0) * 0.5, 0, coding.scales - 1)
    scale = scale * (stored * 2.0 + 1.0)
    inverses = quotient(k, float(PARTS), scale)
    with k.loop(0, count) as loop:
        with k.loop(0, size, unit) as part:
            first = loop.i * size + part.i
            for i, values in enumerate(_nearest(of, rounded(first, inverses[loop.i]))):
                block.store(values * k.splat(scale[loop.i], _EIGHT), first + i * _EIGHT)
            part.next()
        loop.next()
