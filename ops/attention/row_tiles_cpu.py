"""Attention over streams that are held row by row, as latents are and rows that are chosen: tiles of queries go through them.

Where there are few tokens, what each of them sees is cut into slices, which leave partial results. Of a segment with lists of
rows, which another call has put in order, a tile's tokens go through the rows of all their lists together, or one by one through
their own, or through all rows, whatever takes least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tensorgraph.backends.cpu.ir import I1, Value
from tensorgraph.backends.cpu.kernel import Buffer, Call, Context, Kernel, Ref, lay_out
from tensorgraph.dims import Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend_cpu import stored
from tensorgraph.ops.attention.candidates_cpu import FORMS, RowCosts, Way
from tensorgraph.ops.attention.listed_rows_cpu import listing_call
from tensorgraph.ops.attention.listed_tiles_cpu import Listed, ListSizes, list_rooms
from tensorgraph.ops.attention.paged_cpu import HEAD, Heads, Operands, Seen, emit_combine, token_of
from tensorgraph.ops.attention.paged_tiles_cpu import seen_of
from tensorgraph.ops.attention.row_blocks_cpu import by_sequence, segments_of, through_pages
from tensorgraph.ops.attention.row_costs_cpu import row_costs
from tensorgraph.ops.attention.stored_rows_cpu import L
from tensorgraph.ops.attention.tiles_cpu import (
    BLOCK,
    Tile,
    attempts,
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


def emit_row_tiles(k: Kernel, operands: Operands, *, heads: Heads, lists: ListSizes, way: Way) -> None:
    """y [T, H, Dv]."""
    h, q, y, units = heads, *(operands[name] for name in ("q", "y", "units"))
    assert q is not None and y is not None and units is not None
    segments = segments_of(k, operands, h, lists.strides)
    places, listed = tile_places(k, h), Listed.of(k, h, operands, segments, lists, way)

    with each_tile(k, h, k.i64(q.shape[0]), k.i64(units.shape[0])) as (kv_head, head, n_heads, token, n_tokens):

        def tile_of(token: Value, n_tokens: Value) -> Tile:
            return Tile(k, h, **places, token=token, n_tokens=n_tokens, head=head, n_heads=n_heads)

        together, *counts = listed.unite(tile_of(token, n_tokens)) if listed.segments else [k.const(1, I1)]

        def attend(token: Value, n_tokens: Value) -> Value:
            tile, numbers = tile_of(token, n_tokens), iter(range(len(counts)))
            tile.begin(q, operands["sinks"])
            tile.foresee(q, y)
            for segment in segments:
                if segment.listed is None:
                    by_sequence(k, h, tile, operands, segment, kv_head)
                else:
                    number = next(numbers)
                    listed.through(tile, number, kv_head, counts[number])
            return tile.finish(y)

        attempts(k, token, n_tokens, attend, together)


def emit_row_slices(k: Kernel, operands: Operands, *, heads: Heads, lists: ListSizes, way: Way) -> None:
    """Partial results: `part` [T, Hkv, SLICES, G, HEAD + Dv]. A piece is a token, a slice of all segments and some heads."""
    h, q, part = heads, operands["q"], operands["part"]
    assert q is not None and part is not None
    segments = segments_of(k, operands, h, lists.strides)
    places, listed = tile_places(k, h), Listed.of(k, h, operands, segments, lists, way)
    pieces, at_once = pieces_of(h.group), heads_at_once(h.group)
    with k.rows((q.shape[0], SLICES, h.n_kv * pieces)) as (t, number, piece):
        kv_head, skipped = piece // pieces, piece % pieces * at_once
        n_heads = k.i64(h.group) if pieces == 1 else k.min(h.group - skipped, k.i64(at_once))
        tile = Tile(k, h, **places, token=t, n_tokens=k.i64(1), head=kv_head * h.group + skipped, n_heads=n_heads)
        tile.begin(q, None)
        numbers = iter(range(len(listed.segments)))
        for segment in segments:
            if segment.listed is not None:
                listed.through(tile, next(numbers), kv_head, k.i64(0), partial(_slice, k, number))
                continue
            seq, _ = token_of(k, operands, t)
            seen = seen_of(k, operands, segment.table, t, seq, segment.rule)
            begin = seen.lo // L * L
            slice = _slice(k, number, k.max(seen.hi - begin, 0))
            rows = Seen(begin + slice.lo, begin + slice.hi)
            through_pages(k, h, tile, segment, kv_head, seq, rows, partial(_same, seen))
        to = part.address + (((t * h.n_kv + kv_head) * SLICES + number) * h.group + skipped) * (h.partial * 4)
        tile.leave(to, h.partial, HEAD)


def _same(seen: Seen, _: Value) -> Seen:
    return seen


def _slice(k: Kernel, number: Value, n: Value) -> Seen:
    """A slice of n rows; in whole blocks, so that some may be left with none."""
    each = (n + (SLICES * BLOCK - 1)) // (SLICES * BLOCK) * BLOCK
    return Seen(k.min(number * each, n), k.min((number + 1) * each, n))


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


def row_calls(node: Node, heads: Heads, few: int, context: Context) -> Sequence[Call]:
    """The lists of each segment in order; then slices for up to `few` tokens, and tiles for more."""
    made: list[Call] = []
    refs: dict[str, Ref | None] = {name: None if (x := node.at(name)) is None else Ref(x) for name in ("seq", "pos", "sinks")}
    for i in range(len(heads.rules)):
        for name in (f"k{i}", f"v{i}"):
            x = node.at(name)
            refs[name] = None if x is None else Ref(x, "rows")
        if node.at(f"ids{i}") is not None:
            call = listing_call(node, i)
            made.append(call)
            refs[f"listed{i}"] = call.operands["listed"]
    form = next((form for form in context.lowerings if form in FORMS), None)
    way = Way(row_costs(context.target) if made and form is None else RowCosts(0, 0), form)
    n_tokens, attrs = node.shape[0], {"heads": heads, "lists": ListSizes.of(node, heads), "way": way}
    fewer, more = n_tokens <= few, n_tokens > few
    if fewer is not False:
        made += _slices(node, attrs, refs, Guard() if fewer is True else fewer, min(few, maximum(n_tokens)))
    if more is not False:
        call = tile_call(emit_row_tiles, node, heads, refs, Guard() if more is True else more)
        made.append(replace(call, attrs=attrs, scratch_bytes=_scratch(attrs)))
    return made


def _scratch(attrs: Mapping[str, Any]) -> int:
    return tile_scratch(attrs["heads"]) + lay_out(list_rooms(attrs["heads"], attrs["lists"]))[1]


def _slices(node: Node, attrs: Mapping[str, Any], refs: Mapping[str, Ref | None], guard: Guard, most: int) -> list[Call]:
    q, heads = node.at("q"), attrs["heads"]
    assert q is not None
    part = Ref(Buffer(most * heads.n_heads * SLICES * heads.partial * 4, "partial"))
    given = {name: ref for name, ref in refs.items() if name != "sinks"}
    items = product((q.shape[0], heads.n_kv * pieces_of(heads.group) * SLICES))
    slices = Call(
        emit_row_slices,
        {"q": Ref(q, known=True), **given, "part": part},
        attrs,
        items=items,
        scratch_bytes=_scratch(attrs),
        guard=guard,
        nodes=(node,),
    )
    together = {"part": part, "slices": Ref(SLICES), "sinks": refs["sinks"], "y": Ref(node, known=True)}
    n = product((node.shape[0], heads.n_heads))
    return [slices, Call(emit_combine, together, {"heads": heads}, items=n, guard=guard, nodes=(node,))]
