"""Attention over dense streams for many tokens: a tile of queries goes through the rows once, with a running soft-max.

All loops are loops of the code too, so that it stays small enough for what the processor decodes once: what differs from query to
query and from page to page lies in scratch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensorgraph.backends.cpu.functions import exp2_nonpositive
from tensorgraph.backends.cpu.ir import F32, I64, Value
from tensorgraph.backends.cpu.kernel import Kernel, lay_out
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.ops.attention.paged_cpu import (
    LINE,
    LISTED_BYTES,
    SLICE,
    Block,
    Heads,
    L,
    Seen,
    add_values,
    find_block,
    queries_at_once,
    scores,
    seen_rows,
    shown,
    token_of,
    tree,
    value_blocks,
)

Operands = Mapping[str, Operand | None]
NEVER = 1 << 40  # a row that no sequence has
LOG2_E = math.log2(math.e)
LANES = 16  # of the widest target


def tile_tokens(group: int) -> int:
    """Tokens of a tile: about 12 queries with all their heads."""
    return max(1, 12 // group)


def _rooms(h: Heads) -> dict[str, int]:
    """What lies in scratch, and its bytes. Loops over several queries at once may go beyond the last, by fewer than there are."""
    tokens = tile_tokens(h.group)
    rows = 2 * tokens * h.group
    return {
        "queries": rows * h.d_k * 4,
        "weights": rows * SLICE * 4,
        "sums": rows * h.d_v * 4,
        "totals": rows * L * 4,
        **dict.fromkeys(("tops", "highest", "factors"), (rows + LANES) * 4),
        "seen": tokens * 2 * 8,
        "pages": LISTED_BYTES,
    }


def tile_scratch(h: Heads) -> int:
    """Bytes that a thread needs for one tile."""
    return lay_out(_rooms(h))[1]


@dataclass(frozen=True)
class Tile:
    """A tile in scratch.

    Attributes:
        queries: f32 [rows, Dk], `rows` being its tokens with all heads of a kv head.
        weights: f32 [rows, SLICE]; before `weigh`, logits in units of log(2), so that weights are powers of 2.
        sums: of weighed values, f32 [rows, Dv].
        totals: of weights so far, f32 [rows, L], to be summed.
        tops: f32 [rows]; maxima so far.
        highest: f32 [rows], of a block's logits; then what is taken off them, which is 0 where there are none.
        factors: f32 [rows], what weights and sums so far are to be multiplied by.
        seen: the first row that a token sees and the one after the last, i64 [tokens, 2].
        pages: what `find_block` lists.
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
    pages: Value

    @property
    def tokens(self) -> int:
        return tile_tokens(self.h.group)

    @property
    def rows(self) -> int:
        return self.tokens * self.h.group

    def at_once(self, vectors: int) -> int:
        """Queries that go together, each with so many vectors of sums: as many as there is room for, evenly."""
        turns = -(-self.rows // queries_at_once(self.k, vectors))
        return -(-self.rows // turns)

    def begin(self, q: Operand, sinks: Operand | None, token: Value, head: Value) -> None:
        """Queries from their places, sums of nothing; a sink is a row without a value. Tokens beyond the last repeat it."""
        k, h = self.k, self.h
        with k.loop(0, self.rows) as each:
            each.next()
            t, query_head = k.min(token + each.i // h.group, k.i64(q.shape[0]) - 1), head * h.group + each.i % h.group
            row, to = q.row([t, query_head]), self.queries + each.i * (h.d_k * 4)

            def copy(i: Value, mask: Value | None, _: list[Value]) -> None:
                k.store(row.load(i, k.lanes, mask), to + i * 4, mask=mask)

            k.sweep(h.d_k, copy)
            sink = sinks.load([query_head]) if sinks is not None else None
            k.store(k.const(float("-inf"), F32) if sink is None else sink * LOG2_E, self.tops + each.i * 4)
            k.store(k.zero(F32.x(L)).with_lane(0, k.const(0.0 if sink is None else 1.0, F32)), self.totals + each.i * (L * 4))
            with k.loop(0, h.d_v, L) as columns:
                columns.next()
                k.store(k.zero(F32.x(L)), self.sums + (each.i * h.d_v + columns.i) * 4)

    def foresee(self, q: Operand, y: Operand, token: Value, head: Value) -> None:
        """Ask for the queries of the next tile, and for where this one's results go: nothing else foresees them."""
        k, h = self.k, self.h
        last = k.i64(q.shape[0]) - 1
        with k.loop(0, self.tokens) as each:
            each.next()
            for operand, width, ahead in ((q, h.d_k, self.tokens), (y, h.d_v, 0)):
                place = operand.at([k.min(token + each.i + ahead, last), head * h.group])
                with k.loop(0, h.group * width * 4, LINE) as lines:
                    lines.next()
                    k.prefetch(place + lines.i)

    def look(self, operands: Operands, table: Value, token: Value, last: Value, seq: Value, rule: Any) -> Seen:
        """What each token sees of one sequence, to `seen`; returns all that any sees."""
        k = self.k
        with k.loop(0, self.tokens, 1, [k.i64(NEVER), k.i64(0)]) as each:
            own, pos = token_of(k, operands, k.min(token + each.i, last))
            seen = seen_rows(k, table, seq, pos, rule)
            lo = k.select(own.eq(seq), seen.lo, k.i64(NEVER))
            hi = k.select(own.eq(seq), seen.hi, k.i64(0))
            k.store(lo, self.seen + each.i * 16)
            k.store(k.max(hi, lo), self.seen + (each.i * 16 + 8))
            each.next(k.min(each.values[0], lo), k.max(each.values[1], hi))
        return Seen(*each.results)

    def score(self, block: Block, dtype: Any, n_rows: Value) -> None:
        """Logits of the first rows of a block, up to a whole number of pages."""
        k, h = self.k, self.h
        n_pages = 2 if k.lanes == L else 1
        together = self.at_once(n_pages)
        with k.loop(0, self.rows, together) as rows, k.loop(0, (n_rows + (L - 1)) // L, n_pages) as pages:
            rows.next()
            pages.next()
            keys = [block.page(block.keys, pages.i + p) for p in range(n_pages)]
            found = scores(k, h, dtype, keys, [self.queries + (rows.i + r) * (h.d_k * 4) for r in range(together)], LOG2_E)
            for r, row in enumerate(found):
                for p, score in enumerate(row):
                    k.store(score, self.weights + ((rows.i + r) * SLICE + (pages.i + p) * L) * 4)

    def highest_of(self, row: Value, start: Value, n_rows: Value) -> Value:
        """The highest logit of a query in a block; those of rows that it does not see become -inf."""
        k = self.k
        at, bounds = self.weights + row * (SLICE * 4), self.seen + row // self.h.group * 16
        seen = Seen(k.load(bounds, I64), k.load(bounds + 8, I64))

        def some() -> list[Value]:
            with k.loop(0, n_rows, L, [k.const(-math.inf, F32.x(L))]) as cells:
                cell = at + cells.i * 4
                found = k.select(shown(k, start + cells.i, seen), k.load(cell, F32.x(L)), -math.inf)
                k.store(found + 0.0, cell)  # a mere choice would become a store of chosen lanes, which is slow on some processors
                cells.next(k.max(cells.values[0], found))
            return cells.results

        def whole() -> list[Value]:
            return [tree(k, [k.load(at + i * 4, F32.x(L)) for i in range(0, SLICE, L)], k.max)]

        (found,) = k.either(seen.lo.gt(start) | seen.hi.lt(start + SLICE), some, whole)
        return k.fold(found, k.max)

    def weigh(self, start: Value, n_rows: Value) -> None:
        """Logits of the first rows of a block to weights; maxima and sums of weights as these want them."""
        k, lanes = self.k, self.k.lanes
        with k.loop(0, self.rows) as each:
            each.next()
            k.store(self.highest_of(each.i, start, n_rows), self.highest + each.i * 4)
        with k.loop(0, self.rows, lanes) as rows:
            rows.next()
            before = k.load(self.tops + rows.i * 4, F32.x(lanes))
            top = k.max(before, k.load(self.highest + rows.i * 4, F32.x(lanes)))
            shift = k.select(top.eq(float("-inf")), 0.0, top)
            factor = exp2_nonpositive(k, before - shift)
            for value, place in ((top, self.tops), (shift, self.highest), (factor, self.factors)):
                k.store(value, place + rows.i * 4)
        with k.loop(0, self.rows) as each:
            each.next()
            shift, factor = (k.splat(k.load(place + each.i * 4, F32), lanes) for place in (self.highest, self.factors))
            totals = [self.totals + (each.i * L + i) * 4 for i in range(0, L, lanes)]
            with k.loop(0, n_rows, L, [k.load(place, F32.x(lanes)) * factor for place in totals]) as cells:
                following = []
                for i, so_far in enumerate(cells.values):
                    cell = self.weights + (each.i * SLICE + cells.i + i * lanes) * 4
                    value = exp2_nonpositive(k, k.load(cell, F32.x(lanes)) - shift)
                    k.store(value, cell)
                    following.append(so_far + value)
                cells.next(*following)
            for place, total in zip(totals, cells.results, strict=True):
                k.store(total, place)

    def add(self, block: Block, dtype: Any, first: Value, stop: Value) -> None:
        """The weighed values of rows first..stop-1 of a block."""
        k, h = self.k, self.h
        for begin, end, n in value_blocks(k, h):
            together = self.at_once(n)
            with k.loop(0, self.rows, together) as rows, k.loop(begin, end, n * L) as columns:
                rows.next()
                columns.next()
                numbers = [rows.i + r for r in range(together)]
                factors = [k.splat(k.load(self.factors + r * 4, F32), L) for r in numbers]
                places = [[self.sums + (r * h.d_v + columns.i + v * L) * 4 for v in range(n)] for r in numbers]
                begun = [k.load(p, F32.x(L)) * f for some, f in zip(places, factors, strict=True) for p in some]
                listed = [self.weights + r * (SLICE * 4) for r in numbers]
                totals = add_values(k, h, dtype, block, first, stop, listed, begun, columns.i)
                for place, total in zip((p for some in places for p in some), totals, strict=True):
                    k.store(total, place)

    def finish(self, y: Operand, token: Value, n_tokens: Value, head: Value) -> None:
        """Sums by their totals, to y."""
        k, h = self.k, self.h
        with k.loop(0, k.min(n_tokens - token, self.tokens) * h.group) as each:
            each.next()
            total = k.sum(k.load(self.totals + each.i * (L * 4), F32.x(L)))
            inverse = k.splat(1.0 / k.select(total.eq(0.0), k.const(1.0, F32), total), L)
            out = y.at([token + each.i // h.group, head * h.group + each.i % h.group])
            with k.loop(0, h.d_v, L) as columns:
                columns.next()
                k.store(k.load(self.sums + (each.i * h.d_v + columns.i) * 4, F32.x(L)) * inverse, out + columns.i * 4)


def emit_tiles(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """y [T, H, Dv], tile by tile of queries."""
    h, q, y, tiles = heads, *(operands[name] for name in ("q", "y", "tiles"))
    assert q is not None and y is not None and tiles is not None
    n_tokens, scratch = k.i64(q.shape[0]), k.scratch()
    own = Tile(k, h, **{name: scratch + at for name, at in lay_out(_rooms(h))[0].items()})
    with k.rows((tiles.shape[0], h.n_kv)) as (tile, head):
        token = tile * own.tokens
        own.begin(q, operands["sinks"], token, head)
        own.foresee(q, y, token, head)
        last = n_tokens - 1
        (first_seq, _), (last_seq, _) = (token_of(k, operands, t) for t in (token, k.min(token + (own.tokens - 1), last)))
        for i, rule in enumerate(h.rules):
            keys, values = operands[f"k{i}"], operands[f"v{i}"]
            assert keys is not None and values is not None and keys.table is not None
            with k.loop(first_seq, last_seq + 1) as sequences:
                sequences.next()
                seen = own.look(operands, keys.table, token, last, sequences.i, rule)
                with k.loop(seen.lo // L * L, seen.hi, SLICE) as blocks:
                    blocks.next()
                    block = find_block(k, h, keys, values, sequences.i, head, blocks.i, seen.hi, own.pages)
                    first, stop = k.max(seen.lo - blocks.i, 0), k.min(seen.hi - blocks.i, k.i64(SLICE))
                    own.score(block, keys.dtype, stop)
                    own.weigh(blocks.i, stop)
                    own.add(block, values.dtype, first, stop)
        own.finish(y, token, n_tokens, head)
