"""Row programs: nodes whose row i is made of rows i alone, in one call that goes through all of them row by row.

What they compute of one row is a graph without that axis, whose groups are found and whose kernels are written as for any graph.
What only they read lies in scratch, where it stays in the first cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

from tensorgraph import registry
from tensorgraph.backends.cpu.chains import Search
from tensorgraph.backends.cpu.elementwise import Read, kernel_of
from tensorgraph.backends.cpu.group import CpuGroup, make_group
from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, lay_out
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.dims import ALWAYS, Dim, Symbol
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import TensorGraphError
from tensorgraph.graph import STRUCTURAL, Graph, Node, input
from tensorgraph.memory import Group
from tensorgraph.views import IndexMap

MOST_NODES = 128
MOST_ELEMENTS = 4096
"""Of a row of a value: more are worth several threads even where there is but one row."""
MOST_BYTES = 1 << 16
"""Of what lies in scratch, kernels' own apart."""

Grouping = Callable[[Sequence[Node], Graph, Context], Sequence[Group]]


def find_row_programs(
    nodes: Sequence[Node], graph: Graph, condition: Mapping[Node, Hashable], taken: set[Node], context: Context, group: Grouping
) -> list[CpuGroup]:
    """Groups of several nodes, of which each is one call. `group`: how the nodes of one row are computed.

    Chains of element-wise nodes alone are left to `find_chains`.
    """
    kinds: dict[Node, Hashable] = {}
    sizes: dict[Node, int] = {}

    def is_one(some: Sequence[Node]) -> bool:
        alike = len(set(map(kinds.__getitem__, some))) == 1
        return alike and len(some) <= MOST_NODES and sum(map(sizes.__getitem__, some)) <= MOST_BYTES

    search = Search(nodes, condition, is_one)
    for node in nodes:
        if node not in taken and _is_by_row(node):
            kinds[node] = node.shape[0], condition[node]
            sizes[node] = _row_size(node) * stored_type(node.dtype).size_bytes
            search.add(node, tuple(Read(i, i.index_map) for i in node.inputs))
    found, outputs = list[CpuGroup](), set(graph.outputs.values())
    known: dict[str, Program | None] = {}
    for chain in dict.fromkeys(search.chain.values()):
        if len(chain.nodes) == 1 or all(kernel_of(node) for node in chain.nodes):
            continue
        inside = {*chain.nodes, *search.views_of(chain)}
        wanted = {n.base for n in inside if n in outputs or any(user not in inside for user in graph.users[n])}
        row = _OneRow(chain.nodes, [node for node in chain.nodes if node in wanted])
        if row.key not in known:
            known[row.key] = _program(row, replace(context, layout=lambda node: "dense"), group)
        program = known[row.key]
        if program is not None:
            nodes = sorted(inside, key=search.place.__getitem__)
            found.append(make_group(nodes, row.stored, [program.call(row)]))
    return found


def _is_by_row(node: Node) -> bool:
    """Whether row i of a node is made of rows i of what has as many, and of what has none; all rows being of one known size."""
    op = registry.ops.get(node.op) if node.op not in STRUCTURAL else None
    kernel: NodeKernel | None = op.kernel("cpu") if op is not None else None
    if op is None or kernel is None or not _has_rows(node) or not kernel.supports(node):
        return False
    slots = dict(zip(node.slots, node.inputs, strict=True))
    rows = {slot for slot, value in slots.items() if not _is_free(value)}
    if any(slot not in rows and (kernel.reads(node, slot) or _elements(x) > MOST_ELEMENTS) for slot, x in slots.items()):
        return False  # weights, which are held as products read them, or are too large to be read for every row
    # of one axis alone, elements are what others have as rows, and what goes along the last axis goes from one to the next
    known = kernel_of(node) is not None or (
        node.ndim > 1 and ((bool(op.row_inputs) and rows <= set(op.row_inputs)) or kernel.by_row(node))
    )
    return known and all(_rows_of(i, node.shape[0]) for i in node.inputs)


def _has_rows(node: Node) -> bool:
    sizes = node.shape[1:]
    known = bool(node.shape) and isinstance(node.shape[0], Dim) and all(isinstance(n, int) for n in sizes)
    return known and not node.dtype.is_block and prod(n for n in sizes if isinstance(n, int)) <= MOST_ELEMENTS


