"""Which products are computed together with what comes before and after them: the steps of a transformer's layer.

`norm -> q, k, v -> rotate -> append`, `attention -> output -> add`, `norm -> gate, up -> gated unit`, `down -> add`, and any
other products of one row of activations that match a part of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tensorgraph.backends.cpu.fusion import Scope
from tensorgraph.backends.cpu.group import CpuGroup, make_group
from tensorgraph.backends.cpu.kernel import Call, Ref
from tensorgraph.backends.cpu.matvec import kind_of
from tensorgraph.backends.cpu.state_calls import read_call
from tensorgraph.backends.cpu.weights import interleaved
from tensorgraph.dims import Guard
from tensorgraph.graph import Node
from tensorgraph.ops.attention.flash_attn_cpu import FEW, paged, slices_call, tiles_call
from tensorgraph.ops.attention.paged_cpu import Heads
from tensorgraph.ops.products.linear_cpu import Part, Source, emit_few
from tensorgraph.ops.products.linear_many_cpu import many_calls
from tensorgraph.ops.products.mixtures_cpu import find_mixtures, gated

CHUNK_BYTES = 1 << 16  # of weights, that are worth a chunk


@dataclass
class Chain:
    """A product and what follows it, as far as one kernel goes."""

    product: Node
    part: Part
    nodes: list[Node]
    refs: dict[str, Ref] = field(default_factory=dict)  # by operand, without the part's number

    @property
    def result(self) -> Node:
        return self.nodes[-1]


@dataclass(frozen=True)
class Before:
    """What comes before products of one value: nodes that are computed along with them, and what is read in their place."""

    source: Source
    refs: Mapping[str, Ref | None]
    nodes: tuple[Node, ...] = ()
    attention: Node | None = None


def find_groups(scope: Scope) -> Iterable[CpuGroup]:
    """Mixtures of experts, then other products of constant matrices in layout r16, by what they multiply."""
    yield from find_mixtures(scope)
    together: dict[tuple[Any, ...], list[Node]] = {}
    for node in scope.nodes:
        if node.op == "mul_mat" and _fits(scope, node):
            a, b = node.inputs
            key = (b, kind_of(a.dtype, scope.context.exact), scope.condition[node])
            together.setdefault(key, []).append(node)
    for (b, kind, _), products in together.items():
        chains = [*chains_of(scope, products)]
        before = _before(scope, b, kind, products)
        if before.nodes or len(chains) > 1 or any(len(c.nodes) > 1 for c in chains):
            yield _group(scope, b, before, chains)


def _fits(scope: Scope, node: Node) -> bool:
    a, b = node.inputs
    known = b.ndim == 2 and a.op == "constant" and a.ndim == 2 and scope.context.layout(a) == "r16"
    return known and isinstance(b.shape[1], int) and b.dtype.name in ("f32", "f16", "bf16")


def _before(scope: Scope, b: Node, kind: Any, products: list[Node]) -> Before:
    """The RMS norm or the attention that only these products read, else the value as it is."""
    width = b.shape[-1]
    assert isinstance(width, int)
    plain = Before(Source(kind, width), {"x": Ref(b, known=True)})
    wanted = scope.condition[products[0]]
    free = b not in scope.kept and set(scope.users(b)) <= set(products)
    if b.op == "rms_norm" and free and b not in scope.taken and scope.condition.get(b) == wanted and b.dtype.name == "f32":
        x, weight = b.at("x"), b.at("weight")
        assert x is not None
        refs = {"x": Ref(x, known=True), "norm": Ref(weight, known=True) if weight is not None else None}
        return Before(replace(plain.source, norm=True, eps=b.attrs["eps"]), refs, (b,)) if x.ndim == 2 else plain
    attention = b.base
    if b.op == "view" and free and b.index_map.is_dense and attention.op == "flash_attn" and attention not in scope.taken:
        heads: Heads | None = paged(attention, scope.context)
        alone = attention not in scope.kept and scope.users(attention) == (b,)
        if heads is not None and alone and scope.condition.get(attention) == wanted:
            return Before(replace(plain.source, heads=heads), {"x": Ref(b, known=True)}, (attention, b), attention)
    return plain


def chains_of(scope: Scope, products: list[Node]) -> Iterator[Chain]:
    """Each product, or pair of them that a gated unit joins, with what follows."""
    mine = set(products)
    done: set[Node] = set()
    for node in products:
        if node in done:
            continue
        follower = scope.sole_user(node)
        gated = _gate(scope, node, follower[-1], mine - done) if follower else None
        chain = gated or Chain(node, Part(_rows(node)), [node], {"w": weights_ref(scope, node)})
        done.update(chain.nodes)
        _extend(scope, chain, mine)
        yield chain


def weights_ref(scope: Scope, product: Node) -> Ref:
    """A product's weights, in the layout that they are held in."""
    weights = product.inputs[0]
    return Ref(weights, scope.context.layout(weights), known=True)


def _rows(node: Node) -> int:
    rows = node.shape[-1]
    assert isinstance(rows, int)
    return rows


def _gate(scope: Scope, node: Node, unit: Node, mine: set[Node]) -> Chain | None:
    """The two products of a gated unit: its gate first."""
    a, b = gated(unit) or (None, None)
    if a is None or b is None or a not in mine or b not in mine:
        return None
    if any(scope.sole_user(x) != (unit,) for x in (a, b)) or a.shape != b.shape or unit.dtype.name != "f32":
        return None
    if interleaved(a.inputs[0].dtype) is not interleaved(b.inputs[0].dtype):
        return None
    part = Part(_rows(a), gate=(unit.op, tuple(sorted(unit.attrs.items()))))
    refs = {"w": weights_ref(scope, a), "v": weights_ref(scope, b)}
    return Chain(node, part, [a, b, unit], refs)


