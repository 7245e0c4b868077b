"""Attention for many queries on the CPU: a tile of them goes through rows once, block by block, with a running soft-max.

Keys come 16 rows at a time, values 16 elements at a time, as f32 in scratch, and then meet all queries of the tile, a few at
once. All loops are loops of the code too, so that it stays small enough for what the processor decodes once: what differs from
query to query lies in scratch. Logits are in units of log(2), so that weights are powers of 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from tensorgraph.backends.cpu.functions import exp2_nonpositive
from tensorgraph.backends.cpu.ir import F32, I1, I32, I64, Value
from tensorgraph.backends.cpu.kernel import Call, Emit, Kernel, Ref, lay_out
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dims import Guard, product
from tensorgraph.dtypes import f32
from tensorgraph.graph import Node
from tensorgraph.ops.attention.paged_cpu import LOG2_E, Heads, evenly, logits_of
from tensorgraph.ops.attention.stored_rows_cpu import LINE, L, dot, queries_at_once, tree

BLOCK = 64
"""Rows scored at once: as many as bits say which of them a token sees."""
UNROLL = 4
QUERIES = 48
"""Of a tile, about; its tokens are made of units of a quarter as many."""
LANES = 16  # of the widest target
PART = 320  # elements of a key, at most


class Source(Protocol):
    """A block's rows."""

    def keys(self, row: Value, to: Value) -> Value:
        """Where the keys of 16 rows from `row` on lie as f32 [Dk, L]: at `to`, or where they are."""

    def values(self, row: Value, column: Value) -> Callable[[Value], Value]:
        """Of 16 rows from `row` on, 16 elements of the r-th row's values from `column` on."""


def heads_at_once(group: int) -> int:
    """The query heads of a kv head that a tile takes, at most: all targets go through these without a remainder."""
    return min(group, QUERIES)


