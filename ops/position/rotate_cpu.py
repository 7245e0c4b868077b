"""Rotary embeddings on the CPU: the table of a step's positions in f64, and the turning in f32, in f64 where x is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tensorgraph.backends.cpu.ir import F32, F64, I32, I64, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, cpu_kernel, row_work
from tensorgraph.backends.cpu.operands import Operand, Row, stored_type
from tensorgraph.dims import product
from tensorgraph.graph import Node
from tensorgraph.ops.position.rope import turn_per_position
from tensorgraph.ops.position.rotate import rope_table, rotate

_ANGLE_WORK = 64  # what a cos and a sin take, in elements of simpler kernels


@cpu_kernel(rope_table, rows=lambda node: node.shape[:1], work=lambda node: node.attrs["n_dims"] // 2 * _ANGLE_WORK)
def emit_rope_table(
    k: Kernel,
    pos: Operand,
    freq_factors: Operand | None,
    y: Operand,
    *,
    n_dims: int,
    inverse: bool,
    magnitude: float,
    **angles: Any,
) -> None:
    if n_dims == 0:
        return
    given = ("base", "freq_scale", "ext_factor", "beta_fast", "beta_slow", "original_context")
    per_position = k.table(turn_per_position(n_dims, *(angles[name] for name in given)).tolist(), F64)
    with k.rows(y.shape[:1]) as [t]:
        at = k.convert(pos.load([t]), F64)
        with k.loop(0, n_dims // 2) as loop:
            turns = k.load(per_position + loop.i * 8, F64)
            if freq_factors is not None:
                turns = turns / k.convert(freq_factors.load([loop.i]), F64)
            angle = at * turns
            cos, sin = k.call("cos", F64, angle) * magnitude, k.call("sin", F64, angle) * magnitude
            y.store([t, loop.i, 0], k.convert(cos, F32))
            y.store([t, loop.i, 1], k.convert(-sin if inverse else sin, F32))
            loop.next()


def _calls(node: Node, context: Context) -> Sequence[Call]:
    x, table = node.inputs
    n_tokens, n_pairs, _ = table.shape
    step, pair, one = table.index_map.strides
    flat = pair == 2 and one == 1 and context.backend == "cpu"
    joined = replace(table.index_map, shape=(n_tokens, n_pairs * 2), strides=(step, 1)) if flat else None
    refs = {"x": Ref(x), "table": Ref(table, index_map=joined), "y": Ref(node)}
    grain = max(1, CHUNK // max(row_work(node), 1))
    return [Call(emit_rotate, refs, {**node.attrs, "flat": flat}, items=product(node.shape[:-1]), grain=grain, nodes=(node,))]


def emit_rotate(k: Kernel, operands: dict[str, Operand], *, layout: str, offset: int, n_dims: int, flat: bool) -> None:
    """`flat`: the table is [T, n_dims], each cos beside its sin in memory; else [T, n_dims / 2, 2] in any strides."""
    x, table, y = operands.values()
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def move(first: int) -> Callable[[Value, Value | None, list[Value]], None]:
            return lambda i, mask, _: out.store(i + first, row.load(i + first, k.lanes, mask), mask)

        k.sweep(offset, move(0))
        k.sweep(k.i64(y.shape[-1]) - (offset + n_dims), move(offset + n_dims))
        angles = table.row(index[:1]) if flat else (table.row([index[0], 0], axis=1), table.row([index[0], 1], axis=1))
        if layout == "interleaved" and isinstance(angles, Row):
            k.sweep(n_dims, partial(_turn_neighbours, row, out, angles, offset))
        else:
            step = 2 if layout == "interleaved" else 1
            apart = 1 if layout == "interleaved" else n_dims // 2
            first, second = ([_from(r, at, step) for r in (row, out)] for at in (offset, offset + apart))
            k.sweep(n_dims // 2, partial(_turn_halves, first, second, angles))


def _turn_neighbours(row: Row, out: Row, angles: Row, offset: int, i: Value, mask: Value | None, _: list[Value]) -> None:
    """Channels i, i + 1, ... of an interleaved row: each times the cos, and its neighbour times the sin, + or -."""
    k, lanes = row.k, row.k.lanes
    v = row.load(i + offset, lanes, mask)
    both = k.convert(angles.load(i, lanes, mask), v.type)
    cos, sin = (both.shuffle([at // 2 * 2 + odd for at in range(lanes)]) for odd in (0, 1))
    crossed = v.shuffle([at ^ 1 for at in range(lanes)]) * sin
    bits = I64 if v.type.bits == 64 else I32
    minus_first = k.vector([-(1 << (bits.bits - 1)), 0] * (lanes // 2), bits)
    crossed = (crossed.bits_as(minus_first.type) ^ minus_first).bits_as(v.type)
    out.store(i + offset, k.fma(v, cos, crossed), mask)


def _turn_halves(
    first: Sequence[Row], second: Sequence[Row], angles: Row | tuple[Row, Row], i: Value, mask: Value | None, _: list[Value]
) -> None:
    """Pairs i, i + 1, ... whose first channels and second channels are two rows each, to read and to write."""
    k, lanes = first[0].k, first[0].k.lanes
    if isinstance(angles, Row):
        twice = None if mask is None else mask.shuffle([at // 2 for at in range(2 * lanes)])
        both = angles.load(i * 2, 2 * lanes, twice)
        cos, sin = both.shuffle(range(0, 2 * lanes, 2)), both.shuffle(range(1, 2 * lanes, 2))
    else:
        cos, sin = (row.load(i, lanes, mask) for row in angles)
    a, b = first[0].load(i, lanes, mask), second[0].load(i, lanes, mask)
    cos, sin = (k.convert(each, a.type) for each in (cos, sin))
    first[1].store(i, k.fma(a, cos, -(b * sin)), mask)
    second[1].store(i, k.fma(a, sin, b * cos), mask)


def _from(row: Row, start: int, step: int) -> Row:
    """Every `step`th element of a row from `start` on."""
    k = row.k
    stride = row.stride * step if isinstance(row.stride, int) else k.i64(row.stride) * step
    return Row(k, row.dtype, row.address + k.i64(start) * row.stride * stored_type(row.dtype).size_bytes, stride)


rotate.kernels["cpu"] = NodeKernel(_calls, by_row=lambda node: True, vectors=("x",), portable=True)
