"""Attention over streams for many queries: a tile of them goes through the rows once, block by block, with a running soft-max.

Keys come page by page, values 16 columns at a time, as f32 in scratch, and then meet all queries of the tile, a few at once. All
loops are loops of the code too, so that it stays small enough for what the processor decodes once: what differs from query to
query and from page to page lies in scratch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tensorgraph.backends.cpu.functions import exp2_nonpositive
from tensorgraph.backends.cpu.ir import F32, I32, I64, Value
from tensorgraph.backends.cpu.kernel import Kernel, lay_out
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dtypes import f32
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.paged_cpu import (
    LOG2_E,
    Heads,
    Operands,
    Seen,
    logits_of,
    seen_rows,
    segments,
    token_of,
)
from tensorgraph.ops.attention.stored_rows_cpu import LINE, Finder, L, copy_keys, dot, queries_at_once, tree, value_elements

BLOCK = 64
"""Rows scored at once."""
UNROLL = 4
QUERIES = 48
"""Of a tile, about; its tokens are made of units of a quarter as many."""
NEVER = 1 << 40  # a row that no sequence has
LANES = 16  # of the widest target


def unit_tokens(group: int) -> int:
    """The tokens that work is divided by: about 12 queries with all their heads."""
    return max(1, QUERIES // 4 // group)


def _units(group: int) -> int:
    """So many units make a tile, at most."""
    return max(1, QUERIES // (unit_tokens(group) * group))


def _most(h: Heads) -> tuple[int, int]:
    """Tokens and queries of a tile, at most."""
    tokens = _units(h.group) * unit_tokens(h.group)
    return tokens, tokens * h.group


def _rooms(h: Heads) -> dict[str, int]:
    """What lies in scratch, and its bytes. Loops over several queries at once may go beyond the last, by fewer than 24."""
    tokens, queries = _most(h)
    rows = -(-queries // LANES) * LANES + 24
    return {
        "queries": rows * h.d_k * 4,
        "weights": rows * BLOCK * 4,
        "sums": rows * h.d_v * 4,
        "totals": rows * L * 4,
        **dict.fromkeys(("tops", "highest", "factors"), rows * 4),
        "seen": tokens * 2 * 8,
        "spans": rows * 2 * 8,
        "panel": max(h.d_k * L, BLOCK * L) * 4,
    }


def tile_scratch(h: Heads) -> int:
    """Bytes that a thread needs for one tile."""
    return lay_out(_rooms(h))[1]


@dataclass(frozen=True)
class Tile:
    """Queries in scratch, which has room for a whole tile.

    Attributes:
        queries: f32 [n, Dk], tokens with all heads of a kv head.
        weights: f32 [n, BLOCK]; before `weigh`, logits.
        sums: of weighed values, f32 [n, Dv].
        totals: of weights so far, f32 [n, L], to be summed.
        tops: f32 [n]; maxima so far.
        highest: f32 [n], of a block's logits; then what is taken off them, which is 0 where there are none.
        factors: f32 [n], what weights and sums so far are to be multiplied by.
        seen: the first row that a token sees and the one after the last, i64 [tokens, 2].
        spans: the same of queries that go together.
        panel: f32 [Dk, L] or [BLOCK, L]: keys of a page, or 16 elements of a block's values.
        token, n_tokens, n: its first token, and how many tokens and queries it has.
    """

    k: Kernel
    h: Heads
    queries: Value
    weights: Value
    sums: Value
    totals: Value
    tops: Value
    highest: Value
    factors: Value
    seen: Value
    spans: Value
    panel: Value
    token: Value
    n_tokens: Value

    @property
    def n(self) -> Value:
        return self.n_tokens * self.h.group

    @property
    def together(self) -> int:
        """Queries that share each load."""
        return queries_at_once(self.k, 1) if self.k.lanes < L else 12

    def begin(self, q: Operand, sinks: Operand | None, head: Value) -> None:
        """Queries from their places, sums of nothing; a sink is a row without a value."""
        k, h = self.k, self.h
        with k.loop(0, self.n) as each:
            each.next()
            t, query_head = self.token + each.i // h.group, head * h.group + each.i % h.group
            row, to = q.row([t, query_head]), self.queries + each.i * (h.d_k * 4)

            def copy(i: Value, mask: Value | None, _: list[Value]) -> None:
                k.store(row.load(i, k.lanes, mask), to + i * 4, mask=mask)

            k.sweep(h.d_k, copy)
            sink = sinks.load([query_head]) if sinks is not None else None
            k.store(k.const(-math.inf, F32) if sink is None else sink * LOG2_E, self.tops + each.i * 4)
            k.store(k.zero(F32.x(L)).with_lane(0, k.const(0.0 if sink is None else 1.0, F32)), self.totals + each.i * (L * 4))
            with k.loop(0, h.d_v, L) as columns:
                columns.next()
                k.store(k.zero(F32.x(L)), self.sums + (each.i * h.d_v + columns.i) * 4)

    def foresee(self, q: Operand, y: Operand, head: Value) -> None:
        """Ask for the queries that come next, and for where this tile's results go: nothing else foresees them."""
        k, h = self.k, self.h
        last = k.i64(q.shape[0]) - 1
        with k.loop(0, self.n_tokens) as each:
            each.next()
            for operand, width, ahead in ((q, h.d_k, self.n_tokens), (y, h.d_v, 0)):
                place = operand.at([k.min(self.token + each.i + ahead, last), head * h.group])
                with k.loop(0, h.group * width * 4, LINE) as lines:
                    lines.next()
                    k.prefetch(place + lines.i)

    def look(self, operands: Operands, table: Value, seq: Value, rule: Rule) -> Seen:
        """What each token sees of one sequence, and queries that go together; returns all that any sees."""
        k = self.k
        with k.loop(0, self.n_tokens, 1, [k.i64(NEVER), k.i64(0)]) as each:
            own, pos = token_of(k, operands, self.token + each.i)
            seen = seen_rows(k, table, seq, pos, rule)
            some = own.eq(seq) & seen.lo.lt(seen.hi)
            lo, hi = k.select(some, seen.lo, k.i64(NEVER)), k.select(some, seen.hi, k.i64(0))
            k.store(lo, self.seen + each.i * 16)
            k.store(k.max(hi, lo), self.seen + (each.i * 16 + 8))
            each.next(k.min(each.values[0], lo), k.max(each.values[1], hi))
        with k.loop(0, self.n, self.together) as queries:
            queries.next()
            first, last = queries.i // self.h.group, k.min(queries.i + (self.together - 1), self.n - 1) // self.h.group
            with k.loop(first, last + 1, 1, [k.i64(NEVER), k.i64(0)]) as tokens:
                lo, hi = (k.load(self.seen + (tokens.i * 16 + b), I64) for b in (0, 8))
                tokens.next(k.min(tokens.values[0], lo), k.max(tokens.values[1], k.select(lo.eq(NEVER), k.i64(0), hi)))
            for b, value in zip((0, 8), tokens.results, strict=True):
                k.store(value, self.spans + (queries.i * 16 + b))
        return Seen(*each.results)

    def _span(self, query: Value) -> Seen:
        """What some of the queries that go together see, `query` being the first."""
        return Seen(*(self.k.load(self.spans + (query * 16 + b), I64) for b in (0, 8)))

    def score(self, keys: Operand, finder: Finder, head: Value, start: Value, stop: Value) -> None:
        """Logits of the rows start..stop-1 of a block, up to a whole number of pages."""
        k, h = self.k, self.h
        with k.loop(0, stop - start, L) as pages:
            pages.next()
            page = finder.page((start + pages.i) // L, head)
            panel = page if keys.dtype is f32 else self.panel
            if keys.dtype is not f32:
                copy_keys(k, keys.dtype, h.d_k, page, self.panel)
            with k.loop(0, self.n, self.together) as queries:
                queries.next()
                span = self._span(queries.i)
                with k.when(span.lo.lt(start + pages.i + L) & span.hi.gt(start + pages.i)):
                    some = [self.queries + (queries.i + r) * (h.d_k * 4) for r in range(self.together)]
                    for r, products in enumerate(dot(k, f32, h.d_k, panel, some)):
                        k.store(logits_of(k, h, products), self.weights + ((queries.i + r) * BLOCK + pages.i) * 4)

    def highest_of(self, row: Value, start: Value, n_rows: Value) -> Value:
        """The highest logit of a query in a block; those of rows that it does not see become -inf."""
        k, lanes, parts = self.k, self.k.lanes, L // self.k.lanes
        at, bounds = self.weights + row * (BLOCK * 4), self.seen + row // self.h.group * 16
        lo, hi = (k.load(bounds + b, I64) - start for b in (0, 8))

        def some() -> list[Value]:
            first, count = k.convert(k.min(lo, k.i64(BLOCK)), I32), k.convert(k.max(hi - lo, 0), I32)
            with k.loop(0, n_rows, L, [k.const(-math.inf, F32.x(lanes))] * parts) as cells:
                tops = []
                for p, top in enumerate(cells.values):
                    cell = at + (cells.i + p * lanes) * 4
                    number = k.lane_numbers(lanes) + (k.convert(cells.i + p * lanes, I32) - first)
                    found = k.select(number.below(k.splat(count, lanes)), k.load(cell, F32.x(lanes)), -math.inf)
                    k.store(found + 0.0, cell)  # a mere choice would become a store of chosen lanes, slow on some processors
                    tops.append(k.max(top, found))
                cells.next(*tops)
            return [tree(cells.results, k.max)]

        def whole() -> list[Value]:
            return [tree([k.load(at + i * 4, F32.x(lanes)) for i in range(0, BLOCK, lanes)], k.max)]

        (found,) = k.either(lo.gt(0) | hi.lt(BLOCK), some, whole)
        return k.fold(found, k.max)

    def weigh(self, start: Value, n_rows: Value) -> None:
        """Logits of the first rows of a block to weights; maxima and sums of weights as these want them."""
        k, lanes = self.k, self.k.lanes
        with k.loop(0, self.n) as each:
            each.next()
            k.store(self.highest_of(each.i, start, n_rows), self.highest + each.i * 4)
        with k.loop(0, self.n, lanes) as rows:
            rows.next()
            before = k.load(self.tops + rows.i * 4, F32.x(lanes))
            top = k.max(before, k.load(self.highest + rows.i * 4, F32.x(lanes)))
            shift = k.select(top.eq(-math.inf), 0.0, top)
            factor = exp2_nonpositive(k, before - shift)
            for value, place in ((top, self.tops), (shift, self.highest), (factor, self.factors)):
                k.store(value, place + rows.i * 4)
        with k.loop(0, self.n) as each:
            each.next()
            shift, factor = (k.splat(k.load(place + each.i * 4, F32), lanes) for place in (self.highest, self.factors))
            totals = [self.totals + (each.i * L + i) * 4 for i in range(0, L, lanes)]
            with k.loop(0, n_rows, L, [k.load(place, F32.x(lanes)) * factor for place in totals]) as cells:
                following = []
                for p, so_far in enumerate(cells.values):
                    cell = self.weights + (each.i * BLOCK + cells.i + p * lanes) * 4
                    value = exp2_nonpositive(k, k.load(cell, F32.x(lanes)) - shift)
                    k.store(value, cell)
                    following.append(so_far + value)
                cells.next(*following)
            for place, total in zip(totals, cells.results, strict=True):
                k.store(total, place)

    def add(self, values: Operand, finder: Finder, head: Value, start: Value, seen: Seen) -> None:
        """The weighed values of a block; of rows that no query sees nothing is read."""
        k, h = self.k, self.h
        first, stop = k.max(seen.lo - start, 0), k.min(seen.hi - start, k.i64(BLOCK))
        with k.loop(0, h.d_v, L) as columns:
            columns.next()
            self._copy_values(values, finder, head, start, columns.i, first, stop)
            with k.loop(0, self.n, self.together) as queries:
                queries.next()
                span = self._span(queries.i)
                low = k.max(span.lo - start, 0) // UNROLL * UNROLL
                high = k.min((span.hi - start + (UNROLL - 1)) & -UNROLL, k.i64(BLOCK))
                with k.when(low.lt(high)):
                    numbers = [queries.i + r for r in range(self.together)]
                    factors = [k.splat(k.load(self.factors + r * 4, F32), L) for r in numbers]
                    places = [self.sums + (r * h.d_v + columns.i) * 4 for r in numbers]
                    sums = [k.load(place, F32.x(L)) * f for place, f in zip(places, factors, strict=True)]
                    with k.loop(low, high, UNROLL, sums) as rows:
                        sums = rows.values
                        for u in range(UNROLL):
                            value = k.load(self.panel + (rows.i + u) * (L * 4), F32.x(L))
                            weights = [k.splat(k.load(self.weights + (r * BLOCK + rows.i + u) * 4, F32), L) for r in numbers]
                            sums = [k.fma(w, value, total) for w, total in zip(weights, sums, strict=True)]
                        rows.next(*sums)
                    for place, total in zip(places, rows.results, strict=True):
                        k.store(total, place)

    def _copy_values(
        self, values: Operand, finder: Finder, head: Value, start: Value, column: Value, first: Value, stop: Value
    ) -> None:
        """16 elements of the values of rows first..stop-1 of a block to the panel, and zeros around them, to a whole page."""
        k = self.k
        with k.loop(first // L * L, stop, L) as pages:
            pages.next()
            page = finder.page((start + pages.i) // L, head)

            def copy(row: Value) -> None:
                k.store(value_elements(k, values.dtype, page, row, column), self.panel + (pages.i + row) * (L * 4))

            low, high = k.max(first - pages.i, 0), k.min(stop - pages.i, k.i64(L))
            with k.when(low.gt(0) | high.lt(L)), k.loop(0, L) as rows:
                rows.next()
                k.store(k.zero(F32.x(L)), self.panel + (pages.i + rows.i) * (L * 4))
            with k.loop(low, high) as rows:
                rows.next()
                copy(rows.i)

    def finish(self, y: Operand, head: Value) -> None:
        """Sums by their totals, to y."""
        k, h = self.k, self.h
        with k.loop(0, self.n) as each:
            each.next()
            total = k.sum(k.load(self.totals + each.i * (L * 4), F32.x(L)))
            inverse = k.splat(1.0 / k.select(total.eq(0.0), k.const(1.0, F32), total), L)
            out = y.at([self.token + each.i // h.group, head * h.group + each.i % h.group])
            with k.loop(0, h.d_v, L) as columns:
                columns.next()
                k.store(k.load(self.sums + (each.i * h.d_v + columns.i) * 4, F32.x(L)) * inverse, out + columns.i * 4)

    def through(self, operands: Operands, head: Value, sequences: Seen) -> None:
        """All rows that the tile's tokens see."""
        k, h = self.k, self.h
        for keys, values, rule in segments(operands, h):
            assert keys.table is not None
            with k.loop(sequences.lo, sequences.hi) as each:
                each.next()
                seen = self.look(operands, keys.table, each.i, rule)
                some = seen.lo.lt(seen.hi)
                with k.when(some):
                    found = [
                        Finder.of(k, stream, h.n_kv, width, each.i, seen.hi) for stream, width in ((keys, h.d_k), (values, h.d_v))
                    ]
                    with k.loop(seen.lo // L * L, seen.hi, BLOCK) as blocks:
                        blocks.next()
                        stop = k.min(seen.hi, blocks.i + BLOCK)
                        self.score(keys, found[0], head, blocks.i, stop)
                        self.weigh(blocks.i, stop - blocks.i)
                        self.add(values, found[1], head, blocks.i, seen)


def emit_tiles(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """y [T, H, Dv]: each chunk takes units of tokens, one kv head's after another's, as many together as a tile has room for."""
    h, q, y, units = heads, *(operands[name] for name in ("q", "y", "units"))
    assert q is not None and y is not None and units is not None
    n_tokens, scratch, n_units = k.i64(q.shape[0]), k.scratch(), k.i64(units.shape[0])
    at = {name: scratch + place for name, place in lay_out(_rooms(h))[0].items()}
    n, at_once = n_units * h.n_kv, _units(h.group)
    start, stop = k.chunk * n // k.chunks, (k.chunk + 1) * n // k.chunks
    with k.loop(start // n_units, (stop + n_units - 1) // n_units) as each:
        each.next()
        low, high = k.max(start - each.i * n_units, 0), k.min(stop - each.i * n_units, n_units)
        with k.loop(low, high, at_once) as tiles:
            tiles.next()
            token = tiles.i * unit_tokens(h.group)
            last = k.min(k.min(tiles.i + at_once, high) * unit_tokens(h.group), n_tokens)
            tile = Tile(k, h, **at, token=token, n_tokens=last - token)
            tile.begin(q, operands["sinks"], each.i)
            tile.foresee(q, y, each.i)
            (first_seq, _), (last_seq, _) = (token_of(k, operands, t) for t in (token, last - 1))
            tile.through(operands, each.i, Seen(first_seq, last_seq + 1))
            tile.finish(y, each.i)