def _extend(scope: Scope, chain: Chain, together: set[Node]) -> None:
    """Bias, rotation, residual and append, in that order, as far as they follow and need no other of the products."""
    while not chain.part.stream and (follower := scope.sole_user(chain.result)):
        *_, taken, user = chain.result, *follower
        if any(scope.needs(i, together) for i in user.inputs if i is not taken):
            return
        found = (
            _bias(chain, user, taken)
            or _turn(chain, user, taken)
            or _residual(chain, user, taken)
            or _append(scope, chain, user, taken)
        )
        if not found:
            return
        chain.nodes += follower


def _bias(chain: Chain, user: Node, taken: Node) -> bool:
    part = chain.part
    other = user.at("b")
    if user.op != "add" or user.at("a") is not taken or other is None or part.gate or part.turn or part.residual or part.bias:
        return False
    if other.shape != (part.rows,) or other.op != "constant" or taken.ndim != 2:
        return False
    chain.part = replace(part, bias=True)
    chain.refs["bias"] = Ref(other, known=True)
    return True


def _turn(chain: Chain, user: Node, taken: Node) -> bool:
    part = chain.part
    if user.op != "rotate" or user.at("x") is not taken or part.gate or part.turn or part.residual or taken.ndim != 3:
        return False
    size, attrs, table = taken.shape[-1], user.attrs, user.at("table")
    whole = attrs["layout"] == "interleaved" and attrs["offset"] == 0 and attrs["n_dims"] in (0, size)
    if not whole or not isinstance(size, int) or size % 16 or table is None or not table.index_map.is_dense:
        return False
    chain.part = replace(part, turn=size)
    chain.refs["table"] = Ref(table, known=True)
    return True


def _residual(chain: Chain, user: Node, taken: Node) -> bool:
    part = chain.part
    if user.op != "add" or part.residual or user.dtype.name != "f32" or user.shape != taken.shape or taken.ndim != 2:
        return False
    other = user.at("b") if user.at("a") is taken else user.at("a")
    if other is None or other is taken or other.shape != user.shape or other.dtype.name != "f32":
        return False
    chain.part = replace(part, residual=True)
    chain.refs["residual"] = Ref(other, known=True)
    return True


def _append(scope: Scope, chain: Chain, user: Node, taken: Node) -> bool:
    if user.op != "append" or user in scope.kept or user.dtype.is_block:
        return False
    chain.part = replace(chain.part, stream=True)
    return True


def _group(scope: Scope, b: Node, before: Before, chains: list[Chain]) -> CpuGroup:
    context, n_tokens = scope.context, b.shape[0]
    few, many = n_tokens <= FEW, n_tokens > FEW
    operands: dict[str, Ref | None] = {**before.refs, "tokens": Ref(n_tokens)}
    stored: list[Node] = [before.attention] if before.attention is not None else []
    for p, chain in enumerate(chains):
        operands |= {f"{name}{p}": ref for name, ref in chain.refs.items()}
        result = chain.result
        if chain.part.stream:
            operands[f"y{p}"] = Ref(result, context.layouts.get(result.attrs["stream"], "rows"))
        else:
            operands[f"y{p}"] = Ref(flat(result, chain.part.rows), known=True)
        if not chain.part.stream or context.layout(result) == "dense":
            stored.append(result)
    nodes = tuple(dict.fromkeys([*before.nodes, *(n for c in chains for n in c.nodes)]))
    inner = tuple(n for n in nodes if n.op != "view")
    calls: list[Call] = []
    if few is not False:
        calls += _few_calls(before, chains, operands, Guard() if few is True else few, inner)
    if many is not False:
        guard = Guard() if many is True else many
        if before.attention is not None and before.source.heads is not None:
            calls.append(tiles_call(before.attention, before.source.heads, guard))
        calls += many_calls(
            context, replace(before.source, heads=None), [c.part for c in chains], operands, n_tokens, guard, inner
        )
    for chain in chains:
        if chain.part.stream and context.layout(chain.result) == "dense":
            calls.append(read_call(chain.result, chain.result, context))
    return make_group(nodes, stored, calls)


def flat(node: Node, rows: int) -> Node:
    """A result [T, ...] as [T, M]."""
    return node if node.ndim == 2 else node.reshape(node.shape[0], rows)


def _few_calls(
    before: Before, chains: list[Chain], operands: dict[str, Ref | None], guard: Guard, nodes: tuple[Node, ...]
) -> list[Call]:
    calls, source = [], before.source
    if before.attention is not None:
        assert source.heads is not None
        slices, part, number = slices_call(before.attention, source.heads, guard)
        calls.append(slices)
        operands = {**operands, "x": None, "part": part, "slices": number, "sinks": slices.operands["sinks"]}
    parts = tuple(c.part for c in chains)
    units = sum(p.units for p in parts)
    size_bytes = sum(
        _weight_bytes(ref) for name, ref in operands.items() if ref is not None and name[0] in "wv" and name[1:].isdigit()
    )
    grain = max(1, min(CHUNK_BYTES * units // max(size_bytes, 1), -(-units // 8)))
    attrs, room = {"source": source, "parts": parts}, source.scratch_bytes
    calls.append(Call(emit_few, operands, attrs, units, grain, apart=True, scratch_bytes=room, guard=guard, nodes=nodes))
    return calls


def _weight_bytes(ref: Ref) -> int:
    assert isinstance(ref.of, Node)
    rows, width = ref.of.shape
    assert isinstance(rows, int) and isinstance(width, int)
    form = interleaved(ref.of.dtype)
    return -(-rows // 16) * (width // form.block) * form.unit_bytes
