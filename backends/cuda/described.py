"""Descriptions beside hand-written kernels: what row programs need of ops that have such, and formulas as functions of CUDA C."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorgraph import registry
from tensorgraph.backends.cpu.elementwise import ElementwiseKernel
from tensorgraph.backends.cpu.ir import F32, I32, I64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand, computed_type
from tensorgraph.backends.cpu.sorting import lowest_key, ordered_key
from tensorgraph.backends.cuda.writer import CudaKernel
from tensorgraph.dtypes import DType

MOST_BEST = 16
"""Elements that are selected one after another."""
MOST_OF = 1024
"""Elements that they are selected of."""
_NONE = (1 << 63) - 1


def selects(dtype: DType, n: object, best: int) -> bool:
    """Whether `emit_best` is meant for the selection of so many of n elements."""
    return dtype.is_float and computed_type(dtype).bits == 32 and best <= MOST_BEST and isinstance(n, int) and n <= MOST_OF


def emit_best(k: Kernel, operands: Mapping[str, Operand], *, best: int) -> None:
    """`top_k` of few elements: each is the least, by key and place in one number, that comes after the one before it."""
    x, y = operands["x"], operands["y"]
    limit = lowest_key(I32)
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def least(i: Value, mask: Value | None, before: list[Value]) -> list[Value]:
            key = ordered_key(k, row.load(i, k.lanes, mask), descending=True)
            place = k.lane_numbers(k.lanes, I64) + k.splat(i, k.lanes)
            both = (k.convert(key, I64) << 32) | place
            taken = both.gt(last) & key.lt(limit)
            return [k.min(before[0], k.select(taken if mask is None else taken & mask, both, _NONE))]

        with k.loop(0, best, 1, [k.i64(-_NONE)]) as loop:
            last = loop.values[0]
            (found,) = k.sweep(x.shape[-1], least, [k.const(_NONE, I64.x(k.lanes))])
            following = k.fold(found, k.min)
            out.store(loop.i, k.select(following.lt(_NONE), k.narrow(following & 0xFFFFFFFF, I32), -1))
            loop.next(following)


def unit_source(name: str, op: str, attrs: Mapping[str, Any]) -> str:
    """`float NAME(float a, float b)`: the formula of an op of two values."""
    kernel = registry.ops.get(op).kernel("cpu")
    assert isinstance(kernel, ElementwiseKernel)
    k = CudaKernel(1, 32)
    result = kernel.formula(k, [Value(k, "a", F32), Value(k, "b", F32)], attrs)
    return k.function(f"float {name}(float a, float b)", k.convert(result, F32))
