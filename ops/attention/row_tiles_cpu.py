"""Attention over streams that are held row by row, as latents are and rows that are chosen: tiles of queries go through them.

Where there are few tokens, what each of them sees is cut into slices, which leave partial results. Of a segment with lists of
rows each token goes through its own list alone, which another call has put in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, I64, Value
from tensorgraph.backends.cpu.kernel import Buffer, Call, Context, Kernel, Ref
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.dims import Guard, maximum, product
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.attend_cpu import stored
from tensorgraph.ops.attention.attend_rows_cpu import as_number
from tensorgraph.ops.attention.dense_tiles_cpu import transposed
from tensorgraph.ops.attention.listed_rows_cpu import list_stride, listing_call
from tensorgraph.ops.attention.paged_cpu import HEAD, Heads, Operands, Seen, emit_combine, token_of
from tensorgraph.ops.attention.paged_tiles_cpu import NEVER, seen_of, sequences_of, span_of
from tensorgraph.ops.attention.stored_rows_cpu import Finder, L
from tensorgraph.ops.attention.tiles_cpu import (
    BLOCK,
    Tile,
    attempts,
    below,
    each_tile,
    heads_at_once,
    pieces_of,
    tile_call,
    tile_places,
    tile_scratch,
)

LEAST_GROUP = 4
"""Query heads of a kv head, from which on copies of rows that all of them share pay."""
SLICES = 16
"""Of what one token sees, where tokens are few."""
_ADDRESSES = 2 * BLOCK * 8  # bytes, of a block's keys and values


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
    """The operands of a segment. `listed`: as `emit_lists` leaves it, `stride` numbers for each token."""

    rule: Rule
    keys: Operand
    values: Operand
    listed: Operand | None
    stride: int

    @property
    def table(self) -> Value:
        assert self.keys.table is not None
        return self.keys.table


def _segments(operands: Operands, h: Heads, strides: Sequence[int]) -> list[Segment]:
    found = []
    for i, (rule, stride) in enumerate(zip(h.rules, strides, strict=True)):
        keys = operands[f"k{i}"]
        assert keys is not None
        found.append(Segment(rule, keys, operands.get(f"v{i}") or keys, operands.get(f"listed{i}"), stride))
    return found


def emit_row_tiles(k: Kernel, operands: Operands, *, heads: Heads, strides: Sequence[int]) -> None:
    """y [T, H, Dv]."""
    h, q, y, units = heads, *(operands[name] for name in ("q", "y", "units"))
    assert q is not None and y is not None and units is not None
    places, lists = tile_places(k, h), k.scratch() + tile_scratch(h)

    def attend(kv_head: Value, head: Value, n_heads: Value, token: Value, n_tokens: Value) -> Value:
        tile = Tile(k, h, **places, token=token, n_tokens=n_tokens, head=head, n_heads=n_heads)
        tile.begin(q, operands["sinks"])
        tile.foresee(q, y)
        for segment in _segments(operands, h, strides):
            if segment.listed is None:
                _by_sequence(k, h, tile, operands, segment, kv_head)
            else:
                _through_list(k, h, tile, operands, segment, kv_head, lists, lambda n: (k.i64(0), n))
        return tile.finish(y)

    with each_tile(k, h, k.i64(q.shape[0]), k.i64(units.shape[0])) as (kv_head, head, n_heads, token, n_tokens):
        if any(strides):  # each token has its own list
            with k.loop(token, token + n_tokens) as tokens:
                tokens.next()
                attend(kv_head, head, n_heads, tokens.i, k.i64(1))
        else:
            attempts(k, token, n_tokens, partial(attend, kv_head, head, n_heads))


def emit_row_slices(k: Kernel, operands: Operands, *, heads: Heads, strides: Sequence[int]) -> None:
    """Partial results: `part` [T, Hkv, SLICES, G, HEAD + Dv]. A piece is a token, a slice of all segments and some heads."""
    h, q, part = heads, operands["q"], operands["part"]
    assert q is not None and part is not None
    places, lists = tile_places(k, h), k.scratch() + tile_scratch(h)
    pieces, at_once = pieces_of(h.group), heads_at_once(h.group)
    with k.rows((q.shape[0], SLICES, h.n_kv * pieces)) as (t, number, piece):
        kv_head, skipped = piece // pieces, piece % pieces * at_once
        n_heads = k.i64(h.group) if pieces == 1 else k.min(h.group - skipped, k.i64(at_once))
        tile = Tile(k, h, **places, token=t, n_tokens=k.i64(1), head=kv_head * h.group + skipped, n_heads=n_heads)
        tile.begin(q, None)
        for segment in _segments(operands, h, strides):
            if segment.listed is not None:
                _through_list(k, h, tile, operands, segment, kv_head, lists, partial(_slice, k, number))
                continue
            seq, _ = token_of(k, operands, t)
            seen = seen_of(k, operands, segment.table, t, seq, segment.rule)
            begin = seen.lo // L * L
            start, stop = _slice(k, number, k.max(seen.hi - begin, 0))
            _through_pages(k, h, tile, segment, kv_head, seq, Seen(begin + start, begin + stop), partial(_same, seen))
        to = part.address + (((t * h.n_kv + kv_head) * SLICES + number) * h.group + skipped) * (h.partial * 4)
        tile.leave(to, h.partial, HEAD)


def _same(seen: Seen, _: Value) -> Seen:
    return seen


def _slice(k: Kernel, number: Value, n: Value) -> tuple[Value, Value]:
    """The beginning and the end of a slice of n rows; in whole blocks, so that some may be left with none."""
    each = (n + (SLICES * BLOCK - 1)) // (SLICES * BLOCK) * BLOCK
    return k.min(number * each, n), k.min((number + 1) * each, n)


def _by_sequence(k: Kernel, h: Heads, tile: Tile, operands: Operands, segment: Segment, head: Value) -> None:
    """All rows that a tile's tokens see, sequence by sequence."""
    table, rule = segment.table, segment.rule
    sequences = sequences_of(k, operands, table, tile)
    with k.loop(sequences.lo, sequences.hi) as each:
        each.next()
        span = span_of(k, operands, table, tile, each.i, rule)

        def seen(n: Value) -> Seen:
            return seen_of(k, operands, table, tile.token + n, each.i, rule)

        _through_pages(k, h, tile, segment, head, each.i, Seen(span.lo // L * L, span.hi), seen)


def _through_pages(
    k: Kernel, h: Heads, tile: Tile, segment: Segment, head: Value, seq: Value, rows: Seen, seen: Callable[[Value], Seen]
) -> None:
    """Rows of a sequence from the beginning of a page on; `seen`: what the n-th token sees."""
    with k.when(rows.lo.lt(rows.hi)):
        streams = _streams(k, h, segment, seq, rows.hi)
        with k.loop(rows.lo, rows.hi, BLOCK) as blocks:
            blocks.next()

            def bits(n: Value) -> Value:
                one = seen(n)
                return below(k, k.min(one.hi, rows.hi) - blocks.i) & below(k, one.lo - blocks.i).invert()

            def places(stream: Operand, finder: Finder) -> Places:
                def rows_of(row: Value) -> Callable[[Value], Value]:
                    page = finder.page((blocks.i + row) // L, head)
                    return lambda r: page + r * _row_bytes(stream)

                return rows_of

            found = tile.see(bits)
            with k.when(found.ne(0)):
                tile.through(_stored(k, h, streams, places), found)


def _through_list(
    k: Kernel,
    h: Heads,
    tile: Tile,
    operands: Operands,
    segment: Segment,
    head: Value,
    to: Value,
    part: Callable[[Value], tuple[Value, Value]],
) -> None:
    """A part of the rows that the tile's only token has listed; `to`: room for the addresses of a block's rows."""
    assert segment.listed is not None
    listed = segment.listed.address + tile.token * (segment.stride * 4)
    start, stop = part(k.convert(k.load(listed, I32), I64))
    with k.when(start.lt(stop)):
        seq, _ = token_of(k, operands, tile.token)
        streams = _streams(k, h, segment, seq, k.i64(NEVER))
        with k.loop(start, stop, BLOCK) as blocks:
            blocks.next()
            n = k.min(stop - blocks.i, k.i64(BLOCK))
            with k.loop(0, (n + (L - 1)) & -L) as rows:  # whole pages of them: the last one some more times
                rows.next()
                row = k.convert(k.load(listed + (blocks.i + k.min(rows.i, n - 1) + 1) * 4, I32), I64)
                for i, (stream, finder) in enumerate(streams):
                    address = finder.page(row // L, head) + row % L * _row_bytes(stream)
                    k.store(as_number(k, address), to + (rows.i + i * BLOCK) * 8)

            def places(stream: Operand, finder: Finder) -> Places:
                at = to if finder is streams[0][1] else to + BLOCK * 8
                return lambda row: lambda r: k.convert_pointer(k.load(at + (row + r) * 8, I64))

            found = tile.see(lambda _: below(k, n))
            tile.through(_stored(k, h, streams, places), found)


def _row_bytes(stream: Operand) -> int:
    """Bytes from one row of a page to the next."""
    n_kv, width = stream.shape[1:]
    assert isinstance(n_kv, int) and isinstance(width, int)
    return n_kv * stream.dtype.size_bytes(width)


def _streams(k: Kernel, h: Heads, segment: Segment, seq: Value, stop: Value) -> list[tuple[Operand, Finder]]:
    """The keys, and the values where they are others, and what finds pages of a sequence with rows below `stop`."""
    made = [(segment.keys, Finder.of(k, segment.keys, h.n_kv, h.d_k, seq, stop))]
    if segment.values is not segment.keys:
        made.append((segment.values, Finder.of(k, segment.values, h.n_kv, h.d_v, seq, stop)))
    return made


def _stored(
    k: Kernel, h: Heads, streams: Sequence[tuple[Operand, Finder]], places: Callable[[Operand, Finder], Places]
) -> Stored:
    both = [streams[0], streams[-1]]
    return Stored(k, h, [stream.dtype for stream, _ in both], [places(*one) for one in both])


def row_heads(node: Node, context: Context) -> Heads | None:
    """The extents of an attention whose streams are all held row by row; None where it takes more."""
    q, k0 = node.at("q"), node.at("k0")
    assert q is not None and k0 is not None
    n_heads, d_k, n_kv, d_v = q.shape[1], q.shape[2], k0.shape[1], node.shape[2]
    if not (isinstance(n_heads, int) and isinstance(d_k, int) and isinstance(n_kv, int) and isinstance(d_v, int)):
        return None
    rules = node.attrs["segments"]
    for i in range(len(rules)):
        for x in (node.at(f"k{i}"), node.at(f"v{i}")):
            if x is not None and (x.dtype.name == "f64" or context.layout(stored(x)) != "rows"):
                return None
    group = n_heads // max(n_kv, 1)
    if group < LEAST_GROUP or not d_k or not d_v or d_v % L or q.dtype.name == "f64":
        return None
    return Heads(n_kv, group, d_k, d_v, node.attrs["scale"], node.attrs["softcap"], rules)


def row_calls(node: Node, heads: Heads, few: int) -> Sequence[Call]:
    """The lists of each segment in order; then slices for up to `few` tokens, and tiles for more."""
    made: list[Call] = []
    strides: list[int] = []
    refs: dict[str, Ref | None] = {name: None if (x := node.at(name)) is None else Ref(x) for name in ("seq", "pos", "sinks")}
    for i in range(len(heads.rules)):
        for name in (f"k{i}", f"v{i}"):
            x = node.at(name)
            refs[name] = None if x is None else Ref(x, "rows")
        strides.append(list_stride(node, i))
        if strides[i]:
            call = listing_call(node, i)
            made.append(call)
            refs[f"listed{i}"] = call.operands["listed"]
    n_tokens, attrs = node.shape[0], {"heads": heads, "strides": tuple(strides)}
    fewer, more = n_tokens <= few, n_tokens > few
    if fewer is not False:
        made += _slices(node, attrs, refs, Guard() if fewer is True else fewer, min(few, maximum(n_tokens)))
    if more is not False:
        call = tile_call(emit_row_tiles, node, heads, refs, Guard() if more is True else more)
        made.append(replace(call, attrs=attrs, scratch_bytes=call.scratch_bytes + _ADDRESSES))
    return made


def _slices(node: Node, attrs: Mapping[str, Any], refs: Mapping[str, Ref | None], guard: Guard, most: int) -> list[Call]:
    q, heads = node.at("q"), attrs["heads"]
    assert q is not None
    part = Ref(Buffer(most * heads.n_heads * SLICES * heads.partial * 4, "partial"))
    given = {name: ref for name, ref in refs.items() if name != "sinks"}
    items = product((q.shape[0], heads.n_kv * pieces_of(heads.group) * SLICES))
    scratch = tile_scratch(heads) + _ADDRESSES
    slices = Call(
        emit_row_slices,
        {"q": Ref(q, known=True), **given, "part": part},
        attrs,
        items=items,
        scratch_bytes=scratch,
        guard=guard,
        nodes=(node,),
    )
    together = {"part": part, "slices": Ref(SLICES), "sinks": refs["sinks"], "y": Ref(node, known=True)}
    n = product((node.shape[0], heads.n_heads))
    return [slices, Call(emit_combine, together, {"heads": heads}, items=n, guard=guard, nodes=(node,))]
