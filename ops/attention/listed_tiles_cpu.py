"""Tiles over rows that each token has listed: its own ones, those of all lists of a tile, or all that some token might see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import I64, Value
from tensorgraph.backends.cpu.kernel import Kernel, lay_out
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dims import maximum
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend_rows_cpu import as_number
from tensorgraph.ops.attention.candidates_cpu import Candidates, Way
from tensorgraph.ops.attention.listed_rows_cpu import WORD, list_stride
from tensorgraph.ops.attention.paged_cpu import Heads, Operands, Seen
from tensorgraph.ops.attention.paged_tiles_cpu import NEVER, sequences_of, span_of
from tensorgraph.ops.attention.row_blocks_cpu import Places, Segment, row_bytes, stored_block, streams_of
from tensorgraph.ops.attention.stored_rows_cpu import Finder, L
from tensorgraph.ops.attention.tiles_cpu import BLOCK, Tile, tile_scratch, unit_tokens, units_at_once


@dataclass(frozen=True)
class ListSizes:
    """Attributes:
    strides: by segment, the numbers that a token's list has room for, 0 where there are no lists.
    united: by segment with lists, the most rows that all lists of a tile hold.
    rows: the most that any of these segments has.
    """

    strides: tuple[int, ...]
    united: tuple[int, ...]
    rows: int

    @staticmethod
    def of(node: Node, h: Heads) -> ListSizes:
        strides = tuple(list_stride(node, i) for i in range(len(h.rules)))
        extents = [maximum(node.inputs[node.slots.index(f"k{i}")].shape[0]) for i, n in enumerate(strides) if n]
        united = (min(tile_tokens(h) * (n - 1), rows) for n, rows in zip(filter(None, strides), extents, strict=True))
        return ListSizes(strides, tuple(united), max(extents, default=0))


def tile_tokens(h: Heads) -> int:
    """The tokens of a tile, at most."""
    return units_at_once(h.group) * unit_tokens(h.group)


def list_rooms(h: Heads, sizes: ListSizes) -> dict[str, int]:
    """What lies in scratch, and its bytes."""
    rooms = dict.fromkeys(("keys", "values", "numbers"), BLOCK * 8) | {"next": tile_tokens(h) * 8}
    rooms |= {f"united{i}": n * 4 for i, n in enumerate(sizes.united)}
    return rooms | {"bits": -(-sizes.rows // WORD) * 8}


@dataclass(frozen=True)
class Listed:
    """The segments of an attention that have lists. `places`: what `list_rooms` makes room for."""

    k: Kernel
    h: Heads
    operands: Operands
    segments: Sequence[Segment]
    places: Mapping[str, Value]
    way: Way

    @staticmethod
    def of(k: Kernel, h: Heads, operands: Operands, segments: Sequence[Segment], sizes: ListSizes, way: Way) -> Listed:
        """Those of all segments that have lists."""
        behind = k.scratch() + tile_scratch(h)
        places = {name: behind + at for name, at in lay_out(list_rooms(h, sizes))[0].items()}
        return Listed(k, h, operands, [s for s in segments if s.listed is not None], places, way)

    def unite(self, tile: Tile) -> list[Value]:
        """Whether all tokens of a tile go together, and of each segment how many rows they then have listed."""
        k, (first, *_) = self.k, self.segments
        alone = [tile.n_tokens.eq(1), *[k.i64(0)] * len(self.segments)]
        if self.way.form == "gather":
            return alone
        sequences = sequences_of(k, self.operands, first.table, tile)

        def several() -> list[Value]:
            together, apart, counts = k.i64(0), k.i64(0), []
            for i, segment in enumerate(self.segments):
                assert segment.listed is not None
                span = span_of(k, self.operands, segment.table, tile, sequences.lo, segment.rule)
                n, total = segment.listed.unite(tile.token, tile.n_tokens, span, self.places[f"united{i}"], self.places["bits"])
                counts.append(n)
                together = together + self.way.candidates(k, tile.slots(tile.n), span, self.places[f"united{i}"], n).cost
                apart = apart + total * self.way.each(tile.slots(tile.n_heads), self.way.costs.listed)
            return [n.ge(0) if self.way.form is not None else together.le(apart), *counts]

        return k.either(tile.n_tokens.gt(1) & (sequences.hi - sequences.lo).eq(1), several, lambda: alone)

    def through(self, tile: Tile, number: int, head: Value, united: Value, part: Callable[[Value], Seen] | None = None) -> None:
        """The candidates of a tile, all of whose tokens are of one sequence, in a segment; or a part of them, given their number.

        `united`: how many rows its tokens have listed, where they are several.
        """
        k, segment = self.k, self.segments[number]
        assert segment.listed is not None
        seq = sequences_of(k, self.operands, segment.table, tile).lo
        span = span_of(k, self.operands, segment.table, tile, seq, segment.rule)
        one = tile.n_tokens.eq(1)
        own, both = segment.listed.rows(tile.token), self.places[f"united{number}"]
        n = k.select(one, segment.listed.count(tile.token), united)
        found = self.way.candidates(k, tile.slots(tile.n), span, k.select(one, own, both), n)
        part_of = Seen(k.i64(0), found.count) if part is None else part(found.count)
        with k.when(part_of.lo.lt(part_of.hi)):
            self._blocks(tile, segment, head, seq, found, part_of)

    def _blocks(self, tile: Tile, segment: Segment, head: Value, seq: Value, candidates: Candidates, part: Seen) -> None:
        k, lists, places = self.k, segment.listed, self.places
        assert lists is not None
        streams = streams_of(k, self.h, segment, seq, k.i64(NEVER))
        at = [places["keys"], places["values"]]
        with k.loop(0, tile.n_tokens) as each:
            each.next()
            k.store(lists.below(tile.token + each.i, candidates.row(part.lo)), places["next"] + each.i * 8)
        with k.loop(part.lo, part.hi, BLOCK) as blocks:
            blocks.next()
            n = k.min(part.hi - blocks.i, k.i64(BLOCK))
            with k.loop(0, (n + (L - 1)) & -L) as rows:  # whole pages of them: the last one some more times
                rows.next()
                row = candidates.row(blocks.i + k.min(rows.i, n - 1))
                k.store(row, places["numbers"] + rows.i * 8)
                for (stream, finder), place in zip(streams, at, strict=False):
                    address = finder.page(row // L, head) + row % L * row_bytes(stream)
                    k.store(as_number(k, address), place + rows.i * 8)

            def bits(token: Value) -> Value:
                place = places["next"] + token * 8
                found, following = lists.bits(tile.token + token, k.load(place, I64), places["numbers"], n)
                k.store(following, place)
                return found

            def places_of(stream: Operand, finder: Finder) -> Places:
                start = at[0 if finder is streams[0][1] else 1]
                return lambda row: lambda r: k.convert_pointer(k.load(start + (row + r) * 8, I64))

            found = tile.see(bits)
            with k.when(found.ne(0)):
                tile.through(stored_block(k, self.h, streams, places_of), found)
