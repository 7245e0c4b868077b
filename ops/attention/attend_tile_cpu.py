"""Attention of several heads over a tile of rows on the CPU: scores, one step of the running soft-max, weighed sums.

All that outlives a tile lies in scratch, in f32: of each head its query, maximum, sum of weights and sum of weighed values. A
row is loaded once for several heads, and several rows are scored at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.functions import exp, tanh
from tensorgraph.backends.cpu.ir import F32, I8, I64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Row, read_value, stored_type
from tensorgraph.backends.cpu.state_calls import widen_blocks
from tensorgraph.dtypes import DType

TILE = 64
"""Rows scored at once."""


def whole_vectors(n: int) -> int:
    """n rounded up to what is a whole number of vectors on every target."""
    return -(-n // 16) * 16


@dataclass(frozen=True)
class Rows:
    """The rows of a tile, as keys or as values: read where they lie, or from a copy in f32 whose rows are padded with zeros.

    Attributes:
        dtype: as they lie: a block type means blocks.
        listed: addresses of the rows, i64 [TILE + 8].
        copy: f32 [TILE, stride]; None where rows are read in place.
    """

    k: Kernel
    dtype: DType
    listed: Value
    copy: Value | None
    stride: int

    def address(self, r: Value) -> Value:
        """Where row r begins. Those read in place must be listed, up to a whole number of rows scored at once."""
        if self.copy is not None:
            return self.copy + r * (self.stride * 4)
        return self.k.convert_pointer(self.k.load(self.listed + r * 8, I64))

    def load(self, address: Value, i: Int, lanes: int) -> Value:
        """Elements i, i + 1, ... of the row there, in f32."""
        k, stored = self.k, F32 if self.copy is not None else stored_type(self.dtype)
        raw = k.load(address + k.i64(i) * stored.size_bytes, stored.x(lanes))
        return raw if self.copy is not None else read_value(k, raw, self.dtype)

    def fill(self, n: Value, width: Int, element_stride: Int) -> None:
        """Copy the listed rows, of so many elements; of rows read in place, list the last one some more times."""
        k = self.k
        if self.copy is None:
            last = k.load(self.listed + (n - 1) * 8, I64)
            for j in range(8):
                k.store(last, self.listed + (n + j) * 8)
            return
        with k.loop(0, n) as loop:
            loop.next()
            address = k.convert_pointer(k.load(self.listed + loop.i * 8, I64))
            to = self.copy + loop.i * (self.stride * 4)
            if self.dtype.is_block:
                widen_blocks(k, self.dtype, address, to, width)
            else:
                copy_padded(k, Row(k, self.dtype, address, element_stride), to, width)


def copy_padded(k: Kernel, source: Row, to: Value, width: Int) -> None:
    """A row in f32, padded with zeros to a whole number of vectors."""

    def body(i: Value, mask: Value | None, _: list[Value]) -> None:
        k.store(k.convert(source.load(i, k.lanes, mask), F32), to + i * 4)

    k.sweep(width, body)


@dataclass(frozen=True)
class Logits:
    """What makes logits of scores.

    Attributes:
        added: what the mask adds, f32 [1 or heads, TILE]; `added_stride` is 0 or TILE.
        seen: of each row, i8 [TILE], a bit for each token that sees it; each has so many heads, one token's after another's.
    """

    scale: float
    softcap: float
    added: Value | None
    added_stride: int
    seen: Value | None
    n_heads: int

    def of(self, k: Kernel, scores: Value, head: Value, row: Value) -> Value:
        """Those of rows from `row` on, for one head."""
        s, lanes = scores * self.scale, scores.lanes
        if self.softcap:
            s = tanh(k, s / self.softcap) * self.softcap
        if self.added is not None:
            s = s + k.load(self.added + (head * self.added_stride + row) * 4, F32.x(lanes))
        if self.seen is not None:
            bit = k.const(1, I8) << k.convert(head // self.n_heads, I8)
            s = k.select((k.load(self.seen + row, I8.x(lanes)) & k.splat(bit, lanes)).ne(0), s, -math.inf)
        return s


@dataclass(frozen=True)
class Heads:
    """What a chunk keeps in scratch of `count` query heads.

    Attributes:
        together: heads that share a load; it divides `count`.
        queries: f32 [count, query_stride]; `query_width` is a whole number of vectors.
        sums: of weighed values, f32 [count, value_stride]; `value_width` likewise.
        scores: f32 [count, TILE]; the weights, once `weigh` has run.
        tops, totals, factors: f32 [count]; maxima and sums of weights so far, and what older sums are to be multiplied by.
    """

    k: Kernel
    count: int
    together: int
    query_width: Int
    query_stride: int
    value_width: Int
    value_stride: int
    queries: Value
    sums: Value
    scores: Value
    tops: Value
    totals: Value
    factors: Value

    @property
    def sums_at_once(self) -> int:
        """Vectors of sums that registers hold, beside what is added to them."""
        return 16 if self.k.lanes == 16 or "neon" in self.k.target.has else 8

    def score(self, keys: Rows, n: Value) -> None:
        """q . k for the n rows of a tile, and up to 7 more."""
        k, lanes = self.k, self.k.lanes
        n_rows = min(8, lanes, self.sums_at_once // self.together)
        with k.loop(0, self.count, self.together) as heads, k.loop(0, n, n_rows) as rows:
            heads.next()
            rows.next()
            addresses = [keys.address(rows.i + j) for j in range(n_rows)]
            queries = [self.queries + (heads.i + h) * (self.query_stride * 4) for h in range(self.together)]
            with k.loop(0, self.query_width, lanes, [k.zero(F32.x(lanes))] * (n_rows * self.together)) as loop:
                loaded = [keys.load(address, loop.i, lanes) for address in addresses]
                following = []
                for h, query in enumerate(queries):
                    factor = k.load(query + loop.i * 4, F32.x(lanes))
                    following += [k.fma(row, factor, loop.values[h * n_rows + j]) for j, row in enumerate(loaded)]
                loop.next(*following)
            for first in range(0, len(loop.results), lanes):
                dots = lane_sums(k, loop.results[first : first + lanes])
                for at in range(0, dots.lanes, n_rows):
                    h = (first + at) // n_rows
                    to = self.scores + ((heads.i + h) * TILE + rows.i) * 4
                    k.store(dots.shuffle(range(at, at + n_rows)), to)

    def weights(self, n: Value, logits: Logits) -> None:
        """Scores of n rows to weights, which lower the sums so far by `factors`."""
        k, lanes = self.k, self.k.lanes
        low = k.const(-math.inf, F32.x(lanes))
        with k.loop(0, self.count) as heads:
            heads.next()
            at = self.scores + heads.i * (TILE * 4)
            with k.loop(0, n, lanes, [low]) as rows:
                s = logits.of(k, k.load(at + rows.i * 4, F32.x(lanes)), heads.i, rows.i)
                s = k.select(k.tail_mask(lanes, n - rows.i), s, low)
                k.store(s, at + rows.i * 4)
                rows.next(k.max(rows.values[0], s))
            before = k.load(self.tops + heads.i * 4, F32)
            top = k.max(before, k.fold(rows.results[0], k.max))
            shift = k.select(top.eq(-math.inf), 0.0, top)
            factor = exp(k, before - shift)
            shifts = k.splat(shift, lanes)
            with k.loop(0, n, lanes, [k.zero(F32.x(lanes))]) as rows:
                weight = exp(k, k.load(at + rows.i * 4, F32.x(lanes)) - shifts)
                k.store(weight, at + rows.i * 4)
                rows.next(rows.values[0] + weight)
            total = k.fma(k.load(self.totals + heads.i * 4, F32), factor, k.sum(rows.results[0]))
            for place, value in ((self.tops, top), (self.totals, total), (self.factors, factor)):
                k.store(value, place + heads.i * 4)

    def weigh(self, values: Rows, n: Value) -> None:
        """Add the weighed values of n rows to the sums."""
        k, lanes = self.k, self.k.lanes
        wide = min(8, self.sums_at_once // self.together) * lanes
        with k.loop(0, self.count, self.together) as heads:
            heads.next()
            if not isinstance(self.value_width, int):
                self._weigh_channels(values, n, heads.i, 0, self.value_width, lanes)
                return
            start = 0
            while start < self.value_width:
                width = wide
                while width > self.value_width - start:
                    width //= 2
                stop = start + (self.value_width - start) // width * width
                self._weigh_channels(values, n, heads.i, start, stop, width)
                start = stop

    def _weigh_channels(self, values: Rows, n: Value, head: Value, start: int, stop: Int, width: int) -> None:
        k = self.k
        with k.loop(start, stop, width) as channels:
            channels.next()
            places = [self.sums + ((head + h) * self.value_stride + channels.i) * 4 for h in range(self.together)]
            weights = [self.scores + (head + h) * (TILE * 4) for h in range(self.together)]
            factors = [k.load(self.factors + (head + h) * 4, F32) for h in range(self.together)]
            sums = [k.load(p, F32.x(width)) * k.splat(f, width) for p, f in zip(places, factors, strict=True)]
            with k.loop(0, n, 1, sums) as rows:
                value = values.load(values.address(rows.i), channels.i, width)
                loaded = [k.splat(k.load(weight + rows.i * 4, F32), width) for weight in weights]
                rows.next(*(k.fma(value, w, total) for w, total in zip(loaded, rows.values, strict=True)))
            for place, total in zip(places, rows.results, strict=True):
                k.store(total, place)


def lane_sums(k: Kernel, vectors: Sequence[Value]) -> Value:
    """A vector whose lane i is the sum over all lanes of the i-th vector; these are a power of two, at most their lanes.

    Two vectors at a time become one, their lanes added in pairs; shuffles stay within 16 bytes where they can.
    """
    held = [(v, [i]) for i, v in enumerate(vectors)]  # which sums the parts of a vector belong to
    size = vectors[0].lanes  # lanes of a part
    while size > 1:
        half = size // 2
        if len(held) > 1:
            held = [_joined(a, b, size) for a, b in zip(held[::2], held[1::2], strict=True)]
        else:
            value, owners = held[0]
            low = [part * size + i for part in range(len(owners)) for i in range(half)]
            held = [(value.shuffle(low) + value.shuffle([i + half for i in low]), owners)]
        size = half
    value, owners = held[0]
    return value if owners == sorted(owners) else value.shuffle([owners.index(i) for i in range(len(owners))])


def _joined(a: tuple[Value, list[int]], b: tuple[Value, list[int]], size: int) -> tuple[Value, list[int]]:
    """Two vectors of parts of `size` lanes as one whose parts have half as many."""
    (x, of_x), (y, of_y) = a, b
    together = max(4 // size, 1) if size <= 4 else len(of_x)  # parts of one vector that stand side by side
    lanes: list[int] = []
    owners: list[int] = []
    for first in range(0, len(of_x), together):
        for skip, of in ((0, of_x), (x.lanes, of_y)):
            for part in range(first, first + together):
                lanes += [skip + part * size + i for i in range(size // 2)]
                owners.append(of[part])
    return x.shuffle(lanes, y) + x.shuffle([i + size // 2 for i in lanes], y), owners
