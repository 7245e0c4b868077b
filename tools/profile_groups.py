"""What calls of a native step compute: names, layers and work of them, and groups of them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tensorgraph import registry
from tensorgraph.backends.cpu.kernel import Call, Ref
from tensorgraph.graph import STRUCTURAL, Node
from tensorgraph.op import node_bytes
from tensorgraph.tools.bench.roofs import Roofs

By = Literal["op", "layer", "kernel", "step"]
Dims = Mapping[str, int]
_LAYER = re.compile(r"\bblk\.(\d+)\.")


@dataclass(frozen=True)
class Work:
    """Bytes read and written, and operations: those of products of quantised weights with int8 activations, and others."""

    size_bytes: int = 0
    flops: int = 0
    int8_ops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.size_bytes + other.size_bytes, self.flops + other.flops, self.int8_ops + other.int8_ops)

    def roof(self, roofs: Roofs) -> tuple[float, str]:
        """The least seconds that this can take, and what limits it: read, f32 or int8."""
        dot = roofs.dot_gops if roofs.dot_gops is not None else roofs.fma_gflops
        read_s, f32_s, int8_s = self.size_bytes / roofs.stream_gbs, self.flops / roofs.fma_gflops, self.int8_ops / dot
        limit = "read" if read_s >= f32_s + int8_s else "f32" if f32_s >= int8_s else "int8"
        return max(read_s, f32_s + int8_s) / 1e9, limit


@dataclass
class Group:
    """Calls that a row of the table is of.

    Attributes:
        calls: in all steps that were profiled.
    """

    label: str
    calls: int = 0
    seconds: float = 0.0
    work: Work = field(default_factory=Work)

    def add(self, calls: int, seconds: float, work: Work) -> None:
        self.calls, self.seconds, self.work = self.calls + calls, self.seconds + seconds, self.work + work


def labels(calls: Sequence[Call], by: By) -> list[str]:
    """The group of each call of a step."""
    if by == "layer":
        return _layers(calls)
    shares = charged(calls)
    if by == "step":
        names = _named_with_weights(calls, shares, numbered=True)
        return [f"{i:4d}  {layer:>6}  {name}" for i, (layer, name) in enumerate(zip(_layers(calls), names, strict=True))]
    if by == "kernel":
        return _named_with_weights(calls, shares, numbered=False)
    return [f"{kernel_name(call)}: {_counted(node.op for node in call.nodes)}" for call in calls]


def works(calls: Sequence[Call], dims: Dims, *, exact: bool) -> list[Work]:
    """The work of each call of a step of these extents; each node is one call's."""
    return [_work(call, nodes, dims, exact) for call, nodes in zip(calls, charged(calls), strict=True)]


def charged(calls: Sequence[Call]) -> list[tuple[Node, ...]]:
    """Of each call the nodes that are its own, though several calls may compute a node together.

    A node belongs to the call that reads most of the floats that it reads; of equal ones to the first that writes it, or has it.
    """
    found: list[list[Node]] = [[] for _ in calls]
    listed: dict[Node, list[int]] = {}
    for i, call in enumerate(calls):
        for node in call.nodes:
            listed.setdefault(node, []).append(i)
    bases = [_bases(call) for call in calls]
    for node, places in listed.items():
        floats = [i for i in node.inputs if i.dtype.is_float]
        read = [sum(node_bytes(i) for i in floats if i.base in bases[place]) for place in places]
        best = max(zip(places, read, strict=True), key=lambda one: (one[1], node in bases[one[0]], -one[0]))
        found[best[0]].append(node)
    return [tuple(nodes) for nodes in found]


def kernel_name(call: Call) -> str:
    """The name of the function that writes its kernel, without `emit_`."""
    emit: Any = call.emit
    while isinstance(emit, functools.partial) or not hasattr(emit, "__name__"):
        inner = emit.func if isinstance(emit, functools.partial) else getattr(emit, "emit", None)
        if inner is None:
            return type(emit).__name__
        emit = inner
    return str(emit.__name__).lstrip("_").removeprefix("emit_")


