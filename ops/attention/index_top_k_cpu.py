"""index_top_k on the CPU: tiles of the rows that a token sees are scored, and the best so far are kept.

A vector lane is a head: queries are packed as [groups, D, heads of a group], and a few rows meet each group in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import F32, F64, I32, I64, Int, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.backends.cpu.sorting import AHEAD, TILE, Least, least_bytes, lowest_key, ordered_key, write_lanes
from tensorgraph.backends.cpu.state_calls import field, n_sequences, row_address
from tensorgraph.backends.cpu.target import Target
from tensorgraph.dims import maximum
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attn_mask_cpu import visible
from tensorgraph.ops.attention.index_top_k import index_top_k


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


def _calls(node: Node, context: Context) -> Sequence[Call]:
    slots = dict(zip(node.slots, node.inputs, strict=True))
    _, n_heads, width = slots["q"].shape
    assert isinstance(n_heads, int) and isinstance(width, int)
    refs: dict[str, Ref | None] = {name: Ref(value, known=name in ("q", "w")) for name, value in slots.items()}
    refs["k"] = Ref(slots["k"], context.layout(slots["k"]), known=True)
    best = node.attrs["top_k"]
    return [
        Call(
            emit_index_top_k,
            {**refs, "y": Ref(node)},
            {"best": best, "every": node.attrs["every"]},
            items=node.shape[0],
            grain=max(1, CHUNK // max(maximum(slots["k"].shape[0]) * n_heads * width // 16, 1)),
            scratch_bytes=least_bytes(best, I32) + 4 * sum(Tiling.of(n_heads, width, context.target).sizes),
            nodes=(node,),
        )
    ]


def emit_index_top_k(k: Kernel, operands: Mapping[str, Operand], *, best: int, every: int) -> None:
    q, keys, w, y = (operands[name] for name in ("q", "k", "w", "y"))
    n_heads, width = q.shape[1:]
    assert isinstance(n_heads, int) and isinstance(width, int)
    tiling = Tiling.of(n_heads, width, k.target)
    least = Least(k, k.scratch(), best, I32)
    queries, weights, block, numbers, scores = _places(k.scratch() + least_bytes(best, I32), tiling.sizes)
    with k.rows(y.shape[:1]) as index:
        _pack(k, tiling, q, w, index[0], queries, weights)
        token = [k.convert(operands[name].load(index), I64) for name in ("q_pos", "q_seq")]

        def tile(start: Value, n: Value, place: Callable[[Value], tuple[Value, Int]], last: Value, state: list[Value]) -> list[Value]:
            def see(i: Value, mask: Value | None, counts: list[Value]) -> list[Value]:
                at = start + i
                rows = [k.convert(operands[name].row([]).load(at, k.lanes, mask), I64) for name in ("k_pos", "k_seq")]
                seen = visible(k, token[0], token[1], rows[0], rows[1], every=every)
                own = k.lane_numbers(k.lanes) + k.narrow(at, I32)
                return [write_lanes(k, seen if mask is None else seen & mask, counts[0], (own, numbers + counts[0] * 4))]

            (count,) = k.sweep(n, see, [k.i64(0)])
            with k.loop(0, count, tiling.rows) as blocks:
                blocks.next()
                with k.loop(0, tiling.rows) as each:
                    each.next()
                    listed = k.min(blocks.i + each.i, count - 1)
                    address, stride = place(k.convert(k.load(numbers + listed * 4, I32), I64))
                    _widen(k, Row(k, keys.dtype, address, stride), block + each.i * (tiling.row * 4), width)
                for r, score in enumerate(_score(k, tiling, queries, weights, block)):
                    k.store(score, scores + (blocks.i + r) * 4)

            def key(i: Value, mask: Value | None) -> tuple[Value, Value]:
                lanes = least.lanes
                score = k.load(scores + i * 4, F32.x(lanes), mask=mask)
                return ordered_key(k, score, descending=True), k.load(numbers + i * 4, I32.x(lanes), mask=mask)

            return least.cut(least.offer(count, key, state), last)

        state = _each_tile(k, keys, tile, least.begin(lowest_key(I32)))
        least.write(state, y.row(index).store)


_Tile = Callable[[Value, Value, Callable[[Value], tuple[Value, Int]], Value, list[Value]], list[Value]]


def _each_tile(k: Kernel, keys: Operand, tile: _Tile, state: list[Value]) -> list[Value]:
    """`tile(start, n, place, last, state)` over all rows; `place` gives a row's address and element stride."""
    table = keys.table
    if table is None:
        n = k.i64(keys.shape[0])
        with k.loop(0, n, TILE, state) as loop:
            left = n - loop.i
            loop.next(*tile(loop.i, k.min(left, TILE), lambda s: (keys.at([s]), keys.strides[1]), left.le(TILE), loop.values))
        return loop.results
    sequences = n_sequences(k, table)
    with k.loop(0, sequences + 1, 1, state) as outer:
        done = outer.i.eq(sequences)  # one more turn, without rows, ends the selection
        seq = k.min(outer.i, k.select(done, sequences - 1, sequences))
        at, first = field(k, table, seq, "seen_at"), field(k, table, seq, "seen_start")
        n = k.select(done, 0, field(k, table, seq, "seen_stop") - first)
        with k.loop(0, k.select(done, 1, n), TILE, outer.values) as loop:

            def place(s: Value, seq: Value = seq, shift: Value = first - at) -> tuple[Value, Int]:
                return row_address(k, keys, seq, s + shift)

            loop.next(*tile(at + loop.i, k.min(n - loop.i, TILE), place, done, loop.values))
        outer.next(*loop.results)
    return outer.results


def _places(memory: Value, sizes: Sequence[int]) -> list[Value]:
    places = [memory]
    for n in sizes[:-1]:
        places.append(places[-1] + 4 * n)
    return places


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


def _known_heads(node: Node) -> bool:
    return all(isinstance(n, int) for n in node.inputs[0].shape[1:])


index_top_k.kernels["cpu"] = NodeKernel(_calls, _known_heads, lambda node, slot: ("rows",) if slot == "k" else ())
