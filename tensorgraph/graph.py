"""Graphs: immutable nodes joined by their inputs, and a Graph that names what goes in and comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from tensorgraph import registry
from tensorgraph.dims import ALWAYS, Dim, Extent, Guard, Shape, Symbol, as_extent, maximum, product, shape_text
from tensorgraph.dtypes import DType, as_dtype, f32
from tensorgraph.errors import GraphError, ShapeError, UnknownNameError
from tensorgraph.source import source_line
from tensorgraph.views import IndexMap, infer_reshape

Attrs = Mapping[str, Any]

STRUCTURAL = frozenset(("input", "constant", "view", "read", "append", "copy", "choose"))
"""What the core itself knows; every other `Node.op` is a registered operator."""


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One value of a graph: an operator applied to other values, or a structural node. Immutable; equal only to itself.

    Attributes:
        op: a structural name or a registered operator's.
        slots: the role of each input (`"x"`, `"weight"`), in the operator's order; absent optional inputs have none.
        name: what taps and errors call it; not part of the topology except for inputs, constants and streams.
        where: the model's source line.
        data: a literal constant's array; not part of the topology.
    """

    op: str
    inputs: tuple[Node, ...]
    shape: Shape
    dtype: DType
    attrs: Attrs = field(default_factory=dict)
    slots: tuple[str, ...] = ()
    name: str = ""
    where: str = field(default_factory=source_line)
    data: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", MappingProxyType(dict(self.attrs)))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> Extent:
        return product(self.shape)

    @property
    def base(self) -> Node:
        """The node whose elements this one shows: its input for a view, else itself."""
        return self.inputs[0] if self.op == "view" else self

    @property
    def index_map(self) -> IndexMap:
        """Where this node's elements lie in its base."""
        return self.attrs["map"] if self.op == "view" else IndexMap.dense(self.shape)

    def named(self, name: str) -> Node:
        """The same value under a name, for taps and errors."""
        return replace(self, name=name)

    def at(self, slot: str) -> Node | None:
        """The input in a role, None where it is absent."""
        return self.inputs[self.slots.index(slot)] if slot in self.slots else None

    # Views: index maps over the base, never copies, except where `reshape` cannot be one.

    def _view(self, index_map: IndexMap) -> Node:
        if index_map == self.index_map:
            return self
        if index_map.is_dense and index_map.shape == self.base.shape:
            return self.base
        return Node("view", (self.base,), index_map.shape, self.dtype, {"map": index_map}, ("x",))

    def reshape(self, *shape: Extent) -> Node:
        """The same elements under another shape; one axis may be -1. Copies (`cont`) where strides cannot say it."""
        wanted = infer_reshape(self.shape, [-1 if e == -1 else as_extent(e) for e in shape])
        index_map = self.index_map.reshape(wanted)
        return self._view(index_map) if index_map is not None else registry.ops.get("cont")(self).reshape(*wanted)

    def permute(self, *axes: int) -> Node:
        """Axes in another order, as `numpy.transpose`."""
        counted = [a + self.ndim if a < 0 else a for a in axes]
        if sorted(counted) != list(range(self.ndim)):
            raise ShapeError(f"[permute] wanted each axis of {shape_text(self.shape)} once; got {axes} ({source_line()})")
        return self._view(self.index_map.permute(counted))

    def slice(self, axis: int, start: Extent, stop: Extent, step: int = 1) -> Node:
        """Elements `start`, `start + step`, ... below `stop` along an axis."""
        if not -self.ndim <= axis < self.ndim:
            raise ShapeError(f"[slice] {shape_text(self.shape)} has no axis {axis} ({source_line()})")
        length, start, stop = self.shape[axis], _index(start), _index(stop)
        ordered = not (isinstance(start, int) and isinstance(stop, int)) or 0 <= start <= stop
        if step < 1 or not ordered or (isinstance(length, int) and maximum(stop) > length):
            given = f"{start}:{stop}:{step} on axis {axis} of {shape_text(self.shape)}"
            raise ShapeError(f"[slice] wanted 0 <= start <= stop <= length and step >= 1; got {given} ({source_line()})")
        return self._view(self.index_map.slice(axis % self.ndim, start, stop, step))

    def broadcast(self, *shape: Extent) -> Node:
        """Repeated along axes of length 1 and new leading axes, without copying."""
        return self._view(self.index_map.broadcast(tuple(map(as_extent, shape))))

    def __getitem__(self, key: Any) -> Node:
        """Basic indexing: ints, slices with static or runtime bounds, `...` and None."""
        keys = [_index(k) for k in (key if isinstance(key, tuple) else (key,))]
        if keys.count(Ellipsis) > 1:
            raise ShapeError(f"[slice] wanted one ... at most; got {key} ({source_line()})")
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            fill = self.ndim - sum(k is not None and k is not Ellipsis for k in keys)
            keys[at : at + 1] = [slice(None)] * fill
        view, axis = self, 0
        shape: list[Extent] = []
        for k in keys:
            if k is None:
                shape.append(1)
                continue
            if axis >= self.ndim:
                raise ShapeError(f"[slice] too many indices for {shape_text(self.shape)} ({source_line()})")
            n = self.shape[axis]
            if isinstance(k, slice):
                view = view.slice(axis, *_bounds(k, n), 1 if k.step is None else k.step)
                shape.append(view.shape[axis])
            else:
                start = k + n if isinstance(k, int) and k < 0 else k
                view = view.slice(axis, start, start + 1)
            axis += 1
        return view.reshape(*shape, *view.shape[axis:])

    def __add__(self, other: Node | float) -> Node:
        return _binary("add", self, other)

    def __sub__(self, other: Node | float) -> Node:
        return _binary("sub", self, other)

    def __mul__(self, other: Node | float) -> Node:
        return _binary("mul", self, other)

    def __truediv__(self, other: Node | float) -> Node:
        return _binary("div", self, other)

    def __neg__(self) -> Node:
        return registry.ops.get("scale")(self, scale=-1.0)

    def __rsub__(self, other: float) -> Node:
        return -self + other

    __radd__, __rmul__ = __add__, __mul__
    # Iterating would index without end, since a Dim has no last element; NumPy leaves `array + node` to the node.
    __iter__ = __contains__ = __array_ufunc__ = None

    def cast(self, dtype: DType | str) -> Node:
        return registry.ops.get("cast")(self, dtype=as_dtype(dtype))

    def __repr__(self) -> str:
        name = f' "{self.name}"' if self.name else ""
        return f"<{self.op}{name} {self.dtype}{shape_text(self.shape)}>"


