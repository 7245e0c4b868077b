"""Element-wise kernels: each op gives a formula of values, and one emitter writes a kernel for a node or a chain of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from math import prod
from typing import Any

from tensorgraph import registry
from tensorgraph.backends.cpu.ir import I32, I64, Int, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Calls, Context, Kernel, NodeKernel, Reads, Ref, dense_only
from tensorgraph.backends.cpu.kernel import kernel_of as any_kernel
from tensorgraph.backends.cpu.lines import PIECE, arrange
from tensorgraph.backends.cpu.operands import Operand, computed_type, read_value, stored_type, written_value
from tensorgraph.dims import Shape
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node
from tensorgraph.op import Op
from tensorgraph.views import IndexMap

Formula = Callable[[Kernel, Sequence[Value], Mapping[str, Any]], Value]


@dataclass(frozen=True)
class Read:
    """What a node reads: elements of a node's base, in the reader's shape."""

    node: Node
    index_map: IndexMap

    def in_shape(self, shape: Shape) -> IndexMap | None:
        """The same elements in row order in another shape, None where strides cannot say it."""
        return self.index_map if self.index_map.shape == shape else self.index_map.reshape(shape)


def broadcast_inputs(node: Node) -> tuple[Read, ...]:
    """A node's inputs in the op's order, repeated to its shape by NumPy's rule."""
    signature = registry.ops.get(node.op).signature
    slots = dict(zip(node.slots, node.inputs, strict=True))
    order = [a.name for a in signature.inputs] if signature is not None else list(slots)
    return tuple(Read(slots[s], slots[s].index_map.broadcast(node.shape)) for s in order if s in slots)


@dataclass(frozen=True, kw_only=True)
class ElementwiseKernel(NodeKernel):
    """The kernel of an op each element of whose result is a formula of elements at one place of each operand.

    Attributes:
        formula: `formula(k, values, attrs)`: from values of the types computed in, scalars or vectors, to a value of one: that
            of the result's dtype, or F64 for any float.
        operands: what a node's `values` are read from.
        applies: whether a node of the op is computed so.
    """

    formula: Formula = field(kw_only=True)
    operands: Callable[[Node], tuple[Read, ...]] = broadcast_inputs
    applies: Callable[[Node], bool] = lambda node: True