def _is_free(value: Node) -> bool:
    """Whether a value has no rows: it is the same in every step."""
    return value.base.op == "constant" and not any(isinstance(e, Symbol) for e in (*value.shape, value.index_map.offset))


def _rows_of(value: Node, n_rows: Any) -> bool:
    """Whether a value is free, or its rows lie in rows of its base that are of one known size."""
    base = value.base
    if _is_free(value):
        return True
    if not (value.shape and value.shape[0] == n_rows and _has_rows(base) and base.shape[0] == n_rows):
        return False
    index_map, axes = value.index_map, len(value.shape) - 1
    extents = (*index_map.shape[1:], *index_map.strides[1:], index_map.strides[0], index_map.offset)
    numbers = [e for e in extents if isinstance(e, int)]
    if len(numbers) < len(extents) or index_map.within or base.op in ("append", "read"):
        return False
    sizes, strides, (row, offset) = numbers[:axes], numbers[axes : 2 * axes], numbers[2 * axes :]
    last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    return row == _row_size(base) and 0 <= offset <= last < row and min(strides, default=0) >= 0


def _elements(value: Node) -> int:
    """Of a value without rows."""
    return prod(n for n in value.shape if isinstance(n, int))


def _row_size(node: Node) -> int:
    """Elements of a row."""
    return prod(n for n in node.shape[1:] if isinstance(n, int))


@dataclass
class _OneRow:
    """Nodes as they are for one row. What they read of others are inputs there, and values without rows constants.

    Attributes:
        key: a text that is the same for nodes that differ only in what they read of others, and in names.
        given, free: what they read of others, in order: bases with rows, and values without.
    """

    nodes: Sequence[Node]  # that are computed
    stored: Sequence[Node]
    key: str = ""
    given: dict[Node, int] = field(default_factory=dict)
    free: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = {node: i for i, node in enumerate(self.nodes)}
        said = [f"{[number[node] for node in self.stored]}"]
        for node in self.nodes:
            read = (f"{slot} {self._said(value, number)}" for slot, value in zip(node.slots, node.inputs, strict=True))
            said.append(f"{node.op} {node.dtype} {node.shape} {sorted(node.attrs.items())} {'; '.join(read)}")
        self.key = "\n".join(said)

    def _said(self, value: Node, number: Mapping[Node, int]) -> str:
        base = value.base
        if _is_free(value):
            return f"free {self.free.setdefault(value, len(self.free))} {value.dtype} {value.index_map} {base.shape}"
        if base in number:
            return f"own {number[base]} {value.index_map}"
        return f"given {self.given.setdefault(base, len(self.given))} {value.dtype} {value.index_map} {base.shape}"

    @property
    def n_rows(self) -> Dim:
        n_rows = self.nodes[0].shape[0]
        assert isinstance(n_rows, Dim)
        return n_rows

    def made(self) -> dict[Node, Node]:
        """For one row: what is computed, and what that reads of others."""
        found: dict[Node, Node] = {node: input(f"given{i}", (1, *node.shape[1:]), node.dtype) for node, i in self.given.items()}

        def read(value: Node) -> Node:
            if _is_free(value):
                return value
            base, index_map = found[value.base], value.index_map
            if value.op != "view":
                return base
            row = IndexMap((1, *index_map.shape[1:]), index_map.strides, index_map.offset)
            return Node("view", (base,), row.shape, value.dtype, {"map": row}, ("x",))

        def without(attr: Any) -> Any:
            if isinstance(attr, Symbol):
                return attr.evaluate({self.n_rows.name: 1})
            return tuple(map(without, attr)) if type(attr) is tuple else attr

        for node in self.nodes:
            slots = {slot: read(value) for slot, value in zip(node.slots, node.inputs, strict=True)}
            found[node] = registry.ops.get(node.op).apply(slots, {name: without(attr) for name, attr in node.attrs.items()})
        return found