def _binary(op: str, a: Node, b: Node | float) -> Node:
    if isinstance(b, Node):
        return registry.ops.get(op)(a, b)
    if not isinstance(b, (int, float, np.number)) or (op == "div" and b == 0):
        raise GraphError(f"[{op}] wanted a value of a graph or a number (to divide by: not 0); got {b!r} ({source_line()})")
    if op in ("mul", "div"):
        scale, bias = (b if op == "mul" else 1.0 / b), 0.0
    else:
        scale, bias = 1.0, (b if op == "add" else -b)
    return registry.ops.get("scale")(a, scale=float(scale), bias=float(bias))


def _index(key: Any) -> Any:
    """A key of `x[...]`, NumPy's numbers made ints."""
    if isinstance(key, slice):
        return slice(*(None if e is None else _index(e) for e in (key.start, key.stop, key.step)))
    if key is None or key is Ellipsis or isinstance(key, Symbol):
        return key
    if isinstance(key, bool) or not hasattr(key, "__index__"):
        raise ShapeError(f"[slice] wanted ints, Dims, slices, ... or None as indices; got {key!r} ({source_line()})")
    return int(key.__index__())


def _bounds(key: slice, length: Extent) -> tuple[Extent, Extent]:
    start = 0 if key.start is None else key.start
    stop = length if key.stop is None else key.stop
    start, stop = (e + length if isinstance(e, int) and e < 0 else e for e in (start, stop))
    if isinstance(stop, int) and isinstance(length, int):
        stop = min(stop, length)
    return start, stop


def input(name: str, shape: Sequence[Extent], dtype: DType | str = f32) -> Node:
    """A value given by name each time a plan runs; axes may be Dims, whose values are read off the arrays given."""
    return Node("input", (), tuple(map(as_extent, shape)), as_dtype(dtype), {"name": name}, (), name)


