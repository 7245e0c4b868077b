"""Attention over streams for few tokens: rows are divided, and each slice of them leaves a partial result.

One piece of work is a token, a slice of rows and some kv heads, whose query heads share what is loaded. Pages are gone through
one after another, in each of them one head after another, so that memory is read in order. Of few rows each piece takes one head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tensorgraph.backends.cpu.functions import exp2_nonpositive
from tensorgraph.backends.cpu.ir import F32, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel, lay_out
from tensorgraph.dtypes import DType, f32
from tensorgraph.ops.attention.paged_cpu import (
    HEAD,
    Heads,
    Operands,
    evenly,
    logits_of,
    seen_rows,
    segments,
    token_of,
)
from tensorgraph.ops.attention.stored_rows_cpu import LINE, Finder, L, copy_keys, dot, queries_at_once, value_elements

SLICE = 128
"""Rows of a slice."""
AHEAD_BYTES = 4096
"""So far ahead of what is read, memory is asked for."""
PART_BYTES = 1 << 16
"""So much of a page's keys a piece of work takes, where there are kv heads enough."""
FEW_SLICES = 3
"""Up to so many, each piece takes one kv head: there would be too few pieces for several threads."""


def slices_of(n_rows: Any) -> Any:
    """How many slices hold the rows that one token sees of a segment, at most."""
    return (n_rows + (SLICE + L - 2)) // SLICE


def kv_heads_at_once(h: Heads, dtype: DType) -> int:
    """How many kv heads one piece of work takes, at most: a divisor of their number."""
    each = dtype.size_bytes(h.d_k) * L
    return next(n for n in range(1, h.n_kv + 1) if h.n_kv % n == 0 and (n * each >= PART_BYTES or n == h.n_kv))


def _rooms(h: Heads, n_kv: int) -> dict[str, int]:
    """What a thread's scratch holds, and its bytes."""
    n = n_kv * h.group
    return {
        "weights": n * SLICE * 4,
        "sums": n * h.d_v * 4,
        "panel": max(h.d_k, L) * L * 4,
        **dict.fromkeys(("tops", "totals"), n * L * 4),
    }


def slice_scratch(h: Heads, n_kv: int) -> int:
    """Bytes that a thread needs."""
    return lay_out(_rooms(h, n_kv))[1]


def emit_slices(k: Kernel, operands: Operands, *, heads: Heads, n_kv: int) -> None:
    """Partial results: `part` [T, Hkv, slices, G, HEAD + Dv]; a piece takes `n_kv` kv heads, or one."""
    h, q, part, slices = heads, *(operands[name] for name in ("q", "part", "slices"))
    assert q is not None and part is not None and slices is not None
    n_slices, scratch = slices.shape[0], k.scratch()
    at = {name: scratch + offset for name, offset in lay_out(_rooms(h, n_kv))[0].items()}
    several = k.i64(n_slices).gt(FEW_SLICES)
    count = k.select(several, k.i64(n_kv), k.i64(1))
    with k.rows((q.shape[0], n_slices, h.n_kv)) as (t, slice_number, head), k.when((head % count).eq(0)):
        seq, pos = token_of(k, operands, t)
        to = part.address + ((t * h.n_kv + head) * n_slices + slice_number) * (h.group * h.partial * 4)
        stride = k.i64(n_slices) * (h.group * h.partial * 4)
        number = slice_number
        for keys, values, rule in segments(operands, h):
            assert keys.table is not None
            mine = slices_of(keys.shape[0])
            with k.when(number.below(mine)):
                seen = seen_rows(k, keys.table, seq, pos, rule)
                start = seen.lo // L * L + number * SLICE
                some = start.lt(seen.hi)
                with k.when(some):
                    finders = [
                        Finder.of(k, stream, h.n_kv, width, seq, seen.hi) for stream, width in ((keys, h.d_k), (values, h.d_v))
                    ]
                    first, stop = k.max(seen.lo - start, 0), k.min(seen.hi - start, k.i64(SLICE))
                    own = Slice(
                        k, h, count, (keys.dtype, values.dtype), (finders[0], finders[1]), head, at, start // L, first, stop
                    )
                    own.score(q.at([t, head * h.group]))
                    own.add()
                    own.write(to, stride)
                with k.when(some.invert()), k.loop(0, count) as each, k.loop(0, h.group) as g:
                    each.next()
                    g.next()
                    place = to + (each.i * stride + g.i * (h.partial * 4))
                    k.store(k.const(float("-inf"), F32), place)
                    k.store(k.const(0.0, F32), place + 4)
            number = number - mine


