"""Fused ops as theorems: the compiler finds an op's expansion in the def-use graph and puts the op in its place.

An op's expansion is built once over sample inputs; that sample is the pattern. Where a graph has its ops and wiring, the
fused op's inputs and attributes are read off, the expansion is built again from them, and only if the result is the same
structure as what stands there is the op put in: the pattern proposes, the rebuilt expansion proves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tensorgraph.dims import Dim, Extent
from tensorgraph.dtypes import DType, as_dtype, f32, i32
from tensorgraph.errors import TensorGraphError
from tensorgraph.graph import STRUCTURAL, Graph, Node, input, structure_line, topological
from tensorgraph.op import Attr, Op
from tensorgraph.passes import Supports, rewrite
from tensorgraph.registry import ops
from tensorgraph.signature import Argument


@dataclass(frozen=True)
class Pattern:
    """A fused op's expansion over sample inputs."""

    op: Op
    root: Node
    slots: Mapping[Node, str]  # sample input to the slot it stands for
    holes: Mapping[Any, str]  # sample attribute value, with its type (0.0 is not False), to the attribute it stands for

    @property
    def n_ops(self) -> int:
        return sum(n.op not in STRUCTURAL for n in topological([self.root]))

    def match(self, node: Node) -> Node | None:
        """The fused op whose expansion is `node`, or None."""
        slots: dict[str, Node] = {}
        attrs: dict[str, Any] = {}
        if not self._unify(self.root, node, slots, attrs) or self.op.expansion is None:
            return None
        try:
            fused = replace(self.op.apply(slots, attrs, name=node.name), where=node.where)
            rebuilt = self.op.rebuild(self.op.expansion, fused)
        except TensorGraphError:
            return None
        return fused if same_structure(rebuilt, node, frozenset(fused.inputs)) else None

    def _unify(self, mine: Node, node: Node, slots: dict[str, Node], attrs: dict[str, Any]) -> bool:
        if mine in self.slots:
            return slots.setdefault(self.slots[mine], node) is node
        if mine.op == "view" or node.op == "view":
            return self._unify(mine.base, node.base, slots, attrs)
        if (mine.op, mine.slots) != (node.op, node.slots):
            return False
        for name, value in mine.attrs.items():
            hole = self.holes.get((type(value), value))
            if hole is not None and attrs.setdefault(hole, node.attrs[name]) != node.attrs[name]:
                return False
        return all(self._unify(m, n, slots, attrs) for m, n in zip(mine.inputs, node.inputs, strict=True))


def patterns_of(op: Op) -> Iterator[Pattern]:
    """One pattern with an op's optional inputs and one without."""
    if op.expansion is None or op.signature is None:
        return
    values = {name: _sample_attr(attr, i) for i, (name, attr) in enumerate(op.attrs.items())}
    optional = any(a.optional for a in op.signature.inputs)
    for full in (True, False) if optional else (True,):
        axes: dict[str, Extent] = {}
        samples: dict[str, Node] = {}
        for argument in (a for a in op.signature.inputs if full or not a.optional):
            kind = argument.type
            same = samples[kind].dtype if kind in samples else values.get(kind)
            dtype = same or _KINDS.get(kind) or as_dtype(kind)
            samples[argument.name] = _sample_input(argument, axes, dtype)
        fused = op.apply(samples, values)
        slots = {node: name for name, node in samples.items()}
        yield Pattern(op, op.rebuild(op.expansion, fused), slots, {(type(v), v): k for k, v in values.items()})


def fuse_declared(supports: Supports) -> Callable[[Graph], Graph]:
    """The pass: expansions -> fused ops, for those that some device supports."""

    def fuse(graph: Graph) -> Graph:
        patterns: dict[str, list[Pattern]] = {}
        for op in map(ops.get, ops):
            for pattern in patterns_of(op):
                patterns.setdefault(pattern.root.op, []).append(pattern)
        for found in patterns.values():
            found.sort(key=lambda p: -p.n_ops)  # the more special one first: swiglu stands in swiglu_clamp

        def replacement(node: Node, _: Node) -> Node | None:
            for pattern in patterns.get(node.op, ()):
                fused = pattern.match(node)
                if fused is not None and supports(fused):
                    return fused
            return None

        return rewrite(graph, replacement)

    return fuse


def same_structure(a: Node, b: Node, leaves: frozenset[Node]) -> bool:
    """Whether two nodes compute the same from the same leaves, which are not looked behind."""
    known: dict[str, int] = {}
    return _number(a, leaves, known) == _number(b, leaves, known)


def _number(root: Node, leaves: frozenset[Node], known: dict[str, int]) -> int:
    """The number of the value that a node computes; nodes that compute the same have the same, however often it is written."""
    number: dict[Node, int] = {}

    def visit(node: Node) -> None:
        if node in number:
            return
        for source in () if node in leaves else node.inputs:
            visit(source)
        line = f"leaf {id(node)}" if node in leaves else structure_line(node, [number[i] for i in node.inputs])
        number[node] = known.setdefault(line, len(known))

    visit(root)
    return number[root]


_KINDS = {"int": i32, "float": f32, "real": f32, "any": f32}


def _sample_attr(attr: Attr, position: int) -> Any:
    """A value that no other attribute has, within its range."""
    if attr.choices is not None:
        return attr.choices[position % len(attr.choices)]
    if attr.type is float:
        low = attr.low if attr.low is not None else (attr.high or 1.0) - 1.0
        high = attr.high if attr.high is not None else low + 1.0
        return low + (high - low) * (0.371 + 0.017 * position)
    if attr.type is int:
        low = max(int(attr.low or 0), 1)
        return low + 100 + position if attr.high is None else max(int(attr.low or 0), int(attr.high) - position)
    if attr.type is DType:
        return as_dtype("f16")
    return attr.type() if attr.required else attr.default


def _sample_input(argument: Argument, axes: dict[str, Extent], dtype: DType) -> Node:
    shape: list[Extent] = []
    for axis in argument.axes:
        if axis.isdigit():
            shape.append(int(axis))
        elif not axis.startswith("*"):
            static = axis not in ("T", "S", "N")
            shape.append(axes.setdefault(axis, 202 + 2 * len(axes) if static else Dim(axis, 64)))
    return input(argument.name, shape, dtype)
