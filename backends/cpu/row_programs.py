"""Row programs: nodes whose row i is made of rows i alone, in one call that goes through all of them row by row.

What they compute of one row is a graph without that axis, whose groups are found and whose kernels are written as for any graph.
What only they read lies in scratch, where it stays in the first cache. Rows that are appended to streams go there at once.
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
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, lay_out
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.backends.cpu.state_calls import read_call, write_row
from tensorgraph.dims import ALWAYS, Dim, Symbol
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import TensorGraphError
from tensorgraph.graph import STRUCTURAL, Graph, Node, input
from tensorgraph.memory import Group
from tensorgraph.views import IndexMap

MOST_NODES = 192
MOST_ELEMENTS = 4096
"""Of a row of a value: more are worth several threads even where there is but one row."""
MOST_BYTES = 1 << 16
"""Of what lies in scratch, kernels' own apart."""
MOST_BESIDE = 1 << 14
"""Of what the smaller of two programs computes that do not read one another, but the same value or group."""

Grouping = Callable[[Sequence[Node], Graph, Context], Sequence[Group]]


def find_row_programs(
    nodes: Sequence[Node],
    graph: Graph,
    condition: Mapping[Node, Hashable],
    taken: Mapping[Node, Group],
    context: Context,
    group: Grouping,
) -> list[CpuGroup]:
    """Groups of several nodes, of which each is one call. `group`: how the nodes of one row are computed.

    Chains of element-wise nodes alone are left to `find_chains`.
    """
    kinds: dict[Node, Hashable] = {}
    sizes: dict[Node, int] = {}
    whole: dict[Node, set[Node]] = {}  # what a node reads all rows of

    def size(some: Sequence[Node]) -> int:
        return sum(map(sizes.__getitem__, some))

    def is_one(a: Sequence[Node], b: Sequence[Node]) -> bool:
        small = len(a) + len(b) <= MOST_NODES and size(a) + size(b) <= MOST_BYTES
        return kinds[a[0]] == kinds[b[0]] and small and not (reads_all(a, b) or reads_all(b, a))

    def reads_all(a: Sequence[Node], b: Sequence[Node]) -> bool:
        return any(not whole[node].isdisjoint(b) for node in a if node in whole)

    search = Search(nodes, condition, taken, is_one)
    for node in nodes:
        if node not in taken and (_is_appended(node) or _is_by_row(node)):
            by_row = [value for slot, value in _slots(node) if slot not in _whole(node)]
            if entire := {value.base for slot, value in _slots(node) if slot in _whole(node)}:
                whole[node] = entire
            kinds[node] = _n_rows(node), condition[node]
            sizes[node] = 0 if node.op == "append" else _row_size(node) * stored_type(node.dtype).size_bytes
            search.add(node, tuple(Read(i, i.index_map) for i in by_row))
    search.add_neighbours(lambda a, b: min(size(a), size(b)) <= MOST_BESIDE)
    found, outputs = list[CpuGroup](), set(graph.outputs.values())
    known: dict[str, Program | None] = {}
    for chain in dict.fromkeys(search.chain.values()):
        computed = [node for node in chain.nodes if node.op != "append"]
        appended = [node for node in chain.nodes if node.op == "append"]
        if len(chain.nodes) == 1 or not computed or (not appended and all(map(kernel_of, computed))):
            continue
        inside = {*chain.nodes, *search.views_of(chain)}
        wanted = {n.base for n in inside if n in outputs or any(user not in inside for user in graph.users[n])}
        row = _OneRow(computed, [node for node in computed if node in wanted], appended, context)
        if row.key not in known:
            known[row.key] = _program(row, context, group)
        program = known[row.key]
        if program is not None:
            seen = [node for node in appended if context.layout(node) == "dense"]
            calls = [program.call(row), *(read_call(node, node, context) for node in seen)]
            found.append(make_group(sorted(inside, key=search.place.__getitem__), [*row.stored, *seen], calls))
    return found


def _slots(node: Node) -> Sequence[tuple[str, Node]]:
    return list(zip(node.slots, node.inputs, strict=True)) if node.op != "append" else [("", node.inputs[0])]


def _whole(node: Node) -> tuple[str, ...]:
    """The slots of which a node reads all rows."""
    kernel: NodeKernel | None = registry.ops.get(node.op).kernel("cpu") if node.op not in STRUCTURAL else None
    return kernel.whole if kernel is not None else ()


