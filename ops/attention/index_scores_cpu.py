"""The scores of index_top_k: tiles of the rows that a token sees.

A vector lane is a head: queries are packed as [groups, D, heads of a group], and a few rows meet each group in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import F32, F64, I32, I64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.backends.cpu.sorting import AHEAD, TILE, write_lanes
from tensorgraph.backends.cpu.state_calls import field, n_sequences, row_address, widen_blocks
from tensorgraph.backends.cpu.target import Target
from tensorgraph.ops.attention.attn_mask_cpu import visible
from tensorgraph.ops.attention.stored_rows_cpu import LINE

Slots = Mapping[str, Operand]
MOST_UNROLLED = 256  # elements of a row
AHEAD_BYTES = 4096
"""So far ahead of what is read, memory is asked for."""
Place = Callable[[Value], tuple[Value, Int]]
"""The address and the element stride of a row."""
Part = Callable[[Value, Value, Place, list[Value]], list[Value]]
"""`part(start, n, place, state)`: what is done with n rows from `start` on, and what is carried on from it."""


@dataclass(frozen=True)
class Tiling:
    """How many heads and rows meet in registers, and where what lies in scratch.

    Attributes:
        rows: of a block; vectors: of heads in a group; groups: that hold all heads.
    """

    n_heads: int
    width: int
    lanes: int
    vectors: int
    rows: int

    @staticmethod
    def of(n_heads: int, width: int, target: Target) -> Tiling:
        lanes = target.vector_bytes // 4
        most = 4 if target.has & {"avx512", "neon"} else 2  # as registers allow
        return Tiling(n_heads, width, lanes, max(1, min(most, -(-n_heads // lanes))), 6)

    @property
    def group(self) -> int:
        return self.vectors * self.lanes

    @property
    def groups(self) -> int:
        return -(-self.n_heads // self.group)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of 4 bytes: packed queries, their weights, a block of rows, a tile's row numbers and its scores."""
        padded = self.groups * self.group
        return padded * self.width, padded, self.rows * self.row, TILE + AHEAD, TILE + AHEAD

    @property
    def row(self) -> int:
        return -(-self.width // self.lanes) * self.lanes


@dataclass(frozen=True)
class Scorer:
    """Scores of the rows that a token sees: their numbers (i32) and scores (f32) stand in scratch, a tile at a time."""

    k: Kernel
    operands: Slots
    every: int
    tiling: Tiling
    queries: Value
    weights: Value
    block: Value
    numbers: Value
    scores: Value

    @property
    def own(self) -> bool:
        """Whether the keys are of a stream whose rows have their numbers as positions, so that none of these is read."""
        return self.operands.get("k_pos") is None

    @staticmethod
    def of(k: Kernel, operands: Slots, every: int, memory: Value) -> Scorer:
        n_heads, width = operands["q"].shape[1:]
        assert isinstance(n_heads, int) and isinstance(width, int)
        tiling = Tiling.of(n_heads, width, k.target)
        places = [memory]
        for n in tiling.sizes[:-1]:
            places.append(places[-1] + 4 * n)
        return Scorer(k, operands, every, tiling, *places)

    def begin(self, t: Value) -> tuple[Value, Value]:
        """Pack a token's queries; its position and sequence."""
        self.pack(t)
        return self.token(t)

    def pack(self, t: Value) -> None:
        """Write a token's queries as they meet rows."""
        _pack(self.k, self.tiling, self.operands["q"], self.operands["w"], t, self.queries, self.weights)

    def token(self, t: Value) -> tuple[Value, Value]:
        """Its position and sequence."""
        k = self.k
        pos, seq = (k.convert(self.operands[name].load([t]), I64) for name in ("q_pos", "q_seq"))
        return pos, seq

    def tile(self, token: tuple[Value, Value], start: Value, n: Value, place: Place) -> Value:
        """Score those rows of the n (at most TILE) from `start` on that the token sees; returns how many they are."""
        k, keys, tiling = self.k, self.operands["k"], self.tiling

        def see(i: Value, mask: Value | None, counts: list[Value]) -> list[Value]:
            at = start + i
            pos, seq = (k.convert(self.operands[name].row([]).load(at, k.lanes, mask), I64) for name in ("k_pos", "k_seq"))
            seen = visible(k, *token, pos, seq, every=self.every)
            own = k.lane_numbers(k.lanes) + k.narrow(at, I32)
            taken = seen if mask is None else seen & mask
            return [write_lanes(k, taken, counts[0], (own, self.numbers + counts[0] * 4))]

        def list_all(i: Value, mask: Value | None, _: list[Value]) -> None:
            k.store(k.lane_numbers(k.lanes) + k.narrow(start + i, I32), self.numbers + i * 4)

        if self.own:
            k.sweep(n, list_all)
            count = n
        else:
            (count,) = k.sweep(n, see, [k.i64(0)])
        with k.loop(0, count, tiling.rows) as blocks:
            blocks.next()
            with k.loop(0, tiling.rows) as each:
                each.next()
                listed = k.min(blocks.i + each.i, count - 1)
                address, stride = place(k.convert(k.load(self.numbers + listed * 4, I32), I64))
                to = self.block + each.i * (tiling.row * 4)
                if keys.dtype.is_block and keys.table is not None:
                    widen_blocks(k, keys.dtype, address, to, tiling.width)
                else:
                    _widen(k, Row(k, keys.dtype, address, stride), to, tiling.width)
                    if keys.table is not None:
                        for line in range(0, keys.dtype.size_bytes(tiling.width), LINE):
                            k.prefetch(address + (AHEAD_BYTES + line))
            for r, score in enumerate(_score(k, tiling, self.queries, self.weights, self.block)):
                k.store(score, self.scores + (blocks.i + r) * 4)
        return count

    def each_part(self, token: tuple[Value, Value], first: Value, n: Value, part: Part, state: list[Value]) -> list[Value]:
        """The parts of n rows from `first` on: those of each sequence of a stream (of the token's own, as many as it sees, where
        that is known), or all of them."""
        k, keys, (pos, seq) = self.k, self.operands["k"], token
        table = keys.table
        if table is None:
            return part(first, n, lambda s: (keys.at([s]), keys.strides[1]), state)
        begin, end = k.i64(0), n_sequences(k, table)
        if self.own:  # that sequence alone, or none where it is not in the batch
            there = seq.below(end)
            begin, end = k.select(there, seq, k.i64(0)), k.select(there, seq + 1, k.i64(0))
        with k.loop(begin, end, 1, state) as loop:
            at, from_row, stop = (field(k, table, loop.i, f"seen_{name}") for name in ("at", "start", "stop"))
            if self.own:
                stop = k.max(k.min(stop, k.max(pos + 1, 0) // self.every), from_row)
            start = k.max(first, at)
            stop = k.max(start, k.min(first + n, at + stop - from_row))
            loop.next(*part(start, stop - start, lambda s: row_address(k, keys, loop.i, s - at + from_row), loop.values))
        return loop.results


def _pack(k: Kernel, tiling: Tiling, q: Operand, w: Operand, t: Value, queries: Value, weights: Value) -> None:
    """A token's queries as [groups, D, group] and their weights, with zeros for heads that are not there."""
    lanes, group = tiling.lanes, tiling.group
    with k.loop(0, tiling.groups * group, lanes) as loop:
        loop.next()
        mask = k.tail_mask(lanes, tiling.n_heads - loop.i)
        k.store(k.convert(w.row([t]).load(loop.i, lanes, mask), F32), weights + loop.i * 4)
        with k.loop(0, tiling.width) as inner:
            inner.next()
            at = (loop.i // group * tiling.width + inner.i) * group + loop.i % group
            k.store(k.convert(q.row([t, inner.i], axis=1).load(loop.i, lanes, mask), F32), queries + at * 4)


def _widen(k: Kernel, row: Row, to: Value, width: int) -> None:
    """A row in f32."""
    if row.stride == 1 and width % k.lanes == 0 and width <= MOST_UNROLLED:
        for i in range(0, width, k.lanes):
            k.store(k.convert(row.load(k.i64(i), k.lanes), F32), to + i * 4)
        return

    def body(i: Value, mask: Value | None, _: list[Value]) -> None:
        k.store(k.convert(row.load(i, k.lanes, mask), F32), to + i * 4, mask=mask)

    k.sweep(width, body)


def _score(k: Kernel, tiling: Tiling, queries: Value, weights: Value, block: Value) -> list[Value]:
    """Of each row of a block: products over D in f32, weighed in f32, summed over heads in f64 and rounded to f32."""
    lanes, group, rows, vectors = tiling.lanes, tiling.group, range(tiling.rows), range(tiling.vectors)
    wide = F32.x(lanes)
    with k.loop(0, tiling.groups, 1, [k.zero(F64.x(lanes))] * tiling.rows) as groups:
        with k.loop(0, tiling.width, 1, [k.zero(wide)] * (tiling.rows * tiling.vectors)) as loop:
            at = queries + (groups.i * tiling.width + loop.i) * (group * 4)
            parts = [k.load(at + v * lanes * 4, wide) for v in vectors]
            sums: list[Value] = []
            for r in rows:
                x = k.splat(k.load(block + (loop.i + r * tiling.row) * 4, F32), lanes)
                sums += [k.fma(parts[v], x, loop.values[r * tiling.vectors + v]) for v in vectors]
            loop.next(*sums)
        totals = list(groups.values)
        for v in vectors:
            head = groups.i * group + v * lanes
            weight = k.load(weights + head * 4, wide)
            there = k.tail_mask(lanes, tiling.n_heads - head) if tiling.n_heads % group else None
            for r in rows:
                product = loop.results[r * tiling.vectors + v]
                weighed = k.select(product.lt(0.0), 0.0, product) * weight  # NaN stays
                if there is not None:
                    weighed = k.select(there, weighed, 0.0)
                totals[r] = totals[r] + k.convert(weighed, F64)
        groups.next(*totals)
    return [k.convert(k.sum(total), F32) for total in groups.results]