def _refs(call: Call) -> Iterator[Ref]:
    return (ref for ref in call.operands.values() if ref is not None)


def _bases(call: Call) -> set[Node]:
    return {ref.of.base for ref in _refs(call) if isinstance(ref.of, Node)}


def _work(call: Call, nodes: Sequence[Node], dims: Dims, exact: bool) -> Work:
    """Values that go from one of the nodes to another and are not operands of the call are not moved."""
    own, operands = set(nodes), _bases(call)
    packed = {ref.of.base for ref in _refs(call) if isinstance(ref.of, Node) and ref.layout != "dense" and ref.of.dtype.is_block}
    inner = {i.base for n in nodes for i in n.inputs if i.base in own and i.base.op not in STRUCTURAL}
    total, weights_read = Work(), set[Node]()
    for node in nodes:
        if node.op == "append":
            rows, dtype = node.inputs[0], node.dtype
            written = node_bytes(rows, dims) // rows.dtype.block_bytes * dtype.block_bytes // dtype.block_size
            total += Work(written + (0 if rows.base in inner else node_bytes(rows, dims)))
        if node.op in STRUCTURAL:
            continue
        cost = registry.ops.get(node.op).cost(node, dims)
        weights = {i.base for i in node.inputs if i.base.op == "constant"}
        passing = sum(node_bytes(i, dims) for i in (node, *node.inputs) if i.base.op != "constant")
        size = min(cost.size_bytes, passing) - sum(node_bytes(i, dims) for i in node.inputs if i.base in inner)
        size -= node_bytes(node, dims) if node in inner and node not in operands else 0
        if not weights <= weights_read:
            size += max(0, cost.size_bytes - passing)
            weights_read |= weights
        in_int8 = not exact and not weights.isdisjoint(packed)
        total += Work(max(0, size), *((0, cost.flops) if in_int8 else (cost.flops, 0)))
    return total


def _layers(calls: Sequence[Call]) -> list[str]:
    """`blk.N` by the names of weights, streams and nodes; calls without one belong to the layer before them."""
    found: list[str] = []
    for call in calls:
        layer = _layer(call)
        found.append(f"blk.{layer}" if layer is not None else found[-1] if found else "before")
    ends = len(found) - next((i for i, call in enumerate(reversed(calls)) if _layer(call) is not None), 0)
    named = any(layer.startswith("blk.") for layer in found)
    return [layer if i < ends or not named else "after" for i, layer in enumerate(found)]


def _layer(call: Call) -> int | None:
    operands = [ref.of.base for ref in _refs(call) if isinstance(ref.of, Node)]
    inputs = [i.base for node in call.nodes for i in node.inputs]
    held = [n for n in (*operands, *inputs) if n.op in ("constant", "append", "read")]
    for name in (*(str(n.attrs.get("name") or n.attrs.get("stream") or "") for n in held), *(n.name for n in call.nodes)):
        match = _LAYER.search(name)
        if match is not None:
            return int(match[1])
    return None


def _named_with_weights(calls: Sequence[Call], shares: Sequence[Sequence[Node]], *, numbered: bool) -> list[str]:
    """A kernel with the weights that it reads, or with the ops that it computes where it reads none."""
    found = []
    for call, nodes in zip(calls, shares, strict=True):
        names = [str(node.attrs["name"]) for node in dict.fromkeys(ref.of.base for ref in _refs(call) if isinstance(ref.of, Node))
                 if node.op == "constant"]  # fmt: skip
        shown = [_LAYER.sub("" if numbered else "blk.*.", name).removesuffix(".weight") for name in names]
        what = ", ".join(dict.fromkeys(shown)) or _counted(node.op for node in nodes or call.nodes)
        found.append(f"{kernel_name(call)}: {what}")
    return found


def _counted(names: Iterator[str]) -> str:
    """`rms_norm, 3 mul_mat`"""
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in Counter(names).items())
