"""Casts on the CPU: a formula for scalar types, and rounding to blocks, whose values are kept as f32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from tensorgraph.backends.cpu.elementwise import broadcast_inputs, cpu_formula, elementwise_call
from tensorgraph.backends.cpu.ir import F32, F64, I32, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, Ref
from tensorgraph.backends.cpu.lines import join_axes
from tensorgraph.backends.cpu.operands import Operand, computed_type
from tensorgraph.backends.cpu.state_calls import read_call
from tensorgraph.dims import product
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node
from tensorgraph.ops.elementwise.cast import cast
from tensorgraph.ops.formats.writable_cpu import ROUNDINGS, round_block
from tensorgraph.state import Layout
from tensorgraph.views import IndexMap


def _of_scalars(node: Node) -> bool:
    return not node.dtype.is_block and not _of_stream(node)


def _of_stream(node: Node) -> bool:
    """Whether whole rows of state are cast to floats: then they are read where they lie, and nobody else need copy them."""
    return node.inputs[0].op in ("append", "read") and node.dtype.is_float and not node.dtype.is_block


def _reads(node: Node, slot: str) -> tuple[str, ...]:
    return get_args(Layout) if _of_stream(node) else ()


def _supports(node: Node) -> bool:
    return node.dtype.name in ROUNDINGS or not node.dtype.is_block


def _other_calls(node: Node, context: Context) -> Sequence[Call]:
    stream = node.inputs[0]
    if node.dtype.is_block:
        return _block_calls(node)
    return [elementwise_call([node], [node]) if context.layout(stream) == "dense" else read_call(stream, node, context)]


def _block_calls(node: Node) -> Sequence[Call]:
    (read,) = broadcast_inputs(node)
    maps = [node.index_map, read.index_map]
    block = node.dtype.block_size
    shape = (*node.shape[:-1], node.shape[-1] // block)
    axes = join_axes(shape, [IndexMap(shape, (*m.strides[:-1], m.strides[-1] * block)) for m in maps])
    extents = tuple(n for n, _ in axes)
    y, x = (
        Ref(value, index_map=IndexMap((*extents, block), (*(s[i] for _, s in axes), maps[i].strides[-1]), maps[i].offset))
        for i, value in enumerate((node, read.node))
    )
    grain = CHUNK // (4 * block)
    return [Call(emit_blocks, {"x": x, "y": y}, {"dtype": node.dtype}, items=product(extents), grain=grain, nodes=(node,))]


@cpu_formula(cast, applies=_of_scalars, otherwise=_other_calls, supports=_supports, reads=_reads)
def emit_cast(k: Kernel, x: Value, *, dtype: DType) -> Value:
    wanted = computed_type(dtype)
    if dtype.kind == "bool":
        return k.convert(x.ne(0 if x.type.kind == "i" else 0.0), wanted)
    if dtype.kind == "int":
        return k.convert(x, wanted) if x.type.kind == "i" else _held_within(k, x, dtype)
    if x.type.kind == "i":
        x = k.convert(x, F64)
    return _odd_rounded(k, x) if x.type.bits == 64 and dtype.name in ("f16", "bf16") else k.convert(x, wanted)


def _held_within(k: Kernel, x: Value, dtype: DType) -> Value:
    """Toward zero, and to the nearest number that an integer type has; 0 for NaN."""
    assert dtype.numpy is not None
    info = np.iinfo(dtype.numpy)
    x = k.select(x.is_nan(), 0.0, k.max(k.unary("trunc", x), float(info.min)))
    within = x.lt(float(info.max) + 1)  # exact: of the widest types the sum is rounded to what it should be
    return k.select(within, k.convert(k.select(within, x, 0.0), computed_type(dtype)), int(info.max))


def _odd_rounded(k: Kernel, x: Value) -> Value:
    """f64 as f32 with its last bit set where anything was lost, so that rounding once more rounds as from f64."""
    near = k.convert(x, F32)
    back = k.convert(near, F64)
    bits = near.bits_as(I32.x(x.lanes))
    bits = bits - k.convert(k.unary("fabs", back).gt(k.unary("fabs", x)), I32)
    return (bits | k.convert(back.ne(x), I32)).bits_as(near.type)


def emit_blocks(k: Kernel, operands: Mapping[str, Operand | None], *, dtype: DType) -> None:
    """The values that each block has after it was rounded to a block type."""
    x, y = operands["x"], operands["y"]
    assert x is not None and y is not None
    with k.rows(y.shape[:-1]) as index:
        round_block(k, dtype.name, x.row(index), y.row(index), k.i64(0))
