"""Row programs: nodes whose row i is made of rows i alone, in one call that goes through all of them row by row.

Rows stand over the tokens, or over tokens and heads. What they compute of one row is a graph without those axes, whose groups
are found and whose kernels are written as for any graph.
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
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, Ref, lay_out
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.backends.cpu.rows import Rows, is_free, row_size, rows_of, slots_of, whole_slots
from tensorgraph.backends.cpu.state_calls import read_call, write_row
from tensorgraph.dims import ALWAYS, Shape, Symbol, product
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import TensorGraphError
from tensorgraph.graph import Graph, Node, input
from tensorgraph.memory import Group
from tensorgraph.views import IndexMap

MOST_NODES = 192
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
    rows: dict[Node, Rows] = {}
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
        if node in taken or (found := rows_of(node, context.backend)) is None:
            continue
        rows[node], kinds[node] = found, (found.axes, condition[node])
        sizes[node] = 0 if node.op == "append" else row_size(node, len(found.axes)) * stored_type(node.dtype).size_bytes
        entire = whole_slots(node, context.backend)
        if entire:
            whole[node] = {value.base for slot, value in slots_of(node) if slot in entire}
        search.add(node, tuple(Read(value, value.index_map) for slot, value in slots_of(node) if slot not in entire))
    search.add_neighbours(lambda a, b: min(size(a), size(b)) <= MOST_BESIDE)
    made, outputs = list[CpuGroup](), set(graph.outputs.values())
    known: dict[str, Program | None] = {}
    for chain in dict.fromkeys(search.chain.values()):
        computed = [node for node in chain.nodes if node.op != "append"]
        appended = [node for node in chain.nodes if node.op == "append"]
        if len(chain.nodes) == 1 or not computed or (not appended and all(map(kernel_of, computed))):
            continue
        inside = {*chain.nodes, *search.views_of(chain)}
        wanted = {n.base for n in inside if n in outputs or any(user not in inside for user in graph.users[n])}
        row = _OneRow(computed, [node for node in computed if node in wanted], appended, rows, context)
        if row.key not in known:
            known[row.key] = _program(row, context, group)
        program = known[row.key]
        if program is not None:
            seen = [node for node in appended if context.layout(node) == "dense"]
            calls = [program.call(row), *(read_call(node, node, context) for node in seen)]
            made.append(make_group(sorted(inside, key=search.place.__getitem__), [*row.stored, *seen], calls))
    return made


@dataclass
class _OneRow:
    """Nodes as they are for one row. What they read of others are inputs there, and values without rows constants.

    Attributes:
        appended: rows that go to streams.
        rows: how each node goes row by row.
        key: a text that is the same for nodes that differ only in what they read of others, and in names.
        given: what has rows, in order, and over how many axes they stand: bases, or where rows stand over two axes the values.
        free, whole: values without rows, and values of which all rows are read for each.
    """

    nodes: Sequence[Node]  # that are computed
    stored: Sequence[Node]
    appended: Sequence[Node]
    rows: Mapping[Node, Rows]
    context: Context
    key: str = ""
    given: dict[Node, int] = field(default_factory=dict)
    free: dict[Node, int] = field(default_factory=dict)
    whole: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = {node: i for i, node in enumerate(self.nodes)}
        said = [f"{self.axes} {[number[node] for node in self.stored]}"]
        for node in (*self.nodes, *self.appended):
            entire, depth = whole_slots(node, self.context.backend), self.rows[node].depth
            read = (f"{slot} {self._said(value, number, depth[slot], slot in entire)}" for slot, value in slots_of(node))
            attrs = sorted(node.attrs.items()) if node.op != "append" else [self.stream(node).layout]
            said.append(f"{node.op} {node.dtype} {node.shape} {attrs} {'; '.join(read)}")
        self.key = "\n".join(said)

    def _said(self, value: Node, number: Mapping[Node, int], depth: int, entire: bool) -> str:
        base = value.base
        if entire:
            place = self.whole.setdefault(value, len(self.whole))
            return f"whole {place} {value.dtype} {value.index_map} {base.shape} {self.context.layout(value)}"
        if is_free(value):
            return f"free {self.free.setdefault(value, len(self.free))} {value.dtype} {value.index_map} {base.shape}"
        if base in number:
            return f"own {number[base]} {value.index_map}"
        source = base if len(self.axes) == 1 else value
        self.given.setdefault(source, depth)
        return f"given {[*self.given].index(source)} {depth} {value.dtype} {value.index_map} {base.shape}"

    @property
    def axes(self) -> Shape:
        return self.rows[self.nodes[0]].axes

    def one(self, node: Node, depth: int) -> Shape:
        """The shape of one row."""
        return (*(1,) * depth, *node.shape[depth:])

    def stream(self, appended: Node) -> Ref:
        """The stream that rows go to."""
        return Ref(appended, self.context.layouts.get(appended.attrs["stream"], "rows"))

    def made(self) -> dict[Node, Node]:
        """For one row: what is computed, what that reads of others, and by their node the rows that are appended."""
        found: dict[Node, Node] = {}
        for i, (node, depth) in enumerate(self.given.items()):
            found[node] = input(f"given{i}", self.one(node, depth), node.dtype)
        whole = {value: input(f"whole{i}", value.shape, value.dtype) for value, i in self.whole.items()}
        n_axes = len(self.axes)

        def read(value: Node) -> Node:
            if is_free(value):
                return value
            if value in found:
                return found[value]
            base, index_map = found[value.base], value.index_map
            row = IndexMap(self.one(value, n_axes), index_map.strides, index_map.offset)
            return Node("view", (base,), row.shape, value.dtype, {"map": row}, ("x",))

        def without(attr: Any) -> Any:
            if isinstance(attr, Symbol):
                return attr.evaluate({str(self.axes[0]): 1})
            return tuple(map(without, attr)) if type(attr) is tuple else attr

        for node in self.nodes:
            entire = whole_slots(node, self.context.backend)
            slots = {slot: whole[value] if slot in entire else read(value) for slot, value in slots_of(node)}
            found[node] = registry.ops.get(node.op).apply(slots, {name: without(attr) for name, attr in node.attrs.items()})
        return found | whole | {node: read(node.inputs[0]) for node in self.appended}


class Arg(NamedTuple):
    """An operand of a step: a row over `depth` axes of the call's operand NAME, that operand itself (`free`), or a place in
    scratch."""

    kind: str
    name: str
    depth: int
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
        operands: dict[str, Ref | None] = {"rows": Ref(row.axes[0])}
        operands |= {f"given{i}": Ref(node, known=True) for i, node in enumerate(row.given)}
        operands |= {f"y{i}": Ref(node, known=True) for i, node in enumerate(row.stored)}
        values = list(row.free)
        operands |= {name: Ref(values[i], known=True, index_map=index_map) for name, (i, index_map) in self.free.items()}
        operands |= {f"whole{i}": replace(self.whole[i], of=value) for value, i in row.whole.items()}
        operands |= {f"stream{i}": row.stream(node) for i, node in enumerate(row.appended)}
        return Call(
            emit_row_program,
            operands,
            {"steps": self.steps, "appended": self.appended, "own_bytes": self.own_bytes, "heads": row.axes[1:]},
            items=product(row.axes),
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
    n_axes = len(row.axes)
    if any(made[n].shape != row.one(n, n_axes) or made[n].dtype != n.dtype for n in row.nodes):
        return None
    wanted = {f"y{i}": made[node] for i, node in enumerate(row.stored)}
    whole = Graph(wanted | {f"row{i}": made[node] for i, node in enumerate(row.appended)})
    entire = {made[value]: i for value, i in row.whole.items()}
    layouts = {made[value]: context.layout(value) for value in row.whole}
    inside = replace(context, layout=lambda node: layouts.get(node, "dense"), by_row=True)
    groups = group([node for node in whole if node.op not in ("input", "constant")], whole, inside)
    calls: list[Call] = [call for one in groups for call in getattr(one, "calls", ())]
    refs = [ref for call in calls for ref in call.operands.values() if ref is not None]
    if any(call.guard != ALWAYS or not call.described for call in calls) or not all(isinstance(ref.of, Node) for ref in refs):
        return None
    if any(ref.of in entire and ref.index_map is not None for ref in refs):
        return None
    named = {made[node]: (f"given{i}", depth) for i, (node, depth) in enumerate(row.given.items())}
    named |= {made[node]: (f"y{i}", n_axes) for i, node in enumerate(row.stored)}
    bases = {r.of.base: r.of for r in refs if isinstance(r.of, Node) and not is_free(r.of)}
    sizes = {b: row_size(b, n_axes) * stored_type(b.dtype).size_bytes for b in bases if b not in named and b not in entire}
    places, own_bytes = lay_out({str(i): n for i, n in enumerate(sizes.values())})
    at = dict(zip(sizes, places.values(), strict=True))
    free: dict[tuple[int, IndexMap], str] = {}

    def arg(ref: Ref | None) -> Arg | None:
        if ref is None:
            return None
        assert isinstance(ref.of, Node)
        node, base, index_map = ref.of, ref.of.base, ref.index_map or ref.of.index_map
        if node in entire:
            return Arg("free", f"whole{entire[node]}", 0, str(node.dtype), (), (), 0)
        shape, strides, offset = index_map.resolve({})
        if is_free(node):
            name = free.setdefault((row.free[node], index_map), f"free{len(free)}")
            return Arg("free", name, 0, str(node.dtype), shape, strides, 0)
        offset_bytes = offset * stored_type(node.dtype).size_bytes
        if base in named:
            return Arg("row", *named[base], str(node.dtype), shape, strides, offset_bytes)
        return Arg("scratch", "", 0, str(node.dtype), shape, strides, at[base] + offset_bytes)

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
    k: Kernel,
    operands: Mapping[str, Operand],
    *,
    steps: Sequence[Step],
    appended: Sequence[Arg],
    own_bytes: int,
    heads: tuple[int, ...],
) -> None:
    scratch = k.scratch()
    with k.rows([*operands["rows"].shape, *heads]) as index:

        def operand(arg: Arg) -> Operand:
            if arg.kind == "free":
                return operands[arg.name]
            address = scratch if arg.kind == "scratch" else operands[arg.name].at(index[: arg.depth])
            return Operand(k, as_dtype(arg.dtype), arg.shape, arg.strides, address + arg.offset_bytes)

        with k.alone(own_bytes):
            for step in steps:
                made = (None if arg is None else operand(arg) for arg in step.args)
                step.emit(k, dict(zip(step.names, made, strict=True)), **dict(step.attrs))
        for i, arg in enumerate(appended):
            write_row(k, operand(arg), 0, operands[f"stream{i}"], index[0])
