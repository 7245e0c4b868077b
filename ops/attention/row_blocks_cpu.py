"""Blocks of rows of streams that are held row by row, as tiles of queries go through them: those that a stream holds in a row,
or any that are listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.dtypes import DType
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.candidates_cpu import Lists
from tensorgraph.ops.attention.dense_tiles_cpu import transposed
from tensorgraph.ops.attention.paged_cpu import Heads, Operands, Seen
from tensorgraph.ops.attention.paged_tiles_cpu import seen_of, sequences_of, span_of
from tensorgraph.ops.attention.stored_rows_cpu import Finder, L
from tensorgraph.ops.attention.tiles_cpu import BLOCK, Tile, below

Places = Callable[[Value], Callable[[Value], Value]]


@dataclass(frozen=True)
class Stored:
    """A block of rows of one kv head. `places`: of keys, of values: of 16 rows from a row on, where the r-th begins."""

    k: Kernel
    h: Heads
    dtypes: Sequence[DType]
    places: Sequence[Places]

    def keys(self, row: Value, to: Value) -> Value:
        k, n, width = self.k, min(8, self.k.lanes), self.h.d_k
        place = self.places[0](row)
        rows = [place(k.i64(r)) for r in range(L)]

        def some(i: Value, mask: Value | None, _: list[Value]) -> None:
            for first in range(0, L, n):
                across = transposed([elements(k, self.dtypes[0], at, i, n, mask) for at in rows[first : first + n]])
                for j, value in enumerate(across):
                    k.store(value, to + ((i + j) * L + first) * 4)

        k.sweep(width, some, lanes=n)
        return to

    def values(self, row: Value, column: Value) -> Callable[[Value], Value]:
        place = self.places[1](row)
        return lambda r: elements(self.k, self.dtypes[1], place(r), column, L, None)


def elements(k: Kernel, dtype: DType, address: Value, i: Value, n: int, mask: Value | None) -> Value:
    """Elements i to i + n - 1 of the row there, in f32; of a block type within one block."""
    if not dtype.is_block:
        return k.convert(Row(k, dtype, address, 1).load(i, n, mask), F32)
    at = address + i // dtype.block_size * dtype.block_bytes
    codes = k.load(at + (i % dtype.block_size + 2), I8.x(n))
    return k.convert(k.convert(codes, I32), F32) * k.splat(k.half_to_f32(k.load(at, I16)), n)


@dataclass(frozen=True)
class Segment:
    """The operands of a segment, and what each token has listed of its rows."""

    rule: Rule
    keys: Operand
    values: Operand
    listed: Lists | None

    @property
    def table(self) -> Value:
        assert self.keys.table is not None
        return self.keys.table


def segments_of(k: Kernel, operands: Operands, h: Heads, strides: Sequence[int]) -> list[Segment]:
    found = []
    for i, (rule, stride) in enumerate(zip(h.rules, strides, strict=True)):
        keys, listed = operands[f"k{i}"], operands.get(f"listed{i}")
        assert keys is not None
        lists = None if listed is None else Lists(k, listed.address, stride)
        found.append(Segment(rule, keys, operands.get(f"v{i}") or keys, lists))
    return found


def by_sequence(k: Kernel, h: Heads, tile: Tile, operands: Operands, segment: Segment, head: Value) -> None:
    """All rows that a tile's tokens see, sequence by sequence."""
    table, rule = segment.table, segment.rule
    sequences = sequences_of(k, operands, table, tile)
    with k.loop(sequences.lo, sequences.hi) as each:
        each.next()
        span = span_of(k, operands, table, tile, each.i, rule)

        def seen(n: Value) -> Seen:
            return seen_of(k, operands, table, tile.token + n, each.i, rule)

        through_pages(k, h, tile, segment, head, each.i, Seen(span.lo // L * L, span.hi), seen)


def through_pages(
    k: Kernel, h: Heads, tile: Tile, segment: Segment, head: Value, seq: Value, rows: Seen, seen: Callable[[Value], Seen]
) -> None:
    """Rows of a sequence from the beginning of a page on; `seen`: what the n-th token sees."""
    with k.when(rows.lo.lt(rows.hi)):
        streams = streams_of(k, h, segment, seq, rows.hi)
        with k.loop(rows.lo, rows.hi, BLOCK) as blocks:
            blocks.next()

            def bits(n: Value) -> Value:
                one = seen(n)
                return below(k, k.min(one.hi, rows.hi) - blocks.i) & below(k, one.lo - blocks.i).invert()

            def places(stream: Operand, finder: Finder) -> Places:
                def rows_of(row: Value) -> Callable[[Value], Value]:
                    page = finder.page((blocks.i + row) // L, head)
                    return lambda r: page + r * row_bytes(stream)

                return rows_of

            found = tile.see(bits)
            with k.when(found.ne(0)):
                tile.through(stored_block(k, h, streams, places), found)


def row_bytes(stream: Operand) -> int:
    """Bytes from one row of a page to the next."""
    n_kv, width = stream.shape[1:]
    assert isinstance(n_kv, int) and isinstance(width, int)
    return n_kv * stream.dtype.size_bytes(width)


def streams_of(k: Kernel, h: Heads, segment: Segment, seq: Value, stop: Value) -> list[tuple[Operand, Finder]]:
    """The keys, and the values where they are others, and what finds pages of a sequence with rows below `stop`."""
    made = [(segment.keys, Finder.of(k, segment.keys, h.n_kv, h.d_k, seq, stop))]
    if segment.values is not segment.keys:
        made.append((segment.values, Finder.of(k, segment.values, h.n_kv, h.d_v, seq, stop)))
    return made


def stored_block(
    k: Kernel, h: Heads, streams: Sequence[tuple[Operand, Finder]], places: Callable[[Operand, Finder], Places]
) -> Stored:
    both = [streams[0], streams[-1]]
    return Stored(k, h, [stream.dtype for stream, _ in both], [places(*one) for one in both])
