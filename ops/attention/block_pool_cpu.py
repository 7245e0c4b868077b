"""block_pool on the CPU: the rows of each block are looked up first; logits and sums in f64, exponentials in f32.

Rows of a stream are read where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tensorgraph.backends.cpu.functions import exp
from tensorgraph.backends.cpu.ir import F32, F64, I64, Int, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, row_work
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.backends.cpu.sorting import lane_bits
from tensorgraph.backends.cpu.state_calls import stream_row
from tensorgraph.graph import Node
from tensorgraph.ops.attention.block_pool import block_pool

_MISSING = "[block_pool] wanted the row at position {0} of sequence {1}; the stream has {2} rows, not that one"


def _places(node: Node) -> int:
    """Rows that pool together."""
    return int(node.attrs["every"]) * (2 if node.attrs["overlap"] else 1)


def _reads(node: Node, slot: str) -> tuple[str, ...]:
    return ("rows",) if slot == "x" and not node.inputs[0].dtype.is_block else ()


def _calls(node: Node, context: Context) -> Sequence[Call]:
    x, *_ = node.inputs
    refs: dict[str, Ref | None] = {slot: Ref(value) for slot, value in zip(node.slots, node.inputs, strict=True)}
    refs |= {"x": Ref(x, context.layout(x)), "y": Ref(node)}
    scratch, grain = 8 * _places(node), max(1, CHUNK // max(8 * _places(node) * row_work(node), 1))
    return [Call(emit_block_pool, refs, dict(node.attrs), node.shape[0], grain, scratch_bytes=scratch, nodes=(node,))]


def emit_block_pool(k: Kernel, operands: Mapping[str, Operand | None], *, every: int, overlap: bool) -> None:
    given = {name: operand for name, operand in operands.items() if operand is not None}
    x, y, bias, blocks, block_seq = given["x"], given["y"], given.get("bias"), given["blocks"], given["block_seq"]
    row_pos, row_seq = given["row_pos"], given["row_seq"]
    table, width, lanes = k.scratch(), y.shape[1], k.lanes
    places = every * 2 if overlap else every  # those of the block before come first
    with k.rows(y.shape[:1]) as index:
        block, seq = k.convert(blocks.load(index), I64), k.convert(block_seq.load(index), I64)
        begin = (block - 1) * every if overlap else block * every
        start = k.select(block.eq(0), every, k.i64(0)) if overlap else k.i64(0)  # before the first block there is none
        _find_rows(k, row_pos, row_seq, seq, begin, places, table)
        lost = _first_missing(k, table, start, every, places)
        k.refuse(lost.ge(0), _MISSING, begin + lost, seq, row_pos.shape[0])
        with k.when(lost.lt(0)):

            def pooled(at: Value, mask: Value | None) -> None:
                def rows(first: Int, stop: Int, shift: Int, body: _Body, values: list[Value]) -> list[Value]:
                    with k.loop(first, stop, 1, values) as loop:
                        row = k.load(table + loop.i * 8, I64)
                        logit = k.convert(_vector(k, x, row, 1).load(at + shift, lanes, mask), F64)
                        if bias is not None:
                            place = loop.i % every if overlap else loop.i
                            logit = logit + k.convert(bias.row([place]).load(at + shift, lanes, mask), F64)
                        loop.next(*body(row, shift, logit, loop.values))
                    return loop.results

                def both(body: _Body, values: list[Value]) -> list[Value]:
                    if not overlap:
                        return rows(0, every, 0, body, values)
                    return rows(every, places, width, body, rows(start, every, 0, body, values))

                (peak,) = both(lambda row, shift, logit, peaks: [k.max(peaks[0], logit)], [k.const(-math.inf, F64.x(lanes))])

                def add(row: Value, shift: Int, logit: Value, sums: list[Value]) -> list[Value]:
                    e = k.convert(exp(k, k.convert(logit - peak, F32)), F64)
                    value = k.convert(_vector(k, x, row, 0).load(at + shift, lanes, mask), F64)
                    return [sums[0] + e, k.fma(e, value, sums[1])]

                total, weighed = both(add, [k.zero(F64.x(lanes))] * 2)
                y.row(index).store(at, k.convert(weighed / total, F32), mask)

            k.sweep(width, lambda i, mask, _: pooled(i, mask))


_Body = Callable[[Value, Int, Value, list[Value]], list[Value]]


def _vector(k: Kernel, x: Operand, row: Value, which: int) -> Row:
    """One of the two of a row."""
    if x.table is None:
        return x.row([row, which])
    held, width = stream_row(k, x, row, "seen"), x.shape[2]
    assert isinstance(width, int)
    return replace(held, address=held.at(which * width))


def _find_rows(k: Kernel, row_pos: Operand, row_seq: Operand, seq: Value, begin: Value, places: int, table: Value) -> None:
    """The first row of a sequence at each of `places` positions from `begin` on, to `table` (i64); -1 where there is none."""
    with k.loop(0, places) as loop:
        loop.next()
        k.store(k.const(-1, I64), table + loop.i * 8)
    lanes = k.lanes

    def look(i: Value, mask: Value | None, _: list[Value]) -> None:
        pos, of = (k.convert(x.row([]).load(i, lanes, mask), I64) for x in (row_pos, row_seq))
        place = pos - begin
        wanted = of.eq(seq) & place.below(places)
        if mask is not None:
            wanted = wanted & mask
        with k.when(lane_bits(k, wanted).ne(0)), k.loop(0, lanes) as each:
            each.next()
            with k.when(wanted[each.i]):
                at = table + place[each.i] * 8
                with k.when(k.load(at, I64).lt(0)):
                    k.store(i + each.i, at)

    k.sweep(row_pos.shape[0], look)


def _first_missing(k: Kernel, table: Value, start: Value, every: int, places: int) -> Value:
    """The first place from `start` on without a row, those of the block itself before those of the one before it; -1 for none."""
    with k.loop(0, places, 1, [k.i64(-1)]) as loop:
        at = (loop.i + every) % places if places > every else loop.i
        gone = k.load(table + at * 8, I64).lt(0) & at.ge(start)
        loop.next(k.select(gone & loop.values[0].lt(0), at, loop.values[0]))
    return loop.results[0]


block_pool.kernels["cpu"] = NodeKernel(
    _calls, reads=_reads, by_row=lambda node: True, whole=("x", "row_pos", "row_seq"), portable=True
)
