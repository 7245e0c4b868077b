"""Casts on the CPU: a formula for scalar types, and rounding to blocks of 32, whose values are kept as f32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tensorgraph.backends.cpu.elementwise import broadcast_inputs, cpu_formula
from tensorgraph.backends.cpu.ir import F32, F64, I32, I64, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, Ref
from tensorgraph.backends.cpu.lines import join_axes
from tensorgraph.backends.cpu.operands import Operand, computed_type
from tensorgraph.dims import product
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node
from tensorgraph.ops.elementwise.cast import cast
from tensorgraph.views import IndexMap

BLOCK = 32
Rounding = Callable[[Kernel, Value], Value]


def _of_scalars(node: Node) -> bool:
    return not node.dtype.is_block


def _supports(node: Node) -> bool:
    return node.dtype.name in ROUNDINGS or not node.dtype.is_block


def _block_calls(node: Node, context: Context) -> Sequence[Call]:
    (read,) = broadcast_inputs(node)
    maps = [node.index_map, read.index_map]
    last = node.shape[-1]
    shape = (*node.shape[:-1], last // BLOCK)
    axes = join_axes(shape, [IndexMap(shape, (*m.strides[:-1], m.strides[-1] * BLOCK)) for m in maps])
    extents = tuple(n for n, _ in axes)
    y, x = (
        Ref(value, index_map=IndexMap((*extents, BLOCK), (*(s[i] for _, s in axes), maps[i].strides[-1]), maps[i].offset))
        for i, value in enumerate((node, read.node))
    )
    grain = CHUNK // (4 * BLOCK)
    return [Call(emit_blocks, {"x": x, "y": y}, {"dtype": node.dtype}, items=product(extents), grain=grain, nodes=(node,))]


@cpu_formula(cast, applies=_of_scalars, otherwise=_block_calls, supports=_supports)
def emit_cast(k: Kernel, x: Value, *, dtype: DType) -> Value:
    wanted = computed_type(dtype)
    if dtype.kind == "bool":
        return k.convert(x.ne(0 if x.type.kind == "i" else 0.0), wanted)
    if dtype.kind == "int":
        return k.convert(x, wanted)
    if x.type.kind == "i":
        x = k.convert(x, F64)
    return _odd_rounded(k, x) if x.type.bits == 64 and dtype.name in ("f16", "bf16") else k.convert(x, wanted)


def _odd_rounded(k: Kernel, x: Value) -> Value:
    """f64 as f32 with its last bit set where anything was lost, so that rounding once more rounds as from f64."""
    near = k.convert(x, F32)
    back = k.convert(near, F64)
    bits = near.bits_as(I32.x(x.lanes))
    bits = bits - k.convert(k.unary("fabs", back).gt(k.unary("fabs", x)), I32)
    return (bits | k.convert(back.ne(x), I32)).bits_as(near.type)


def emit_blocks(k: Kernel, operands: Mapping[str, Operand | None], *, dtype: DType) -> None:
    """The value that each block of 32 has after it was rounded to a block type."""
    x, y = operands["x"], operands["y"]
    assert x is not None and y is not None
    with k.rows(y.shape[:-1]) as index:
        values = k.convert(x.row(index).load(0, BLOCK), F32)
        y.row(index).store(0, ROUNDINGS[dtype.name](k, values))


def _stored_scale(k: Kernel, scale: Value) -> Value:
    """A scale as f16 keeps it, in every lane."""
    return k.splat(k.half_to_f32(k.f32_to_half(scale)), BLOCK)


def _times_reciprocal(k: Kernel, values: Value, scale: Value) -> Value:
    """Divided by a scale through 1 / scale, which counts as 0 where it is not finite."""
    inverse = 1.0 / scale
    inverse = k.select(k.unary("fabs", inverse).lt(math.inf), inverse, 0.0)
    return values * k.splat(inverse, BLOCK)


def _round_q8_0(k: Kernel, x: Value) -> Value:
    scale = k.fold(k.unary("fabs", x), k.max) / 127.0
    q = _times_reciprocal(k, x, scale)
    whole = k.unary("trunc", q)
    return (whole + k.unary("trunc", (q - whole) * 2.0)) * _stored_scale(k, scale)


def _centred(bits: int) -> Rounding:
    """The value of largest magnitude, the first of those, becomes code 0, the lowest."""
    centre = 1 << (bits - 1)

    def rounded(k: Kernel, x: Value) -> Value:
        size = k.unary("fabs", x)
        most = k.fold(size, k.max)
        places = k.select(size.eq(most), k.lane_numbers(BLOCK), BLOCK - 1)
        scale = x[k.convert(k.fold(places, k.min), I64)] / -float(centre)
        code = _code(k, _times_reciprocal(k, x, scale) + (centre + 0.5), bits)
        return (code - float(centre)) * _stored_scale(k, scale)

    return rounded


def _from_minimum(bits: int) -> Rounding:
    def rounded(k: Kernel, x: Value) -> Value:
        start = k.fold(x, k.min)
        scale = (k.fold(x, k.max) - start) / float((1 << bits) - 1)
        code = _code(k, _times_reciprocal(k, x - k.splat(start, BLOCK), scale) + 0.5, bits)
        return code * _stored_scale(k, scale) + _stored_scale(k, start)

    return rounded


def _code(k: Kernel, q: Value, bits: int) -> Value:
    """A number that is not negative, cut to a code."""
    return k.unary("trunc", k.min(q, float((1 << bits) - 1)))


ROUNDINGS: dict[str, Rounding] = {
    "q8_0": _round_q8_0,
    "q4_0": _centred(4),
    "q4_1": _from_minimum(4),
    "q5_0": _centred(5),
    "q5_1": _from_minimum(5),
}