class Arg(NamedTuple):
    """An operand of a step: a row of the call's operand NAME, that operand itself (`free`), or a place in scratch."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset_bytes: int


class Step(NamedTuple):
    """A kernel that is written for one row: `emit(k, operands, **attrs)`."""

    emit: Any
    names: tuple[str, ...]
    args: tuple[Arg | None, ...]
    attrs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Program:
    """What row programs of a key have in common. `own_bytes` of scratch are not the kernels'; `free`: how operands are read."""

    steps: tuple[Step, ...]
    own_bytes: int
    scratch_bytes: int
    grain: int
    free: Mapping[str, tuple[int, IndexMap]]

    def call(self, row: _OneRow) -> Call:
        operands: dict[str, Ref | None] = {f"given{i}": Ref(node, known=True) for node, i in row.given.items()}
        operands |= {f"y{i}": Ref(node, known=True) for i, node in enumerate(row.stored)}
        values = list(row.free)
        operands |= {name: Ref(values[i], known=True, index_map=index_map) for name, (i, index_map) in self.free.items()}
        return Call(
            emit_row_program,
            operands,
            {"steps": self.steps, "own_bytes": self.own_bytes},
            items=row.n_rows,
            grain=self.grain,
            scratch_bytes=self.scratch_bytes,
            nodes=tuple(row.nodes),
        )


def _program(row: _OneRow, context: Context, group: Grouping) -> Program | None:
    """How the nodes are computed; None where they have kernels that cannot be written for one row."""
    try:
        made = row.made()
    except TensorGraphError:  # what an op's rules do not take of one row
        return None
    if any(made[n].shape != (1, *n.shape[1:]) or made[n].dtype != n.dtype for n in row.nodes):
        return None
    whole = Graph({f"y{i}": made[node] for i, node in enumerate(row.stored)})
    groups = group([node for node in whole if node.op not in ("input", "constant")], whole, context)
    calls: list[Call] = [call for one in groups for call in getattr(one, "calls", ())]
    refs = [ref for call in calls for ref in call.operands.values() if ref is not None]
    if any(call.guard != ALWAYS for call in calls) or not all(isinstance(ref.of, Node) for ref in refs):
        return None
    named = {made[node]: f"given{i}" for node, i in row.given.items()} | {made[n]: f"y{i}" for i, n in enumerate(row.stored)}
    bases = {
        ref.of.base: ref.of for ref in refs if isinstance(ref.of, Node) and not _is_free(ref.of) and ref.of.base not in named
    }
    sizes = {base: _row_size(base) * stored_type(base.dtype).size_bytes for base in bases}
    places, own_bytes = lay_out({str(i): n for i, n in enumerate(sizes.values())})
    at = dict(zip(bases, places.values(), strict=True))
    free: dict[tuple[int, IndexMap], str] = {}

    def arg(ref: Ref | None) -> Arg | None:
        if ref is None:
            return None
        assert isinstance(ref.of, Node)
        node, base, index_map = ref.of, ref.of.base, ref.index_map or ref.of.index_map
        shape, strides, offset = index_map.resolve({})
        if _is_free(node):
            name = free.setdefault((row.free[node], index_map), f"free{len(free)}")
            return Arg("free", name, str(node.dtype), shape, strides, 0)
        offset_bytes = offset * stored_type(node.dtype).size_bytes
        if base in named:
            return Arg("row", named[base], str(node.dtype), shape, strides, offset_bytes)
        return Arg("scratch", "", str(node.dtype), shape, strides, at[base] + offset_bytes)

    steps = tuple(
        Step(call.emit, tuple(call.operands), tuple(map(arg, call.operands.values())), tuple(sorted(call.attrs.items())))
        for call in calls
    )
    work = sum(prod(one.shape) for step in steps for one in step.args if one is not None)
    scratch_bytes = own_bytes + max((call.scratch_bytes for call in calls), default=0)
    return Program(steps, own_bytes, scratch_bytes, max(1, CHUNK // max(work, 1)), {name: one for one, name in free.items()})


def emit_row_program(k: Kernel, operands: Mapping[str, Operand | None], *, steps: Sequence[Step], own_bytes: int) -> None:
    scratch, first = k.scratch(), operands["y0"]
    assert first is not None
    with k.rows(first.shape[:1]) as (row,):

        def operand(arg: Arg | None) -> Operand | None:
            if arg is None:
                return None
            dtype = as_dtype(arg.dtype)
            if arg.kind == "free":
                return operands[arg.name]
            address = scratch if arg.kind == "scratch" else _row(operands[arg.name], row)
            return Operand(k, dtype, arg.shape, arg.strides, address + arg.offset_bytes)

        with k.alone(own_bytes):
            for step in steps:
                made = dict(zip(step.names, map(operand, step.args), strict=True))
                step.emit(k, made, **dict(step.attrs))


def _row(operand: Operand | None, row: Value) -> Value:
    assert operand is not None
    return operand.at([row])
