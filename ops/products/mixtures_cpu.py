"""Which nodes are a mixture of experts, that is computed in a few calls: gate and up of chosen experts, their unit, down, the
weighed sum, and up to two values that are added to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from tensorgraph import registry
from tensorgraph.backends.cpu.fusion import Scope
from tensorgraph.backends.cpu.gemm import rows_kind
from tensorgraph.backends.cpu.group import CpuGroup, make_group
from tensorgraph.backends.cpu.kernel import Ref
from tensorgraph.backends.cpu.matvec import kind_of
from tensorgraph.backends.cpu.weights import interleaved
from tensorgraph.graph import STRUCTURAL, Node
from tensorgraph.ops.products.experts_cpu import MORE, Mixture, mixture_calls
from tensorgraph.views import IndexMap

_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Product:
    """A mul_mat_id, and the biases of experts if they are added to it."""

    node: Node
    biased: Node | None = None

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.node,) if self.biased is None else (self.node, self.biased)

    @property
    def weights(self) -> Node:
        return self.node.inputs[0]

    @property
    def result(self) -> Node:
        return self.nodes[-1]

    @property
    def bias(self) -> Ref | None:
        return Ref(self.biased.inputs[1], known=True) if self.biased is not None else None


@dataclass(frozen=True)
class Found:
    """The nodes of a mixture.

    Attributes:
        operands: `x` [T, 1, D], `ids` [T, U], `w` [T, U, 1], and values [T, N] that are added to the sum.
        summed: from what is weighed to the last sum, views too.
    """

    unit: Node
    gate: Product
    up: Product
    down: Product
    operands: Mapping[str, Node]
    summed: tuple[Node, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.gate.nodes, *self.up.nodes, self.unit, *self.down.nodes, *self.summed)

    @property
    def stored(self) -> Node:
        """The result that is not a view."""
        return next(n for n in reversed(self.summed) if n.op != "view")

    @property
    def refs(self) -> dict[str, Ref | None]:
        """What kernels read and write: weights apart; `y` [T, N]."""
        found: dict[str, Ref | None] = {name: Ref(value, known=True) for name, value in self.operands.items()}
        found |= {f"{name}_bias": p.bias for name, p in (("gate", self.gate), ("up", self.up), ("down", self.down))}
        shape = self.operands["ids"].shape[0], self.down.node.shape[-1]
        return found | {"y": Ref(self.stored.reshape(*shape), known=True)}


def find_mixtures(scope: Scope) -> Iterator[CpuGroup]:
    """Of constant matrices in layout r16."""
    for m in mixtures(scope, ("r16",)):
        if interleaved(m.gate.weights.dtype) is not interleaved(m.up.weights.dtype):
            continue
        weights = {"gate": m.gate.weights, "up": m.up.weights, "down": m.down.weights}
        refs = m.refs | {name: Ref(value, "r16", known=True) for name, value in weights.items()}
        of_unit, of_sum = (*m.gate.nodes, *m.up.nodes, m.unit), tuple(n for n in m.summed if n.op != "view")
        described, n_tokens = _described(scope, m.unit, m.gate, m.up, m.down), m.operands["ids"].shape[0]
        calls = mixture_calls(scope.context, described, refs, n_tokens, (of_unit, m.down.nodes, of_sum))
        yield make_group(m.nodes, [m.stored], calls)


def mixtures(scope: Scope, layouts: Collection[str]) -> Iterator[Found]:
    """Those whose weights are constants in one of some layouts."""
    for unit in scope.nodes:
        both = gated(unit)
        found = _mixture(scope, layouts, unit, *both) if both is not None and unit not in scope.taken else None
        if found is not None:
            yield found


def gated(unit: Node) -> tuple[Node, Node] | None:
    """The gate and the other half of a gated unit of two values that has a formula, None of any other node."""
    kernel = registry.ops.get(unit.op).kernel("cpu") if unit.op not in STRUCTURAL else None
    a, b = unit.at("a"), unit.at("b")
    if "swapped" not in unit.attrs or not hasattr(kernel, "formula") or a is None or b is None or a is b:
        return None
    return (b, a) if unit.attrs["swapped"] else (a, b)


def _mixture(scope: Scope, layouts: Collection[str], unit: Node, gate_node: Node, up_node: Node) -> Found | None:
    gate, up = (_before(scope, layouts, node, unit) for node in (gate_node, up_node))
    down = _after(scope, layouts, unit)
    if gate is None or up is None or down is None:
        return None
    _, x, ids = gate.node.inputs
    if up.node.inputs[1:] != (x, ids) or down.node.inputs[2] is not ids or x.shape[1] != 1 or unit.dtype.name != "f32":
        return None
    n_tokens, n_used = ids.shape
    found = _weighed_sum(scope, down.result)
    if found is None or not isinstance(n_used, int) or 0 in (n_used, *gate.weights.shape, *down.weights.shape):
        return None
    w, summed = found
    shape = (n_tokens, down.node.shape[-1])
    operands = {"x": x, "ids": ids, "w": w}
    added = 0
    while added < len(MORE) and (follower := scope.sole_user(summed[-1])):
        other = _other(follower[-1], "add", (summed[-1], *follower[:-1])[-1])
        if other is None or follower[-1].shape != shape or other.shape != shape:
            break
        operands[MORE[added]] = other
        summed, added = (*summed, *follower), added + 1
    return Found(unit, gate, up, down, operands, summed)


def _described(scope: Scope, unit: Node, gate: Product, up: Product, down: Product) -> Mixture:
    dtypes, exact = (gate.weights.dtype, up.weights.dtype, down.weights.dtype), scope.context.exact
    n_experts, size, width, n_used, height = (*gate.weights.shape, *down.node.shape[1:])
    assert isinstance(n_experts, int) and isinstance(n_used, int)
    assert isinstance(width, int) and isinstance(size, int) and isinstance(height, int)
    return Mixture(
        weights=dtypes,
        kind=rows_kind(scope.context.target, dtypes[:2], kind_of(dtypes[0], exact)),
        middle=rows_kind(scope.context.target, dtypes[2:], kind_of(dtypes[2], exact)),
        unit=unit.op,
        attrs=tuple(sorted(unit.attrs.items())),
        n_experts=n_experts,
        n_used=n_used,
        width=width,
        size=size,
        height=height,
    )


def _fits(scope: Scope, layouts: Collection[str], node: Node) -> bool:
    """Whether a node is a product with constant matrices in one of some layouts."""
    if node.op != "mul_mat_id" or node in scope.taken:
        return False
    a, b, _ = node.inputs
    return a.op == "constant" and scope.context.layout(a) in layouts and b.dtype.name in _FLOATS


def _is_bias(node: Node, product: Node) -> bool:
    """Whether a node adds the biases of the experts of a product."""
    if node.op != "add_id" or node.inputs[0] is not product or node.inputs[2] is not product.inputs[2]:
        return False
    a, b = product.inputs[0], node.inputs[1]
    return b.op == "constant" and b.shape == a.shape[:2] and b.dtype.name in _FLOATS


def _before(scope: Scope, layouts: Collection[str], value: Node, user: Node) -> Product | None:
    """The product that a value is, which nothing else uses."""
    product = value.inputs[0] if value.op == "add_id" else value
    if not _fits(scope, layouts, product) or scope.sole_user(value) != (user,):
        return None
    if product is value:
        return Product(product)
    return Product(product, value) if _is_bias(value, product) and scope.sole_user(product) == (value,) else None


def _after(scope: Scope, layouts: Collection[str], unit: Node) -> Product | None:
    """The product of a unit."""
    follower = scope.sole_user(unit)
    if len(follower) != 1 or not _fits(scope, layouts, follower[0]) or follower[0].inputs[1] is not unit:
        return None
    (product,) = follower
    biased = scope.sole_user(product)
    return Product(product, biased[0]) if len(biased) == 1 and _is_bias(biased[0], product) else Product(product)


def _weighed_sum(scope: Scope, product: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """The weights [T, U, 1], and the nodes that multiply by them and sum over experts."""
    follower = scope.sole_user(product)
    weighed = follower[-1] if len(follower) == 1 else product
    w = _other(weighed, "mul", product)
    if w is None or weighed.shape != product.shape or w.shape != (*product.shape[:2], 1):
        return None
    turned = scope.sole_user(weighed)
    if turned and turned[-1].op == "view":
        turned = (*turned, *scope.sole_user(turned[-1]))
    if not turned or turned[-1].op != "sum_rows":
        return None
    (x,) = turned[-1].inputs
    if x.base is not weighed or x.index_map != IndexMap.dense(weighed.shape).permute((0, 2, 1)):
        return None
    return w, (weighed, *turned)


def _other(node: Node, op: str, taken: Node) -> Node | None:
    """What a value is added to, or multiplied by, in f32."""
    if node.op != op or taken not in node.inputs or node.dtype.name != "f32":
        return None
    a, b = node.inputs
    other = b if a is taken else a
    return other if other is not taken and other.dtype.name == "f32" else None


__all__ = ["Found", "find_mixtures", "gated", "mixtures"]
