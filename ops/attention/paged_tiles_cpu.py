"""Attention over dense streams for many tokens: a tile of queries goes through the rows once, with a running soft-max."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorgraph.backends.cpu.functions import exp_nonpositive
from tensorgraph.backends.cpu.ir import F32, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.ops.attention.paged_cpu import (
    SLICE,
    Block,
    Heads,
    L,
    Seen,
    add_values,
    find_block,
    masked,
    queries_at_once,
    scores,
    seen_rows,
    token_of,
    tree,
    value_blocks,
)

Operands = Mapping[str, Operand | None]


def tile_tokens(group: int) -> int:
    """Tokens of a tile: about 12 queries with all their heads."""
    return max(1, 12 // group)


def tile_scratch(h: Heads) -> int:
    """Bytes that a thread needs for one tile: weights, and for each query the sums, the maximum and the sum of weights."""
    rows = tile_tokens(h.group) * h.group
    return rows * (SLICE + h.d_v) * 4 + rows * 2 * 64 + 64


def emit_tiles(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """y [T, H, Dv], tile by tile of queries."""
    h, q, y, tiles = heads, *(operands[name] for name in ("q", "y", "tiles"))
    assert q is not None and y is not None and tiles is not None
    n_tokens, per_tile = k.i64(q.shape[0]), tile_tokens(h.group)
    rows = per_tile * h.group
    weights = k.scratch()
    sums = weights + rows * SLICE * 4
    tops = sums + rows * h.d_v * 4
    with k.rows((tiles.shape[0], h.n_kv)) as (tile, head):
        tokens = [k.min(tile * per_tile + i, n_tokens - 1) for i in range(per_tile)]
        found = [token_of(k, operands, t) for t in tokens]
        queries = [q.at([t, head * h.group + g]) for t in tokens for g in range(h.group)]
        sinks = operands["sinks"]
        for r in range(rows):
            sink = sinks.load([head * h.group + r % h.group]) if sinks is not None else None
            k.store(k.const(float("-inf"), F32) if sink is None else sink, tops + r * 128)
            k.store(k.const(0.0 if sink is None else 1.0, F32), tops + r * 128 + 64)
            for v in range(h.d_v // L):
                k.store(k.zero(F32.x(L)), sums + (r * h.d_v + v * L) * 4)
        for i, rule in enumerate(h.rules):
            keys, values = operands[f"k{i}"], operands[f"v{i}"]
            assert keys is not None and values is not None and keys.table is not None
            with k.loop(found[0][0], found[-1][0] + 1) as sequences:
                sequences.next()
                each = []
                for seq, pos in found:
                    seen = seen_rows(k, keys.table, sequences.i, pos, rule)
                    own = seq.eq(sequences.i)
                    each.append(Seen(k.select(own, seen.lo, k.i64(1 << 40)), k.select(own, seen.hi, k.i64(0))))
                lo, hi = each[0].lo, each[0].hi
                for seen in each[1:]:
                    lo, hi = k.min(lo, seen.lo), k.max(hi, seen.hi)
                with k.loop(lo // L * L, hi, SLICE) as blocks:
                    blocks.next()
                    block = find_block(k, h, keys, values, sequences.i, head, blocks.i, hi)
                    bounds = [Seen(s.lo, k.max(s.hi, s.lo)) for s in each]
                    update(k, h, keys.dtype, block, queries, bounds, hi, weights, sums, tops)
                    first, stop = k.max(lo - blocks.i, 0), k.min(hi - blocks.i, k.i64(SLICE))
                    for mine, at, n in value_blocks(k, h, rows):
                        places = [sums + (r * h.d_v + at + v * L) * 4 for r in mine for v in range(n)]
                        loaded = [k.load(place, F32.x(L)) for place in places]
                        listed = [weights + r * SLICE * 4 for r in mine]
                        for place, total in zip(
                            places, add_values(k, h, values.dtype, block, first, stop, listed, loaded, at), strict=True
                        ):
                            k.store(total, place)
        for r in range(rows):
            token = tile * per_tile + r // h.group
            with k.when(token.lt(n_tokens)):
                total = k.load(tops + r * 128 + 64, F32)
                inverse = k.splat(1.0 / k.select(total.eq(0.0), k.const(1.0, F32), total), L)
                out = y.at([token, head * h.group + r % h.group])
                for v in range(h.d_v // L):
                    k.store(k.load(sums + (r * h.d_v + v * L) * 4, F32.x(L)) * inverse, out + v * L * 4)


def update(
    k: Kernel,
    h: Heads,
    dtype: Any,
    block: Block,
    queries: Sequence[Value],
    bounds: Sequence[Seen],
    hi: Value,
    weights: Value,
    sums: Value,
    tops: Value,
) -> None:
    """Score a block for all queries, and bring maxima, sums and weighed values to the new maxima."""
    pages = range(SLICE // L)
    at_once = 2 if k.lanes == L else 1
    together = queries_at_once(k, at_once)
    for r in range(0, len(queries), together):
        mine = range(r, min(r + together, len(queries)))
        for p in range(0, len(pages), at_once):
            some = pages[p : p + at_once]
            places = [weights + (m * SLICE + page * L) * 4 for m in mine for page in some]
            read = (block.start + p * L).lt(hi)  # whether any query sees rows of these pages
            with k.when(read):
                found = scores(k, h, dtype, block, some, [queries[m] for m in mine])
                shown = [
                    masked(k, block, q, s, bounds[m // h.group])
                    for m, row in zip(mine, found, strict=True)
                    for q, s in zip(some, row, strict=True)
                ]
                for place, score in zip(places, shown, strict=True):
                    k.store(score, place)
            with k.when(read.invert()):
                for place in places:
                    k.store(k.const(float("-inf"), F32.x(L)), place)
    with k.loop(0, len(queries)) as each:
        each.next()
        at, place = weights + each.i * (SLICE * 4), tops + each.i * 128
        before, total = k.load(place, F32), k.load(place + 64, F32)
        row = [k.load(at + p * L * 4, F32.x(L)) for p in pages]
        top = k.max(before, k.fold(tree(k, row, k.max), k.max))
        shift = k.select(top.eq(float("-inf")), 0.0, top)
        old, shifts, lanes = exp_nonpositive(k, before - shift), k.splat(shift, k.lanes), k.lanes
        with k.loop(0, SLICE, 2 * lanes, [k.zero(F32.x(lanes))] * 2) as cells:
            following = []
            for i, so_far in enumerate(cells.values):
                cell = at + (cells.i + i * lanes) * 4
                value = exp_nonpositive(k, k.load(cell, F32.x(lanes)) - shifts)
                k.store(value, cell)
                following.append(so_far + value)
            cells.next(*following)
        a, b = cells.results
        k.store(top, place)
        k.store(k.fma(old, total, k.sum(a + b)), place + 64)
        factor = k.splat(old, L)
        for v in range(h.d_v // L):
            one = sums + (each.i * h.d_v + v * L) * 4
            k.store(k.load(one, F32.x(L)) * factor, one)
