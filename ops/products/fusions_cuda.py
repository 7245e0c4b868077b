"""Which products are one launch on CUDA with what comes before and after them: of a few tokens, as `fusions_cpu` finds them.

Steps of more tokens compute the same nodes one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tensorgraph.backends.cuda.described import unit_source
from tensorgraph.backends.cuda.fusing import Group, Scope, make_group, read_call, single_calls, with_guard
from tensorgraph.backends.cuda.launches import Call, Launch, Ref, Template
from tensorgraph.backends.cuda.weights import LAYOUT
from tensorgraph.dims import Guard
from tensorgraph.graph import Node
from tensorgraph.ops.products.experts_cuda import NO_UNIT, mixture_group
from tensorgraph.ops.products.fusions_cpu import Chain, chains_of, flat
from tensorgraph.ops.products.mat_vec_cuda import FEW, THREADS, narrow, plan_vec, unit_of
from tensorgraph.ops.products.mixtures_cpu import mixtures
from tensorgraph.ops.products.mul_mat_cuda import literal, token_counts

FILE = "tensorgraph.ops.products:linear.cu"


def find_groups(scope: Scope) -> Iterable[Group]:
    """Mixtures of experts, then other products of constant matrices, by what they multiply."""
    for m in mixtures(scope, (LAYOUT, "dense")):
        if _unit_of(scope, m.gate.weights) == _unit_of(scope, m.up.weights):
            yield mixture_group(scope.context, m)
    together: dict[tuple[Any, ...], list[Node]] = {}
    for node in scope.nodes:
        if node.op == "mul_mat" and node not in scope.taken and _fits(scope, node):
            a, b = node.inputs
            key = b, _unit_of(scope, a), scope.condition[node]
            together.setdefault(key, []).append(node)
    for (b, *_), products in together.items():
        chains = [*chains_of(scope, products)]
        units: list[Any] = list(dict.fromkeys(c.part.gate for c in chains if c.part.gate is not None)) or [None]
        norm = _norm(scope, b, products) if len(units) == 1 else None
        for unit in units:  # a launch has one
            joined = [c for c in chains if c.part.gate == unit or (c.part.gate is None and unit == units[0])]
            if norm is not None or len(joined) > 1 or any(len(c.nodes) > 1 for c in joined):
                yield _group(scope, b, norm, joined)


def _unit_of(scope: Scope, weights: Node) -> tuple[str, int]:
    """How activations are held that a matrix is multiplied by: those of one launch are held in one way."""
    layout = scope.context.layout(weights)
    return layout, unit_of(weights.dtype, layout == LAYOUT)


def _fits(scope: Scope, node: Node) -> bool:
    a, b = node.inputs
    held = a.op == "constant" and a.ndim == 2 and scope.context.layout(a) in (LAYOUT, "dense")
    return held and b.ndim == 2 and isinstance(b.shape[1], int) and 0 not in a.shape and b.dtype.name in ("f32", "f16", "bf16")


def _norm(scope: Scope, b: Node, products: Sequence[Node]) -> Node | None:
    """The RMS norm that only these products read."""
    free = b not in scope.kept and set(scope.users(b)) <= set(products) and b not in scope.taken
    same = scope.condition.get(b) == scope.condition[products[0]]
    return b if b.op == "rms_norm" and free and same and b.dtype.name == "f32" and b.inputs[0].ndim == 2 else None


def _group(scope: Scope, b: Node, norm: Node | None, chains: list[Chain]) -> Group:
    context, n_tokens = scope.context, b.shape[0]
    nodes = tuple(dict.fromkeys([*([norm] if norm is not None else []), *(n for c in chains for n in c.nodes)]))
    computed = tuple(n for n in nodes if n.op not in ("view", "append"))
    calls: list[Call] = []
    many = n_tokens > FEW
    for tokens, guard in token_counts(n_tokens):
        if tokens <= FEW and guard is not False:
            calls.append(_launch(scope, b, norm, chains, tokens, guard if isinstance(guard, Guard) else Guard(), nodes))
    if many is not False:
        for node in nodes:
            calls += with_guard(single_calls(node, context), many)
    stored = [n for n in computed if many is not False or n in [c.result for c in chains]]
    for chain in chains:
        if chain.part.stream and context.layout(chain.result) == "dense":
            calls += with_guard([read_call(chain.result, chain.result, context)], n_tokens <= FEW)
            stored.append(chain.result)
    return make_group(nodes, stored, calls)


def _launch(
    scope: Scope, b: Node, norm: Node | None, chains: list[Chain], tokens: int, guard: Guard, nodes: tuple[Node, ...]
) -> Launch:
    context, x = scope.context, norm.inputs[0] if norm is not None else b
    weight = norm.at("weight") if norm is not None else None
    operands: dict[str, Ref | None] = {"x": Ref(x, known=True), "norm": Ref(weight, known=True) if weight is not None else None}
    plans, parts, items = [], [], 0
    for p, chain in enumerate(chains):
        part, result, weights = chain.part, chain.result, chain.refs["w"].of
        assert isinstance(weights, Node)
        planes = context.layout(weights) == LAYOUT
        plan = narrow(plan_vec(weights.dtype, planes, context.exact, weights.shape[0], weights.shape[1], tokens))
        plans.append(plan)
        names = ("w", "v", "bias", "residual", "table", "y")
        operands |= {f"{name}{p}": chain.refs.get(name) for name in names}
        if part.stream:
            operands[f"y{p}"] = Ref(result, "rows")
        else:
            operands[f"y{p}"] = Ref(flat(result, part.rows), known=True)
        listed = ", ".join(f"{{{name}{p}}}" for name in names)
        parts.append(f"part<{plan.lanes}, {plan.depth}, {part.turn}>({listed})")
        items += -(-part.rows // (THREADS // plan.lanes * (2 if part.turn else 1)))
    chunk = min(plan.chunk for plan in plans)
    shared_bytes = max(plan.shared_bytes for plan in plans)
    eps = norm.attrs["eps"] if norm is not None else 0.0
    head = f"linear<{plans[0].x}, {literal(norm is not None)}>({{x}}, {{norm}}, {float(eps)!r}f, {chunk}, "
    gates = [chain.part.gate for chain in chains if chain.part.gate is not None]
    unit = unit_source("tg_unit", gates[0][0], dict(gates[0][1])) if gates else NO_UNIT
    template = Template(FILE, f"{head}{', '.join(parts)})", before=unit)
    inner = tuple(n for n in nodes if n.op != "view")
    return Launch(template, operands, items=items, threads=THREADS, shared_bytes=shared_bytes, guard=guard, nodes=inner)