def constant(name: str, value: np.ndarray | None = None, *, shape: Sequence[int] = (), dtype: DType | str = f32) -> Node:
    """A weight: a value attached by name when a plan is bound, or a literal array.

    Dtypes: any; a block type's `shape` counts elements, and its array is `uint8 [..., row_bytes]`.
    """
    if value is not None:
        value = np.array(value)
        value.flags.writeable = False
        shape, dtype = value.shape, as_dtype(value.dtype)
    return Node("constant", (), tuple(map(as_extent, shape)), as_dtype(dtype), {"name": name}, (), name, data=value)


def read(stream: str, rows: Extent, row_shape: Sequence[int], dtype: DType) -> Node:
    """The visible rows of a state stream that this step does not append to."""
    return Node("read", (), (rows, *row_shape), dtype, {"stream": stream}, (), stream)


def append(stream: str, x: Node, rows: Extent, dtype: DType) -> Node:
    """Append rows, rounded to the stream's dtype, and read all rows visible after it.

    Shapes: x [N, *row] -> [rows, *row].
    """
    return Node("append", (x,), (rows, *x.shape[1:]), dtype, {"stream": stream}, ("x",), stream)


def choose(alternatives: Mapping[str, tuple[Node, Guard | bool]], name: str = "") -> Node:
    """Several forms of one value; when a step runs, the first whose guard holds is computed and the others are not.

    A bound on an extent that is a number is a bool already: False leaves the form out.

    Raises:
        ShapeError: the forms differ in shape or dtype.
        GraphError: the last one has a guard (there must be a form for every step).
    """
    forms = {label: (n, ALWAYS if g is True else g) for label, (n, g) in alternatives.items() if g is not False}
    dense = {n: n if n.index_map.is_dense else registry.ops.get("cont")(n) for n, _ in forms.values()}  # lies where the form does
    nodes, guards = tuple(dense[n] for n, _ in forms.values()), tuple(g for _, g in forms.values() if isinstance(g, Guard))
    if not guards or guards[-1].bounds:
        given = f"if {guards[-1]}" if guards else "no form"
        raise GraphError(f"[choose] the last form must be always possible; got: {given} ({source_line()})")
    for label, node in zip(forms, nodes, strict=True):
        if (node.shape, node.dtype) != (nodes[0].shape, nodes[0].dtype):
            raise ShapeError(f"[choose] wanted {nodes[0]!r} from every form; {label!r} gives {node!r} ({source_line()})")
    return Node("choose", nodes, nodes[0].shape, nodes[0].dtype, {"guards": guards}, tuple(forms), name)


def topological(roots: Iterable[Node]) -> list[Node]:
    """Every node that `roots` need, inputs before users, in the order in which they were first reached."""
    order: list[Node] = []
    done: set[int] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, expanded = stack.pop()
        if id(node) in done:
            continue
        if expanded:
            done.add(id(node))
            order.append(node)
            continue
        stack.append((node, True))
        stack.extend((i, False) for i in reversed(node.inputs) if id(i) not in done)
    return order


