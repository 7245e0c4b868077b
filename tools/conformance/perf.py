"""How fast a backend computes an op for typical inputs, as parts of what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import Device
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import GraphError, TensorGraphError
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.op import Op
from tensorgraph.plan import Executable, Plan
from tensorgraph.tools.bench.roofs import Roofs
from tensorgraph.tools.conformance.case import takes_blocks
from tensorgraph.tools.conformance.draw import Array, Slots
from tensorgraph.tools.conformance.typical import filled, typical_cases

OPTIONS = CompileOptions(fuse=False, without=("fold_constants",))
LEAST_RUNS = 5


@dataclass(frozen=True)
class Speed:
    """One op on one backend: the median of several runs.

    Units: `gbs` 1e9 bytes, `gflops` 1e9 operations a second, by the op's own cost; `roof` is the time that the machine's
    measured rates allow, memory or arithmetic, whichever takes longer, as a fraction of the time taken (None where unknown).
    """

    op: str
    backend: str
    case: str
    seconds: float
    gbs: float
    gflops: float
    roof: float | None
    bound: str


def speeds(
    op: Op, device: Device, *, dtype: DType | None = None, seconds: float = 0.3, roofs: Roofs | None = None
) -> Iterator[Speed]:
    """Measure each typical case of an op.

    `dtype`: of the first input that takes it as a weight. Without one, a first input that may be a weight is one, of f32.

    Raises: GraphError: the op says too little, or takes no such weight. UnsupportedError: the device has no kernel for it.
    """
    for slots, attrs in typical_cases(op):
        node, arrays = _case(op, filled(slots), attrs, dtype)
        yield _speed(op, node, compile(Graph(y=node), device, OPTIONS), arrays, device, seconds, roofs)


def _case(op: Op, slots: Slots, attrs: Mapping[str, Any], dtype: DType | None) -> tuple[Node, Slots]:
    nodes = {slot: input(slot, x.shape, as_dtype(x.dtype)) for slot, x in slots.items()}
    first = next(iter(slots), "")
    floats = [slot for slot, x in slots.items() if as_dtype(x.dtype).is_float]
    tried = floats if dtype is not None else [first] if len(slots) > 1 and takes_blocks(op, first) else []
    for slot in tried:
        held = as_dtype(slots[slot].dtype) if dtype is None else dtype
        try:
            node = op.apply({**nodes, slot: constant(slot, shape=slots[slot].shape, dtype=held)}, attrs)
        except TensorGraphError:
            continue
        return node, {**slots, slot: _weight(slots[slot], held)}
    if dtype is not None:
        raise GraphError(f"[{op.name}] wanted an input that may be a weight of {dtype}; it has none")
    return op.apply(nodes, attrs), slots


def _weight(x: Array, dtype: DType) -> Array:
    """Values as a weight of a type; of a block type random blocks instead, since some take long to be found."""
    from tensorgraph.ops.formats.drawn import random_blocks

    if not dtype.is_block:
        return x.astype(dtype.numpy)
    blocks = random_blocks(dtype, x.size // dtype.block_size, 1.0, np.random.default_rng(0))
    return blocks.reshape(*x.shape[:-1], dtype.size_bytes(x.shape[-1]))


def _speed(
    op: Op,
    node: Node,
    plan: Plan,
    arrays: Slots,
    device: Device,
    seconds: float,
    roofs: Roofs | None,
) -> Speed:
    bound = plan.bind({name: x for name, x in arrays.items() if name not in plan.graph.inputs})
    given = {name: x for name, x in arrays.items() if name in plan.graph.inputs}
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) <= LEAST_RUNS or time.perf_counter() - began < seconds:
        taken.append(_run(bound, given, device))
    spent, cost = statistics.median(taken[1:]), op.cost(node, {})
    by_memory = cost.size_bytes / (roofs.stream_gbs * 1e9) if roofs else 0.0
    by_arithmetic = cost.flops / (_rate_of_products(node, roofs) * 1e9) if roofs else 0.0
    return Speed(
        op=op.name,
        backend=device.name,
        case=_case_text(node),
        seconds=spent,
        gbs=cost.size_bytes / spent / 1e9,
        gflops=cost.flops / spent / 1e9,
        roof=max(by_memory, by_arithmetic) / spent if roofs else None,
        bound="" if roofs is None else "memory" if by_memory >= by_arithmetic else "arithmetic",
    )


def _rate_of_products(node: Node, roofs: Roofs) -> float:
    """1e9 operations a second that the machine can do: of int8 products with weights of block types, else in f32."""
    blocks = any(i.dtype.is_block for i in node.inputs)
    return roofs.dot_gops if blocks and roofs.dot_gops is not None else roofs.fma_gflops


def _run(bound: Executable, given: Slots, device: Device) -> float:
    """Seconds of a run: of its kernels alone, where the device can tell, so that copies to and from it do not count."""
    spent: list[float] = []
    profiling = getattr(device, "profiling", None)
    began = time.perf_counter()
    if profiling is None:
        bound.run(given)
        return time.perf_counter() - began
    with profiling(lambda calls, dims, seconds, whole: spent.append(float(seconds.sum()))):
        bound.run(given)
    return sum(spent)


def _case_text(node: Node) -> str:
    shapes = (f"{slot} {i.dtype}{list(i.shape)}" for slot, i in zip(node.slots, node.inputs, strict=True))
    return ", ".join(shapes) or f"{node.dtype}{list(node.shape)}"