def _n_rows(node: Node) -> Any:
    return (node.inputs[0] if node.op == "append" else node).shape[0]


def _is_appended(node: Node) -> bool:
    """Whether rows of known size are appended to a stream."""
    x = node.inputs[0] if node.op == "append" else None
    return x is not None and x.ndim > 1 and _has_rows(x) and not _is_free(x) and _rows_of(x, x.shape[0])


def _is_by_row(node: Node) -> bool:
    """Whether row i of a node is made of rows i of what has as many, and of what has none; all rows being of one known size."""
    op = registry.ops.get(node.op) if node.op not in STRUCTURAL else None
    kernel: NodeKernel | None = op.kernel("cpu") if op is not None else None
    if op is None or kernel is None or not _has_rows(node) or not kernel.supports(node):
        return False
    slots = {slot: value for slot, value in _slots(node) if slot not in kernel.whole}
    rows = {slot for slot, value in slots.items() if not _is_free(value)}
    if any(slot not in rows and (kernel.reads(node, slot) or _elements(x) > MOST_ELEMENTS) for slot, x in slots.items()):
        return False  # weights, which are held as products read them, or are too large to be read for every row
    # of one axis alone, elements are what others have as rows, and what goes along the last axis goes from one to the next
    known = kernel_of(node) is not None or (
        node.ndim > 1 and ((bool(op.row_inputs) and rows <= set(op.row_inputs)) or kernel.by_row(node))
    )
    return known and all(_rows_of(i, node.shape[0]) for i in slots.values())


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
        appended: rows that go to streams.
        key: a text that is the same for nodes that differ only in what they read of others, and in names.
        given, free, whole: what they read of others, in order: bases with rows, values without, and values of which all rows are
            read for each.
    """

    nodes: Sequence[Node]  # that are computed
    stored: Sequence[Node]
    appended: Sequence[Node]
    context: Context
    key: str = ""
    given: dict[Node, int] = field(default_factory=dict)
    free: dict[Node, int] = field(default_factory=dict)
    whole: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = {node: i for i, node in enumerate(self.nodes)}
        said = [f"{[number[node] for node in self.stored]}"]
        for node in (*self.nodes, *self.appended):
            entire = _whole(node)
            read = (f"{slot} {self._said(value, number, slot in entire)}" for slot, value in _slots(node))
            attrs = sorted(node.attrs.items()) if node.op != "append" else [self.stream(node).layout]
            said.append(f"{node.op} {node.dtype} {node.shape} {attrs} {'; '.join(read)}")
        self.key = "\n".join(said)

    def _said(self, value: Node, number: Mapping[Node, int], entire: bool) -> str:
        base = value.base
        if entire:
            place = self.whole.setdefault(value, len(self.whole))
            return f"whole {place} {value.dtype} {value.index_map} {base.shape} {self.context.layout(value)}"
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

    def stream(self, appended: Node) -> Ref:
        """The stream that rows go to."""
        return Ref(appended, self.context.layouts.get(appended.attrs["stream"], "rows"))

    def made(self) -> dict[Node, Node]:
        """For one row: what is computed, what that reads of others, and by their node the rows that are appended."""
        found: dict[Node, Node] = {node: input(f"given{i}", (1, *node.shape[1:]), node.dtype) for node, i in self.given.items()}
        whole = {value: input(f"whole{i}", value.shape, value.dtype) for value, i in self.whole.items()}

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
            slots = {slot: whole[value] if slot in _whole(node) else read(value) for slot, value in _slots(node)}
            found[node] = registry.ops.get(node.op).apply(slots, {name: without(attr) for name, attr in node.attrs.items()})
        return found | whole | {node: read(node.inputs[0]) for node in self.appended}


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
    """What row programs of a key have in common. `own_bytes` of scratch are not the kernels'.

    Attributes:
        appended: the rows that go to streams.
        free, whole: how operands are read that are not rows of something.
    """

    steps: tuple[Step, ...]
    appended: tuple[Arg, ...]
    own_bytes: int
    scratch_bytes: int
    grain: int
    free: Mapping[str, tuple[int, IndexMap]]
    whole: Mapping[int, Ref]

    def call(self, row: _OneRow) -> Call:
        operands: dict[str, Ref | None] = {"rows": Ref(row.n_rows)}
        operands |= {f"given{i}": Ref(node, known=True) for node, i in row.given.items()}
        operands |= {f"y{i}": Ref(node, known=True) for i, node in enumerate(row.stored)}
        values = list(row.free)
        operands |= {name: Ref(values[i], known=True, index_map=index_map) for name, (i, index_map) in self.free.items()}
        operands |= {f"whole{i}": replace(self.whole[i], of=value) for value, i in row.whole.items()}
        operands |= {f"stream{i}": row.stream(node) for i, node in enumerate(row.appended)}
        return Call(
            emit_row_program,
            operands,
            {"steps": self.steps, "appended": self.appended, "own_bytes": self.own_bytes},
            items=row.n_rows,
            grain=self.grain,
            scratch_bytes=self.scratch_bytes,
            nodes=(*row.nodes, *row.appended),
        )


def _program(row: _OneRow, context: Context, group: Grouping) -> Program | None:
    """How the nodes are computed; None where they have kernels that cannot be written for one row."""
    try:
        made = row.made()
    except TensorGraphError:  # what an op's rules do not take of one row
        return None
    if any(made[n].shape != (1, *n.shape[1:]) or made[n].dtype != n.dtype for n in row.nodes):
        return None
    wanted = {f"y{i}": made[node] for i, node in enumerate(row.stored)}
    whole = Graph(wanted | {f"row{i}": made[node] for i, node in enumerate(row.appended)})
    entire = {made[value]: i for value, i in row.whole.items()}
    layouts = {made[value]: context.layout(value) for value in row.whole}
    inside = replace(context, layout=lambda node: layouts.get(node, "dense"))
    groups = group([node for node in whole if node.op not in ("input", "constant")], whole, inside)
    calls: list[Call] = [call for one in groups for call in getattr(one, "calls", ())]
    refs = [ref for call in calls for ref in call.operands.values() if ref is not None]
    if any(call.guard != ALWAYS for call in calls) or not all(isinstance(ref.of, Node) for ref in refs):
        return None
    if any(ref.of in entire and ref.index_map is not None for ref in refs):
        return None
    named = {made[node]: f"given{i}" for node, i in row.given.items()} | {made[n]: f"y{i}" for i, n in enumerate(row.stored)}
    bases = {r.of.base: r.of for r in refs if isinstance(r.of, Node) and not _is_free(r.of)}
    sizes = {b: _row_size(b) * stored_type(b.dtype).size_bytes for b in bases if b not in named and b not in entire}
    places, own_bytes = lay_out({str(i): n for i, n in enumerate(sizes.values())})
    at = dict(zip(sizes, places.values(), strict=True))
    free: dict[tuple[int, IndexMap], str] = {}

    def arg(ref: Ref | None) -> Arg | None:
        if ref is None:
            return None
        assert isinstance(ref.of, Node)
        node, base, index_map = ref.of, ref.of.base, ref.index_map or ref.of.index_map
        if node in entire:
            return Arg("free", f"whole{entire[node]}", str(node.dtype), (), (), 0)
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
    appended = tuple(one for node in row.appended if (one := arg(Ref(made[node]))) is not None)
    work = sum(prod(one.shape) for step in steps for one in step.args if one is not None)
    scratch_bytes = own_bytes + max((call.scratch_bytes for call in calls), default=0)
    read = {entire[ref.of]: ref for ref in refs if isinstance(ref.of, Node) and ref.of in entire}
    ways = {name: one for one, name in free.items()}
    return Program(steps, appended, own_bytes, scratch_bytes, max(1, CHUNK // max(work, 1)), ways, read)


def emit_row_program(
    k: Kernel, operands: Mapping[str, Operand], *, steps: Sequence[Step], appended: Sequence[Arg], own_bytes: int
) -> None:
    scratch = k.scratch()
    with k.rows(operands["rows"].shape) as (row,):

        def operand(arg: Arg) -> Operand:
            if arg.kind == "free":
                return operands[arg.name]
            address = scratch if arg.kind == "scratch" else operands[arg.name].at([row])
            return Operand(k, as_dtype(arg.dtype), arg.shape, arg.strides, address + arg.offset_bytes)

        with k.alone(own_bytes):
            for step in steps:
                made = (None if arg is None else operand(arg) for arg in step.args)
                step.emit(k, dict(zip(step.names, made, strict=True)), **dict(step.attrs))
        for i, arg in enumerate(appended):
            write_row(k, operand(arg), 0, operands[f"stream{i}"], row)