def pieces_of(group: int) -> int:
    return -(-group // QUERIES)


def unit_tokens(group: int) -> int:
    """The tokens that work is divided by: about 12 queries with all their heads."""
    return max(1, QUERIES // 4 // group)


def units_at_once(group: int) -> int:
    """So many units make a tile, at most."""
    return max(1, QUERIES // (unit_tokens(group) * group))


def _rooms(h: Heads) -> dict[str, int]:
    """What lies in scratch, and its bytes. Loops over several queries at once may go beyond the last, by fewer than 16."""
    tokens = units_at_once(h.group) * unit_tokens(h.group)
    queries = -(-tokens * heads_at_once(h.group) // LANES) * LANES + LANES
    return {
        "queries": queries * h.d_k * 4,
        "weights": queries * BLOCK * 4,
        "sums": queries * whole_panels(h.d_v) * 4,
        "totals": queries * L * 4,
        **dict.fromkeys(("tops", "highest", "factors"), queries * 4),
        "seen": tokens * 8,
        "joined": queries * 8,
        "panel": max(whole_panels(h.d_k), BLOCK) * L * 4,
    }


def part_width(d_k: int) -> int:
    """Elements of 16 keys that all queries meet before the others, so that these stay in the first cache meanwhile."""
    return -(-evenly(d_k, PART) // UNROLL) * UNROLL


def whole_panels(width: int) -> int:
    """A width rounded up to a multiple of 16."""
    return -(-width // L) * L


def tile_scratch(h: Heads) -> int:
    """Bytes that a thread needs for one tile."""
    return lay_out(_rooms(h))[1]


def tile_call(emit: Emit, node: Node, h: Heads, operands: Mapping[str, Ref | None], guard: Guard) -> Call:
    """The call of a kernel that goes through `each_tile`; operands besides `q`, `y` and `units`."""
    q, tokens = node.at("q"), unit_tokens(h.group)
    assert q is not None
    n_units = (q.shape[0] + (tokens - 1)) // tokens
    refs = {"q": Ref(q, known=True), **operands, "units": Ref(n_units), "y": Ref(node, known=True)}
    items = product((n_units, h.n_kv * pieces_of(h.group)))
    return Call(emit, refs, {"heads": h}, items, 2, scratch_bytes=tile_scratch(h), guard=guard, nodes=(node,))


def tile_places(k: Kernel, h: Heads) -> Mapping[str, Value]:
    """Where the fields of `Tile` lie, and what is behind them."""
    scratch = k.scratch()
    return {name: scratch + place for name, place in lay_out(_rooms(h))[0].items()}


@contextmanager
def each_tile(k: Kernel, h: Heads, n_tokens: Value, n_units: Value) -> Iterator[tuple[Value, Value, Value, Value, Value]]:
    """This chunk's tiles: of units of tokens, for one kv head's heads after another's, as many together as there is room for.

    Each is its kv head, its first query head and how many there are, its first token and how many there are.
    """
    pieces, heads, at_once = pieces_of(h.group), heads_at_once(h.group), units_at_once(h.group)
    n = n_units * (h.n_kv * pieces)
    start, stop = k.chunk * n // k.chunks, (k.chunk + 1) * n // k.chunks
    with k.loop(start // n_units, (stop + n_units - 1) // n_units) as each:
        each.next()
        low, high = k.max(start - each.i * n_units, 0), k.min(stop - each.i * n_units, n_units)
        kv_head, skipped = each.i // pieces, each.i % pieces * heads
        n_heads = k.i64(h.group) if pieces == 1 else k.min(h.group - skipped, k.i64(heads))
        with k.loop(low, high, at_once) as tiles:
            tiles.next()
            token = tiles.i * unit_tokens(h.group)
            end = k.min(k.min(tiles.i + at_once, high) * unit_tokens(h.group), n_tokens)
            yield kv_head, kv_head * h.group + skipped, n_heads, token, end - token


def attempts(k: Kernel, token: Value, n_tokens: Value, attend: Callable[[Value, Value], Value], together: Value) -> None:
    """All tokens of a tile at once, if they go together; else, or where that gives a NaN, each of them by itself: a row that only
    some of them see may hold an infinite number or NaN, which no weight makes 0. `attend(first, count)` returns whether a result
    is NaN."""
    with k.loop(0, n_tokens + 1, 1, [together.invert()]) as loop:
        whole, (again,) = loop.i.eq(0), loop.values
        first, count = k.select(whole, token, token + loop.i - 1), k.select(whole, n_tokens, k.i64(1))
        wanted = (whole & together) | (whole.invert() & again & (n_tokens.gt(1) | together.invert()))
        (bad,) = k.either(wanted, lambda: [attend(first, count)], lambda: [again])
        loop.next(k.select(whole & together, bad, again))


def below(k: Kernel, n: Value) -> Value:
    """The n lowest bits; of fewer than 0 none, of more than 64 all."""
    some = k.const(-1, I64).shift_right(k.min(k.max(64 - n, 0), k.i64(63)))
    return k.select(n.gt(0), some, k.i64(0))


@dataclass(frozen=True)
class Tile:
    """Queries in scratch, which has room for a whole tile.

    Attributes:
        queries: f32 [n, Dk]: of `n_tokens` tokens from `token` on, `n_heads` heads from `head` on, which share a kv head.
        weights: f32 [n, BLOCK]; before `weigh`, logits.
        sums: of weighed values, f32 [n, Dv] (whole panels).
        totals: of weights so far, f32 [n, L], to be summed.
        tops: f32 [n]; maxima so far.
        highest: f32 [n], of a block's logits; then what is taken off them, which is 0 where there are none.
        factors: f32 [n], what weights and sums so far are to be multiplied by.
        seen: i64 [tokens]; which rows of a block each token sees, bit by bit.
        joined: the same of queries that go together.
        panel: f32 [Dk, L] or [BLOCK, L]: keys of 16 rows, or 16 elements of a block's values.
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
    joined: Value
    panel: Value
    token: Value
    n_tokens: Value
    head: Value
    n_heads: Value

    @property
    def n(self) -> Value:
        """How many queries there are: of several tokens all heads of a kv head."""
        return self.n_tokens * self.n_heads

    @property
    def together(self) -> int:
        """Queries that share each load."""
        return queries_at_once(self.k, 1) if self.k.lanes < L else 12

    def slots(self, n: Value) -> Value:
        """Queries that take as long as n do."""
        return (n + (self.together - 1)) // self.together * self.together

    @property
    def _width(self) -> int:
        return whole_panels(self.h.d_v)

    def begin(self, q: Operand, sinks: Operand | None) -> None:
        """Queries from their places, sums of nothing; a sink is a row without a value."""
        k, h = self.k, self.h
        with k.loop(0, self.n) as each:
            each.next()
            t, query_head = self.token + each.i // self.n_heads, self.head + each.i % self.n_heads
            row, to = q.row([t, query_head]), self.queries + each.i * (h.d_k * 4)

            def copy(i: Value, mask: Value | None, _: list[Value]) -> None:
                k.store(k.convert(row.load(i, k.lanes, mask), F32), to + i * 4, mask=mask)

            k.sweep(h.d_k, copy)
            sink = k.convert(sinks.load([query_head]), F32) if sinks is not None else None
            k.store(k.const(-math.inf, F32) if sink is None else sink * LOG2_E, self.tops + each.i * 4)
            some = k.const(0.0, F32) if sink is None else k.select(sink.gt(-math.inf), k.const(1.0, F32), 0.0)
            k.store(k.zero(F32.x(L)).with_lane(0, some), self.totals + each.i * (L * 4))
            with k.loop(0, self._width, L) as columns:
                columns.next()
                k.store(k.zero(F32.x(L)), self.sums + (each.i * self._width + columns.i) * 4)

    def foresee(self, q: Operand, y: Operand) -> None:
        """Ask for the queries that come next, and for where this tile's results go: nothing else foresees them."""
        k, h = self.k, self.h
        last = k.i64(q.shape[0]) - 1
        with k.loop(0, self.n_tokens) as each:
            each.next()
            for operand, width, ahead in ((q, h.d_k, self.n_tokens), (y, h.d_v, 0)):
                place = operand.at([k.min(self.token + each.i + ahead, last), self.head])
                with k.loop(0, h.group * width * 4, LINE) as lines:
                    lines.next()
                    k.prefetch(place + lines.i)

    def see(self, bits_of: Callable[[Value], Value]) -> Value:
        """Note which rows of a block each token sees, `bits_of` its number in the tile; returns which any of them sees."""
        k = self.k
        with k.loop(0, self.n_tokens, 1, [k.i64(0)]) as tokens:
            bits = bits_of(tokens.i)
            k.store(bits, self.seen + tokens.i * 8)
            tokens.next(tokens.values[0] | bits)
        with k.loop(0, self.n, self.together) as queries:
            queries.next()
            first, last = queries.i // self.n_heads, k.min(queries.i + (self.together - 1), self.n - 1) // self.n_heads
            with k.loop(first, last + 1, 1, [k.i64(0)]) as some:
                some.next(some.values[0] | k.load(self.seen + some.i * 8, I64))
            k.store(some.results[0], self.joined + queries.i * 8)
        return tokens.results[0]

    def through(self, source: Source, any_seen: Value) -> None:
        """One block, of which `any_seen` are the rows that some token sees: at least one."""
        n_rows = (self._end(any_seen) + (L - 1)) & -L
        self.score(source, n_rows)
        self.weigh(n_rows)
        self.add(source, any_seen)

    def _end(self, bits: Value) -> Value:
        """The number of the last row that is set, and 1."""
        return 64 - self.k.call("llvm.ctlz.i64", I64, bits, self.k.const(0, I1))

    def score(self, source: Source, n_rows: Value) -> None:
        """Logits of a block's first rows."""
        k, h = self.k, self.h
        with k.loop(0, n_rows, L) as pages:
            pages.next()
            panel, step = source.keys(pages.i, self.panel), part_width(h.d_k)
            for start in range(0, h.d_k, step):
                width = min(step, h.d_k - start)
                with k.loop(0, self.n, self.together) as queries:
                    queries.next()
                    with k.when((k.load(self.joined + queries.i * 8, I64).shift_right(pages.i) & ((1 << L) - 1)).ne(0)):
                        some = [self.queries + ((queries.i + r) * h.d_k + start) * 4 for r in range(self.together)]
                        for r, products in enumerate(dot(k, f32, width, panel + start * (L * 4), some)):
                            place = self.weights + ((queries.i + r) * BLOCK + pages.i) * 4
                            whole = products + k.load(place, F32.x(L)) if start else products
                            k.store(logits_of(k, h, whole) if start + width == h.d_k else whole, place)

    def highest_of(self, row: Value, n_rows: Value) -> Value:
        """The highest logit of a query in a block; those of rows that it does not see become -inf."""
        k, lanes, parts = self.k, self.k.lanes, L // self.k.lanes
        at, bits = self.weights + row * (BLOCK * 4), k.load(self.seen + row // self.n_heads * 8, I64)

        def some() -> list[Value]:
            own = k.vector([1 << i for i in range(lanes)], I32)
            with k.loop(0, n_rows, L, [k.const(-math.inf, F32.x(lanes))] * parts) as cells:
                tops = []
                for p, top in enumerate(cells.values):
                    cell = at + (cells.i + p * lanes) * 4
                    seen = (k.splat(k.convert(bits.shift_right(cells.i + p * lanes), I32), lanes) & own).ne(0)
                    found = k.select(seen, k.load(cell, F32.x(lanes)), -math.inf)
                    k.store(found + 0.0, cell)  # a mere choice would become a store of chosen lanes, slow on some processors
                    tops.append(k.max(top, found))
                cells.next(*tops)
            return [tree(cells.results, k.max)]

        def whole() -> list[Value]:
            return [tree([k.load(at + i * 4, F32.x(lanes)) for i in range(0, BLOCK, lanes)], k.max)]

        (found,) = k.either(bits.ne(-1), some, whole)
        return k.fold(found, k.max)

    def weigh(self, n_rows: Value) -> None:
        """Logits of a block's first rows to weights; maxima and sums of weights as these want them."""
        k, lanes = self.k, self.k.lanes
        with k.loop(0, self.n) as each:
            each.next()
            k.store(self.highest_of(each.i, n_rows), self.highest + each.i * 4)
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

    def add(self, source: Source, any_seen: Value) -> None:
        """The weighed values of a block; of rows that no query sees nothing is read."""
        k = self.k
        with k.loop(0, self._width, L) as columns:
            columns.next()
            self._copy_values(source, any_seen, columns.i)
            with k.loop(0, self.n, self.together) as queries:
                queries.next()
                bits = k.load(self.joined + queries.i * 8, I64)
                with k.when(bits.ne(0)):
                    low = k.call("llvm.cttz.i64", I64, bits, k.const(0, I1)) & -UNROLL
                    numbers = [queries.i + r for r in range(self.together)]
                    factors = [k.splat(k.load(self.factors + r * 4, F32), L) for r in numbers]
                    places = [self.sums + (r * self._width + columns.i) * 4 for r in numbers]
                    sums = [k.load(place, F32.x(L)) * f for place, f in zip(places, factors, strict=True)]
                    with k.loop(low, self._end(bits), UNROLL, sums) as rows:
                        sums = rows.values
                        for u in range(UNROLL):
                            value = k.load(self.panel + (rows.i + u) * (L * 4), F32.x(L))
                            at = rows.i + u
                            weights = (k.splat(k.load(self.weights + (r * BLOCK + at) * 4, F32), L) for r in numbers)
                            sums = [k.fma(w, value, total) for w, total in zip(weights, sums, strict=True)]
                        rows.next(*sums)
                    for place, total in zip(places, rows.results, strict=True):
                        k.store(total, place)

    def _copy_values(self, source: Source, any_seen: Value, column: Value) -> None:
        """16 elements of the values of a block's rows to the panel; zeros for those that no query sees."""
        k = self.k
        first = k.call("llvm.cttz.i64", I64, any_seen, k.const(0, I1)) & -L
        with k.loop(first, self._end(any_seen), L) as pages:
            pages.next()
            read, bits = source.values(pages.i, column), any_seen.shift_right(pages.i)
            place = self.panel + pages.i * (L * 4)
            whole = (bits & ((1 << L) - 1)).eq((1 << L) - 1)
            with k.when(whole), k.loop(0, L) as rows:
                rows.next()
                k.store(read(rows.i), place + rows.i * (L * 4))
            with k.when(whole.invert()), k.loop(0, L) as rows:
                rows.next()
                (value,) = k.either((bits.shift_right(rows.i) & 1).ne(0), lambda: [read(rows.i)], lambda: [k.zero(F32.x(L))])
                k.store(value, place + rows.i * (L * 4))

    def finish(self, y: Operand) -> Value:
        """Sums by their totals, to y; returns whether a result is NaN or infinite."""
        k, h = self.k, self.h
        with k.loop(0, self.n, 1, [k.zero(F32.x(k.lanes))]) as each:
            total = k.sum(k.load(self.totals + each.i * (L * 4), F32.x(L)))
            inverse = k.splat(1.0 / k.select(total.eq(0.0), k.const(1.0, F32), total), k.lanes)
            out = y.row([self.token + each.i // self.n_heads, self.head + each.i % self.n_heads])

            def write(i: Value, mask: Value | None, carried: list[Value]) -> list[Value]:
                value = k.load(self.sums + (each.i * self._width + i) * 4, F32.x(k.lanes)) * inverse
                out.store(i, value, mask)
                return [k.fma(value, 0.0, carried[0])]

            each.next(*k.sweep(h.d_v, write, each.values))
        return k.sum(each.results[0]).is_nan()

    def leave(self, to: Value, stride: int, skip: int) -> None:
        """Partial results of one token's heads, so many floats apart: the maximum, the sum, and behind `skip` the sums."""
        k, h = self.k, self.h
        with k.loop(0, self.n) as each:
            each.next()
            one = to + each.i * (stride * 4)
            k.store(k.load(self.tops + each.i * 4, F32), one)
            k.store(k.sum(k.load(self.totals + each.i * (L * 4), F32.x(L))), one + 4)
            with k.loop(0, h.d_v, L) as cells:
                cells.next()
                k.store(k.load(self.sums + (each.i * self._width + cells.i) * 4, F32.x(L)), one + (cells.i + skip) * 4)