@dataclass(frozen=True)
class Slice:
    """Rows first..stop-1 of a slice, for the query heads of some kv heads.

    Attributes:
        n_kv: kv heads, from `head` on.
        dtypes, finders: of keys, of values.
        at: where things lie in scratch, n being the query heads: `weights` f32 [n, SLICE], first logits; `tops` and `totals`
            f32 [n, L], the maxima of logits and the sums of weights, lane by lane; `sums` of weighed values f32 [n, Dv];
            `panel` f32 [Dk, L], a page's keys where they are wanted more than once.
        begin: the page that the slice begins with.
    """

    k: Kernel
    h: Heads
    n_kv: Value
    dtypes: tuple[DType, DType]
    finders: tuple[Finder, Finder]
    head: Value
    at: Mapping[str, Value]
    begin: Value
    first: Value
    stop: Value

    @property
    def n_pages(self) -> Value:
        return (self.stop + (L - 1)) // L

    @property
    def together(self) -> int:
        """Query heads that share a load."""
        return evenly(self.h.group, queries_at_once(self.k, 1))

    @property
    def passes(self) -> range:
        """The first of each such number of heads."""
        return range(0, self.h.group, self.together)

    def _ask(self, page: Value, n_bytes: int, turns: int) -> Callable[[Value, int], None]:
        """Asks for what lies ahead of a part of a page, of which so many turns use so many bytes: line by line, turn by turn."""

        def ask(i: Value, u: int) -> None:
            begin, end = u * n_bytes // turns, (u + 1) * n_bytes // turns
            for line in range(-(-begin // LINE) * LINE, end, LINE):
                self.k.prefetch(page + (i * n_bytes // turns + (AHEAD_BYTES + line)))

        return ask

    def score(self, query: Value) -> None:
        """Logits, -inf for rows that are not seen; their maxima."""
        k, h, (dtype, _) = self.k, self.h, self.dtypes
        page_bytes = dtype.size_bytes(h.d_k) * L
        first, count = k.convert(self.first, I32), k.splat(k.convert(self.stop - self.first, I32), L)
        with k.loop(0, self.n_kv * h.group * L, L) as cells:
            cells.next()
            k.store(k.const(float("-inf"), F32.x(L)), self.at["tops"] + cells.i * 4)
        with k.loop(0, self.n_pages) as pages:
            pages.next()
            whole = self.finders[0].page(self.begin + pages.i, self.head)
            seen = (k.lane_numbers(L) + (k.convert(pages.i * L, I32) - first)).below(count)
            with k.loop(0, self.n_kv) as each:
                each.next()
                page = whole + each.i * page_bytes
                ask = self._ask(page, page_bytes, h.d_k)
                copied = dtype.is_block and len(self.passes) > 1
                if copied:
                    copy_keys(k, dtype, h.d_k, page, self.at["panel"], ask)
                for g in self.passes:
                    numbers = [each.i * h.group + m for m in range(g, min(g + self.together, h.group))]
                    queries = [query + m * (h.d_k * 4) for m in numbers]
                    if copied:
                        found = dot(k, f32, h.d_k, self.at["panel"], queries)
                    else:
                        found = dot(k, dtype, h.d_k, page, queries, *([ask] if g == 0 else []))
                    for m, products in zip(numbers, found, strict=True):
                        logits = k.select(seen, logits_of(k, h, products), float("-inf"))
                        place = self.at["tops"] + m * (L * 4)
                        k.store(k.max(k.load(place, F32.x(L)), logits) + 0.0, place)  # else a store of chosen lanes: slow
                        k.store(logits, self.at["weights"] + (pages.i * L + m * SLICE) * 4)

    def add(self) -> None:
        """Weighed values to the sums; weights of a page are made while the page before it is gone through."""
        k, h = self.k, self.h
        n = self.n_kv * h.group
        with k.loop(0, n * h.d_v, L) as cells:
            cells.next()
            k.store(k.zero(F32.x(L)), self.at["sums"] + cells.i * 4)
        with k.loop(0, n) as heads:
            heads.next()
            place = self.at["tops"] + heads.i * (L * 4)
            k.store(k.splat(k.fold(k.load(place, F32.x(L)), k.max), L), place)
            k.store(k.zero(F32.x(L)), self.at["totals"] + heads.i * (L * 4))
        with k.loop(0, self.n_kv) as each:
            each.next()
            self._weigh(each.i, k.i64(0))
        with k.loop(0, self.n_pages) as pages:
            pages.next()
            whole = self.finders[1].page(self.begin + pages.i, self.head)
            low, high = k.max(self.first - pages.i * L, 0), k.min(self.stop - pages.i * L, k.i64(L))
            full, following = low.eq(0) & high.eq(L), pages.i + 1
            with k.loop(0, self.n_kv) as each:
                each.next()
                with k.when(following.lt(self.n_pages)):
                    self._weigh(each.i, following)
                page = whole + each.i * (self.dtypes[1].size_bytes(h.d_v) * L)
                weights = self.at["weights"] + (pages.i * L + each.i * (h.group * SLICE)) * 4
                sums = self.at["sums"] + each.i * (h.group * h.d_v * 4)
                with k.when(full):
                    self._add_page(page, weights, sums)
                with k.when(full.invert()), k.loop(low, high) as rows:  # rows that are not seen may hold anything
                    rows.next()
                    self._add_row(page, rows.i, weights, sums)

    def _weigh(self, kv_head: Value, page: Value) -> None:
        """A page's logits of a kv head to weights."""
        k, h, lanes = self.k, self.h, self.k.lanes
        for g in range(h.group):
            m = kv_head * h.group + g
            for p in range(0, L, lanes):
                cell = self.at["weights"] + (m * SLICE + page * L + p) * 4
                top, total = (self.at[name] + (m * L + p) * 4 for name in ("tops", "totals"))
                weight = exp2_nonpositive(k, k.load(cell, F32.x(lanes)) - k.load(top, F32.x(lanes)))
                k.store(weight, cell)
                k.store(k.load(total, F32.x(lanes)) + weight, total)

    def _add_page(self, page: Value, weights: Value, sums: Value) -> None:
        k, h, (_, dtype) = self.k, self.h, self.dtypes
        ask = self._ask(page, dtype.size_bytes(h.d_v) * L, h.d_v)
        copied = dtype.is_block and len(self.passes) > 1
        with k.loop(0, h.d_v, L) as columns:
            columns.next()
            for g in self.passes:
                some = range(g, min(g + self.together, h.group))
                places = [sums + (columns.i + m * h.d_v) * 4 for m in some]
                totals = [k.load(place, F32.x(L)) for place in places]
                for r in range(L):
                    if g == 0:
                        ask(columns.i, r)
                    if copied and g:
                        value = k.load(self.at["panel"] + r * (L * 4), F32.x(L))
                    else:
                        value = value_elements(k, dtype, page, r, columns.i)
                    if copied and not g:
                        k.store(value, self.at["panel"] + r * (L * 4))
                    factors = [k.splat(k.load(weights + (m * SLICE + r) * 4, F32), L) for m in some]
                    totals = [k.fma(factor, value, total) for factor, total in zip(factors, totals, strict=True)]
                for place, total in zip(places, totals, strict=True):
                    k.store(total, place)

    def _add_row(self, page: Value, row: Value, weights: Value, sums: Value) -> None:
        k, h = self.k, self.h
        with k.loop(0, h.d_v, L) as columns:
            columns.next()
            value = value_elements(k, self.dtypes[1], page, row, columns.i)
            with k.loop(0, h.group) as heads:
                heads.next()
                place = sums + (columns.i + heads.i * h.d_v) * 4
                factor = k.splat(k.load(weights + (heads.i * SLICE + row) * 4, F32), L)
                k.store(k.fma(factor, value, k.load(place, F32.x(L))), place)

    def write(self, to: Value, stride: Value) -> None:
        """Partial results of each kv head, so many bytes apart."""
        k, h = self.k, self.h
        with k.loop(0, self.n_kv) as each, k.loop(0, h.group) as g:
            each.next()
            g.next()
            m, part = each.i * h.group + g.i, to + (each.i * stride + g.i * (h.partial * 4))
            k.store(k.load(self.at["tops"] + m * (L * 4), F32), part)
            k.store(k.sum(k.load(self.at["totals"] + m * (L * 4), F32.x(L))), part + 4)
            with k.loop(0, h.d_v, L) as cells:
                cells.next()
                k.store(k.load(self.at["sums"] + (m * h.d_v + cells.i) * 4, F32.x(L)), part + (cells.i + HEAD) * 4)
