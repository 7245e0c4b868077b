"""Attention of many queries to rows in one piece: tiles of queries, and copies of a block's rows as these want them.

A row that only some queries of a tile see may hold an infinite number or NaN, which no weight makes 0: where a tile's result has
one, it is computed again token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tensorgraph.backends.cpu.ir import F32, I1, I32, I64, Type, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.paged_cpu import Heads
from tensorgraph.ops.attention.stored_rows_cpu import L
from tensorgraph.ops.attention.tiles_cpu import (
    BLOCK,
    Tile,
    attempts,
    below,
    each_tile,
    tile_places,
)

Operands = Mapping[str, "Operand | None"]
MOST = (1 << 31) - 1


@dataclass(frozen=True)
class Rows:
    """A block of rows of one kv head, from row `start` on; those behind the last are that one again."""

    k: Kernel
    h: Heads
    held: tuple[Operand, Operand]
    head: Value
    start: Value

    def _row(self, number: Value) -> Value:
        return self.k.min(self.start + number, self.k.i64(self.held[0].shape[0]) - 1)

    def keys(self, row: Value, to: Value) -> Value:
        k, n, width = self.k, min(8, self.k.lanes), self.h.d_k
        rows = [self.held[0].row([self._row(row + r), self.head]) for r in range(L)]

        def some(i: Value, mask: Value | None, _: list[Value]) -> None:
            for first in range(0, L, n):
                across = transposed([k.convert(one.load(i, n, mask), F32) for one in rows[first : first + n]])
                for j, value in enumerate(across):
                    k.store(value, to + ((i + j) * L + first) * 4)

        k.sweep(width, some, lanes=n)
        return to

    def values(self, row: Value, column: Value) -> Callable[[Value], Value]:
        k, width = self.k, self.h.d_v
        mask = None if width % L == 0 else k.tail_mask(L, width - column)
        return lambda r: k.convert(self.held[1].row([self._row(row + r), self.head]).load(column, L, mask), F32)


def transposed(rows: Sequence[Value]) -> list[Value]:
    """The columns of as many rows as they have lanes, 4 or 8; shuffles stay within 16 bytes but for the last."""
    n = len(rows)
    halves = range(0, n, 4)
    pairs = [(rows[i], rows[i + 1]) for i in range(0, n, 2)]
    low = [a.shuffle([x for h in halves for x in (h, n + h, h + 1, n + h + 1)], b) for a, b in pairs]
    high = [a.shuffle([x for h in halves for x in (h + 2, n + h + 2, h + 3, n + h + 3)], b) for a, b in pairs]
    fours: list[list[Value]] = []  # of each four rows: columns 0 (and 4), 1, 2, 3
    for i in range(0, n // 2, 2):
        of_four = []
        for x, y in ((low[i], low[i + 1]), (high[i], high[i + 1])):
            of_four.append(x.shuffle([v for h in halves for v in (h, h + 1, n + h, n + h + 1)], y))
            of_four.append(x.shuffle([v for h in halves for v in (h + 2, h + 3, n + h + 2, n + h + 3)], y))
        fours.append(of_four)
    if n == 4:
        return fours[0]
    return [a.shuffle([*range(h, h + 4), *range(8 + h, 12 + h)], b) for h in (0, 4) for a, b in zip(*fours, strict=True)]


@dataclass(frozen=True)
class Segment:
    """The operands of a segment; `values` may be `keys`."""

    rule: Rule
    keys: Operand
    values: Operand
    pos: Operand | None
    seq: Operand | None


def emit_dense_tiles(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """y [T, H, Dv]."""
    h, q, y, units, pos, seq = heads, *(operands.get(name) for name in ("q", "y", "units", "pos", "seq"))
    assert q is not None and y is not None and units is not None
    places, found = tile_places(k, h), []
    for i, rule in enumerate(h.rules):
        keys = operands[f"k{i}"]
        assert keys is not None
        found.append(Segment(rule, keys, operands.get(f"v{i}") or keys, operands.get(f"pos{i}"), operands.get(f"seq{i}")))

    def attend(kv_head: Value, head: Value, n_heads: Value, token: Value, n_tokens: Value) -> Value:
        """Returns whether a result is NaN or infinite."""
        tile = Tile(k, h, **places, token=token, n_tokens=n_tokens, head=head, n_heads=n_heads)
        tile.begin(q, operands.get("sinks"))
        tile.foresee(q, y)
        for segment in found:
            n_rows = k.i64(segment.keys.shape[0])
            with k.loop(0, n_rows, BLOCK) as blocks:
                blocks.next()
                count = k.min(n_rows - blocks.i, BLOCK)
                any_seen = tile.see(partial(_bits, k, segment, pos, seq, blocks.i, count, token))
                with k.when(any_seen.ne(0)):
                    tile.through(Rows(k, h, (segment.keys, segment.values), kv_head, blocks.i), any_seen)
        return tile.finish(y)

    with each_tile(k, h, k.i64(q.shape[0]), k.i64(units.shape[0])) as (kv_head, head, n_heads, token, n_tokens):
        attempts(k, token, n_tokens, partial(attend, kv_head, head, n_heads), k.const(1, I1))


def _bits(
    k: Kernel,
    segment: Segment,
    pos: Operand | None,
    seq: Operand | None,
    start: Value,
    count: Value,
    first: Value,
    n: Value,
) -> Value:
    """Which of a block's rows the n-th token from `first` on sees."""
    every, window, causal = segment.rule
    wanted: list[tuple[Operand, Callable[[Value], Value]]] = []
    if seq is not None and segment.seq is not None:
        own = _held(k, segment.seq, k.convert(seq.load([first + n]), I64))
        wanted.append((segment.seq, lambda x: x.eq(own)))
    if pos is not None and segment.pos is not None and (causal or window is not None):
        at = k.convert(pos.load([first + n]), I64)
        if causal:
            past = at + 1
            end = k.select(past.lt(0), 0 - (0 - past + (every - 1)) // every, past // every)
            stop = _held(k, segment.pos, end)
            wanted.append((segment.pos, lambda x: x.lt(stop)))
        if window is not None:
            low = _held(k, segment.pos, at - window)
            wanted.append((segment.pos, lambda x: x.gt(low)))
    if not wanted:
        return below(k, count)

    def rows(i: Value, mask: Value | None, carried: list[Value]) -> list[Value]:
        seen = mask
        for operand, holds in wanted:
            numbers = operand.row([]).load(start + i, k.lanes, mask)
            numbers = numbers if operand.dtype.name == "i32" else k.convert(numbers, I64)
            seen = holds(numbers) if seen is None else seen & holds(numbers)
        assert seen is not None
        return [carried[0] | k.convert(seen.bits_as(Type("i", k.lanes)), I64, signed=False) << i]

    return k.sweep(count, rows, [k.i64(0)])[0]


def _held(k: Kernel, rows: Operand, number: Value) -> Value:
    """A number as what a row's is compared with."""
    return k.convert(k.max(k.min(number, MOST), -MOST - 1), I32) if rows.dtype.name == "i32" else number