def cpu_formula(
    op: Op,
    *,
    operands: Callable[[Node], tuple[Read, ...]] = broadcast_inputs,
    applies: Callable[[Node], bool] = lambda node: True,
    otherwise: Calls | None = None,
    supports: Callable[[Node], bool] | None = None,
    reads: Reads = dense_only,
    portable: bool = True,
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Declares an op's formula: `fn(k, *values, **attrs)`; the attribute `shape` is not passed.

    Args:
        operands: what the values are read from, where that is not the node's inputs.
        applies: for which nodes the formula is meant; `otherwise` gives the calls of others, and `supports` says which of all.
        reads, portable: as of a `NodeKernel`, for calls that `otherwise` gives.
    """

    def declare(fn: Callable[..., Value]) -> Callable[..., Value]:
        @wraps(fn)
        def formula(k: Kernel, values: Sequence[Value], attrs: Mapping[str, Any]) -> Value:
            return fn(k, *values, **{name: value for name, value in attrs.items() if name != "shape"})

        def calls(node: Node, context: Context) -> Sequence[Call]:
            if otherwise is not None and not applies(node):
                return otherwise(node, context)
            return [elementwise_call([node], [node])]

        op.kernels["cpu"] = ElementwiseKernel(
            calls,
            supports or applies,
            reads,
            otherwise is None,
            formula=formula,
            operands=operands,
            applies=applies,
            portable=portable,
        )
        return fn

    return declare


def kernel_of(node: Node) -> ElementwiseKernel | None:
    """The element-wise kernel that computes a node, None where none does."""
    kernel = registry.ops.get(node.op).kernel("cpu") if node.op in registry.ops else None
    return kernel if isinstance(kernel, ElementwiseKernel) and kernel.applies(node) and kernel.supports(node) else None


def kernel_on(node: Node, backend: str) -> NodeKernel | None:
    """How a backend computes a node: by a formula where there is one, which any can follow."""
    formula = kernel_of(node)
    return formula if formula is not None else any_kernel(node, backend)


def _kernel(node: Node) -> ElementwiseKernel:
    kernel: ElementwiseKernel = registry.ops.get(node.op).kernel("cpu")
    return kernel


@dataclass(frozen=True)
class Step:
    """One op of a chain: `inputs` number the values before it, what is read first and then the steps' results."""

    op: str
    inputs: tuple[int, ...]
    dtype: DType
    key: str  # attrs as text, which tells 0.0 from -0.0
    attrs: Mapping[str, Any] = field(compare=False)


def common_shape(nodes: Sequence[Node], operands: Callable[[Node], Sequence[Read]]) -> Shape | None:
    """A shape of one of some nodes of one size in which all of them can read what is not of them, None where there is none."""
    outside = [read for node in nodes for read in operands(node) if read.node.base not in nodes]
    shapes = sorted(dict.fromkeys(node.shape for node in nodes), key=len, reverse=True)
    return next((shape for shape in shapes if all(read.in_shape(shape) is not None for read in outside)), None)


def elementwise_call(nodes: Sequence[Node], stored: Sequence[Node]) -> Call:
    """One call that computes nodes of one size, inputs before users, and stores some of them.

    What they read of one another they read in row order; everything else is read in their shape.
    """
    shape = common_shape(nodes, lambda node: _kernel(node).operands(node))
    assert shape is not None
    inputs: dict[Node, list[Node | Read]] = {}
    for node in nodes:
        inputs[node] = []
        for read in _kernel(node).operands(node):
            moved = None if read.node.base in nodes else read.in_shape(shape)
            inputs[node].append(read.node.base if moved is None else Read(read.node, moved))
    reads = list(dict.fromkeys(i for each in inputs.values() for i in each if isinstance(i, Read)))
    values: list[Node | Read] = [*reads, *nodes]
    number = {value: i for i, value in enumerate(values)}
    steps = []
    for node in nodes:
        text = ", ".join(f"{name}={node.attrs[name]!r}" for name in sorted(node.attrs) if name != "shape")
        steps.append(Step(node.op, tuple(number[i] for i in inputs[node]), node.dtype, text, node.attrs))
    lines = arrange(shape, [IndexMap.dense(shape), *(r.index_map for r in reads)])
    operands = {f"y{i}": Ref(node, index_map=lines.maps[0]) for i, node in enumerate(stored)}
    operands |= {f"x{i}": Ref(r.node, index_map=m) for i, (r, m) in enumerate(zip(reads, lines.maps[1:], strict=True))}
    return Call(
        emit_elementwise,
        operands,
        {
            "steps": tuple(steps),
            "stored": tuple(number[node] for node in stored),
            "inner": lines.inner if any(len(m.shape) > len(lines.rows) + 1 for m in lines.maps) else (),
            "pieces": lines.pieces,
        },
        items=lines.items,
        grain=max(1, CHUNK // max(1, lines.item_size * (1 + len(steps)) // 2)),
        nodes=tuple(nodes),
    )


def emit_elementwise(
    k: Kernel,
    operands: Mapping[str, Operand | None],
    *,
    steps: tuple[Step, ...],
    stored: tuple[int, ...],
    inner: tuple[int, ...],
    pieces: bool,
) -> None:
    """Results `y0`, ... and operands `x0`, ... as `Lines` lays them out."""
    given = {name: operand for name, operand in operands.items() if operand is not None}
    results = [given[f"y{i}"] for i in range(len(stored))]
    sources = [given[f"x{i}"] for i in range(len(given) - len(stored))]
    *rows, line = results[0].shape
    n_pieces = [(k.i64(line) + (PIECE - 1)) // PIECE] if pieces else []
    with k.rows([*rows, *n_pieces]) as index:
        start: Int = index.pop() * PIECE if pieces else 0
        count = k.min(k.i64(line) - start, PIECE) if pieces else line
        readers = [_reader(k, source, index, inner) for source in sources]
        writers = [y.row(index) for y in results]

        def body(i: Value, mask: Value | None, _: list[Value]) -> None:
            at = i + start
            values = [read(at, mask) for read in readers]
            results = compute(k, steps, values)
            for number, row in zip(stored, writers, strict=True):
                row.store(at, results[number], mask)

        k.sweep(count, body)


Reader = Callable[[Value, "Value | None"], Value]


def _reader(k: Kernel, source: Operand, index: Sequence[Value], inner: tuple[int, ...]) -> Reader:
    """How the elements from some place of a line on are read."""
    if source.ndim > len(index) + 1:
        return partial(_gather, k, source, index, inner)
    row = source.row(index)
    if isinstance(row.stride, int) and row.stride == 0:
        same = k.splat(row.load(0), k.lanes)
        return lambda at, mask: same
    return lambda at, mask: row.load(at, k.lanes, mask)


def _gather(k: Kernel, source: Operand, index: Sequence[Value], inner: tuple[int, ...], at: Value, mask: Value | None) -> Value:
    """Elements at, at + 1, ... of a line whose axes are (outer, *inner)."""
    size = prod(inner)
    first = at // size
    rest = k.lane_numbers(k.lanes) + k.splat(k.convert(at - first * size, I32), k.lanes)
    strides = source.strides[len(index) :]
    carried = rest // size
    rest = rest - carried * size
    place = k.convert(carried, I64) * k.splat(k.i64(strides[0]), k.lanes)
    for n, stride in zip(reversed(inner), reversed(strides[1:]), strict=True):
        place = place + k.convert(rest % n, I64) * k.splat(k.i64(stride), k.lanes)
        rest = rest // n
    stored = stored_type(source.dtype)
    raw = k.gather(source.at([*index, first]), place * stored.size_bytes, stored.x(k.lanes), mask)
    return read_value(k, raw, source.dtype)


def compute(k: Kernel, steps: Sequence[Step], values: Sequence[Value]) -> list[Value]:
    """The values read and those of every step; a step that is read by another is rounded to its dtype."""
    found = list(values)
    used = {i for step in steps for i in step.inputs}
    for step in steps:
        formula = registry.ops.get(step.op).kernel("cpu").formula
        value = k.convert(formula(k, [found[i] for i in step.inputs], step.attrs), computed_type(step.dtype))
        if len(found) in used:
            value = read_value(k, written_value(k, value, step.dtype), step.dtype)
        found.append(value)
    return found
