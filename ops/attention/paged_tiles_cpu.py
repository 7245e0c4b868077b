"""Attention over streams for many tokens: tiles of queries, and a stream's pages where they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.state_calls import n_sequences
from tensorgraph.dtypes import DType, f32
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.paged_cpu import Heads, Operands, Seen, seen_rows, segments, token_of
from tensorgraph.ops.attention.stored_rows_cpu import Finder, L, copy_keys, value_elements
from tensorgraph.ops.attention.tiles_cpu import BLOCK, Tile, below, each_tile, tile_places

NEVER = 1 << 40  # a row that no sequence has


@dataclass(frozen=True)
class Pages:
    """A block of a stream's rows of one kv head, from row `start` of a sequence on. `finders`: of keys, of values."""

    k: Kernel
    h: Heads
    dtypes: tuple[DType, DType]
    finders: tuple[Finder, Finder]
    head: Value
    start: Value

    def keys(self, row: Value, to: Value) -> Value:
        page = self.finders[0].page((self.start + row) // L, self.head)
        if self.dtypes[0] is f32:
            return page
        copy_keys(self.k, self.dtypes[0], self.h.d_k, page, to)
        return to

    def values(self, row: Value, column: Value) -> Callable[[Value], Value]:
        page = self.finders[1].page((self.start + row) // L, self.head)
        return lambda r: value_elements(self.k, self.dtypes[1], page, r, column)


def emit_tiles(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """y [T, H, Dv]."""
    h, q, y, units = heads, *(operands[name] for name in ("q", "y", "units"))
    assert q is not None and y is not None and units is not None
    places = tile_places(k, h)
    with each_tile(k, h, k.i64(q.shape[0]), k.i64(units.shape[0])) as (kv_head, head, n_heads, token, n_tokens):
        tile = Tile(k, h, **places, token=token, n_tokens=n_tokens, head=head, n_heads=n_heads)
        tile.begin(q, operands["sinks"])
        tile.foresee(q, y)
        go_through(k, h, tile, operands, kv_head)
        tile.finish(y)


def go_through(k: Kernel, h: Heads, tile: Tile, operands: Operands, head: Value) -> None:
    """All rows that a tile's tokens see."""
    for keys, values, rule in segments(operands, h):
        assert keys.table is not None
        table = keys.table
        sequences = sequences_of(k, operands, table, tile)
        with k.loop(sequences.lo, sequences.hi) as each:
            each.next()
            seen = span_of(k, operands, table, tile, each.i, rule)
            with k.when(seen.lo.lt(seen.hi)):
                finders = [Finder.of(k, s, h.n_kv, width, each.i, seen.hi) for s, width in ((keys, h.d_k), (values, h.d_v))]
                with k.loop(seen.lo // L * L, seen.hi, BLOCK) as blocks:
                    blocks.next()
                    found = tile.see(partial(_bits, k, operands, table, each.i, rule, blocks.i, tile.token))
                    source = Pages(k, h, (keys.dtype, values.dtype), (finders[0], finders[1]), head, blocks.i)
                    with k.when(found.ne(0)):
                        tile.through(source, found)


def seen_of(k: Kernel, operands: Operands, table: Value, token: Value, seq: Value, rule: Rule) -> Seen:
    """What a token sees of a sequence: nothing of another's, or of one that is not there."""
    own, pos = token_of(k, operands, token)
    there = own.eq(seq) & own.below(n_sequences(k, table))
    seen = seen_rows(k, table, k.select(there, seq, k.i64(0)), pos, rule)
    some = there & seen.lo.lt(seen.hi)
    return Seen(k.select(some, seen.lo, k.i64(NEVER)), k.select(some, seen.hi, k.i64(0)))


def sequences_of(k: Kernel, operands: Operands, table: Value, tile: Tile) -> Seen:
    """From the first to the last sequence of a tile's tokens, of those that are there."""
    n = n_sequences(k, table)
    with k.loop(0, tile.n_tokens, 1, [n, k.i64(0)]) as each:
        (own, _), (low, high) = token_of(k, operands, tile.token + each.i), each.values
        there = own.below(n)
        each.next(k.select(there, k.min(low, own), low), k.select(there, k.max(high, own + 1), high))
    return Seen(*each.results)


def _bits(k: Kernel, operands: Operands, table: Value, seq: Value, rule: Rule, start: Value, first: Value, n: Value) -> Value:
    """Which rows of the block from `start` on the n-th token from `first` on sees."""
    seen = seen_of(k, operands, table, first + n, seq, rule)
    return below(k, seen.hi - start) & below(k, seen.lo - start).invert()


def span_of(k: Kernel, operands: Operands, table: Value, tile: Tile, seq: Value, rule: Rule) -> Seen:
    """All that any of a tile's tokens sees of a sequence."""
    with k.loop(0, tile.n_tokens, 1, [k.i64(NEVER), k.i64(0)]) as each:
        seen = seen_of(k, operands, table, tile.token + each.i, seq, rule)
        each.next(k.min(each.values[0], seen.lo), k.max(each.values[1], seen.hi))
    return Seen(*each.results)
