"""A mixture of experts on CUDA: of a few tokens in two launches (`experts.cu`), of more its nodes one after another."""

from __future__ import annotations

from collections.abc import Mapping

from tensorgraph.backends.cuda.described import unit_source
from tensorgraph.backends.cuda.fusing import Group, make_group, single_calls, with_guard
from tensorgraph.backends.cuda.launches import Buffer, Call, Context, Launch, Ref, Template
from tensorgraph.backends.cuda.weights import LAYOUT
from tensorgraph.dims import Extent, product
from tensorgraph.graph import Node
from tensorgraph.ops.products.mat_vec_cuda import FEW, THREADS, VecPlan, narrow, plan_vec
from tensorgraph.ops.products.mixtures_cpu import Found
from tensorgraph.ops.products.mul_mat_cuda import up
from tensorgraph.ops.products.mul_mat_id_cuda import MESSAGES

FILE = "tensorgraph.ops.products:experts.cu"
NO_UNIT = "static __device__ __forceinline__ float tg_unit(float a, float b) { return a * b; }\n"
"""For kernels without a gate, whose file names it."""


def mixture_group(context: Context, m: Found) -> Group:
    """The group of a mixture."""
    n_tokens = m.operands["ids"].shape[0]
    few, many = n_tokens <= FEW, n_tokens > FEW
    calls: list[Call] = with_guard(_launches(context, m, n_tokens), few)
    stored = [m.stored]
    if many is not False:
        for node in m.nodes:
            calls += with_guard(single_calls(node, context), many)
        stored = [n for n in m.nodes if n.op != "view"]
    return make_group(m.nodes, stored, calls)


def _launches(context: Context, m: Found, n_tokens: Extent) -> list[Launch]:
    refs: Mapping[str, Ref | None] = m.refs
    gate, down = m.gate.weights, m.down.weights
    pairs, size = product(m.operands["ids"].shape), gate.shape[1]
    units = Ref(Buffer(_most_tokens(n_tokens) * 4 * product((*m.operands["ids"].shape[1:], size)), "units"))
    first = _plan(context, gate)  # up's activations are held as gate's: `fusions_cuda` looks at that
    unit = unit_source("tg_unit", m.unit.op, m.unit.attrs)
    of_units = {"x": refs["x"], "ids": refs["ids"], "gate": _ref(context, gate), "up": _ref(context, m.up.weights)}
    of_units |= {name: refs[name] for name in ("gate_bias", "up_bias")} | {"units": units}
    function = f"expert_units<{first.lanes}, {first.depth}, {first.x}>"
    second = _plan(context, down)
    of_sums = {"units": units, "ids": refs["ids"], "down": _ref(context, down), "down_bias": refs["down_bias"], "w": refs["w"]}
    of_sums |= {name: refs.get(name) for name in ("more0", "more1", "y")}
    sums = f"expert_sums<{second.lanes}, {second.depth}, {second.x}>"
    return [
        Launch(
            Template(FILE, function, (str(first.chunk),), MESSAGES, resident=2, before=unit),
            of_units,
            items=pairs * up(size, THREADS // first.lanes),
            threads=THREADS,
            shared_bytes=first.shared_bytes,
            nodes=(*m.gate.nodes, *m.up.nodes, m.unit),
        ),
        Launch(
            Template(FILE, sums, (str(second.chunk),), resident=2, before=NO_UNIT),
            of_sums,
            items=n_tokens * up(down.shape[1], THREADS // second.lanes),
            threads=THREADS,
            shared_bytes=second.shared_bytes,
            nodes=(*m.down.nodes, *(n for n in m.summed if n.op != "view")),
        ),
    ]


def _most_tokens(n_tokens: Extent) -> int:
    """Tokens that the two launches are made for."""
    return min(n_tokens, FEW) if isinstance(n_tokens, int) else FEW


def _plan(context: Context, weights: Node) -> VecPlan:
    """Of a matrix of each expert, whose rows one row of activations is multiplied by."""
    planes = context.layout(weights) == LAYOUT
    return narrow(plan_vec(weights.dtype, planes, context.exact, weights.shape[1], weights.shape[2], 1))


def _ref(context: Context, weights: Node) -> Ref:
    return Ref(weights, context.layout(weights), known=True)