class Graph:
    """An immutable graph: the named outputs, the appends to state, and everything that they need.

    Nodes that nothing needs are not part of it. `print(graph)` shows it.
    """

    def __init__(self, outputs: Mapping[str, Node] | None = None, *, effects: Sequence[Node] = (), **more: Node) -> None:
        self.outputs: Mapping[str, Node]
        self.effects: tuple[Node, ...]
        self.__dict__.update(outputs=MappingProxyType({**(outputs or {}), **more}), effects=tuple(effects))
        wrong = [f"{name}={value!r}" for name, value in self.outputs.items() if not isinstance(value, Node)]
        if wrong or not self.outputs:
            raise GraphError(f"[graph] wanted at least one output, each a value; got {wrong or 'none'} ({source_line()})")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a graph is immutable; wanted to set {name!r}")

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(topological((*self.effects, *self.outputs.values())))

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def number(self) -> Mapping[Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def inputs(self) -> Mapping[str, Node]:
        return _unique("input", (n for n in self.nodes if n.op == "input"), "name")

    @cached_property
    def constants(self) -> Mapping[str, Node]:
        return _unique("constant", (n for n in self.nodes if n.op == "constant"), "name")

    @cached_property
    def literals(self) -> Mapping[str, np.ndarray]:
        """The arrays of the constants that have one, by name; not part of the topology."""
        return {name: node.data for name, node in self.constants.items() if node.data is not None}

    @cached_property
    def streams(self) -> Mapping[str, Node]:
        return _unique("stream", (n for n in self.nodes if n.op in ("read", "append")), "stream")

    @cached_property
    def dims(self) -> Mapping[str, Dim]:
        found: dict[str, Dim] = {}
        for dim in (d for n in self.nodes for e in _extents(n) if isinstance(e, Symbol) for d in e.dims()):
            if found.setdefault(dim.name, dim) != dim:
                raise GraphError(f"[graph] the dim {dim.name} has two maxima: {found[dim.name].max} and {dim.max}")
        return found

    @cached_property
    def users(self) -> Mapping[Node, tuple[Node, ...]]:
        users: dict[Node, list[Node]] = {n: [] for n in self.nodes}
        for node in self.nodes:
            for i in dict.fromkeys(node.inputs):
                users[i].append(node)
        return {n: tuple(u) for n, u in users.items()}

    def find(self, name: str) -> Node:
        """The node that carries a name.

        Raises: UnknownNameError: none does; the message lists some that are there.
        """
        if name in self.outputs:
            return self.outputs[name]
        for node in self.nodes:
            if node.name == name:
                return node
        names = sorted({n.name for n in self.nodes if n.name and n.op not in ("constant", "input")})
        raise UnknownNameError(f"[graph] no node is named {name!r}. Named: {', '.join(names[:40]) or 'none'}")

    def with_outputs(self, outputs: Mapping[str, Node]) -> Graph:
        return Graph(outputs, effects=self.effects)

    @cached_property
    def key(self) -> str:
        """A hash of the topology: ops, attributes, dtypes, shapes with named extents, streams; no value, no pointer."""
        lines = [structure_line(node, [self.number[i] for i in node.inputs]) for node in self.nodes]
        lines += [f"{dim.name}<={dim.max};" for dim in self.dims.values()]
        lines += [f"{name}={self.number[node]};" for name, node in (*self.outputs.items(), *(("", n) for n in self.effects))]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]

    def to_networkx(self) -> Any:
        """The def-use graph as a `networkx.MultiDiGraph`, for export and coarse questions; numbered as `print` does."""
        import networkx as nx  # takes longer to import than all of the core

        graph = nx.MultiDiGraph()
        for node, i in self.number.items():
            graph.add_node(i, op=node.op, name=node.name, shape=shape_text(node.shape), dtype=node.dtype.name)
            graph.add_edges_from((self.number[source], i) for source in node.inputs)
        return graph

    def __str__(self) -> str:
        from tensorgraph.text import graph_text

        return graph_text(self)


def structure_line(node: Node, inputs: Sequence[int]) -> str:
    """What makes two nodes compute the same: one line of the topology."""
    attrs = ",".join(f"{k}={node.attrs[k]}" for k in sorted(node.attrs))
    return f"{node.op}({','.join(node.slots)}:{','.join(map(str, inputs))}){{{attrs}}}{node.dtype}{shape_text(node.shape)}\n"


def _extents(node: Node) -> Iterator[Any]:
    """Whatever in a node may be an extent: its shape, where a view lies, guards, and attributes."""
    yield from node.shape
    for value in node.attrs.values():
        if isinstance(value, IndexMap):
            yield from (*value.strides, value.offset)
        elif isinstance(value, tuple):
            yield from (b[0] for guard in value if isinstance(guard, Guard) for b in guard.bounds)
            yield from value


def _unique(kind: str, nodes: Iterable[Node], attr: str) -> Mapping[str, Node]:
    found: dict[str, Node] = {}
    for node in nodes:
        if found.setdefault(node.attrs[attr], node) is not node:
            raise GraphError(f"[graph] two nodes are the {kind} {node.attrs[attr]!r} ({node.where})")
    return found
