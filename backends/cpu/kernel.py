"""Kernels: what an op's file declares for the CPU, and the function that it writes.

A kernel is a function `(args, thread, chunk, chunks, first)`: it computes part `chunk` of `chunks` of its work, which is cut
by shape alone. `args` holds the addresses of operands and, for extents that are not known while emitting, the addresses of
their values, so the code is free of positions and shared by all layers, plans and processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tensorgraph import registry
from tensorgraph.backends.cpu.emit import Function, Loop, Values
from tensorgraph.backends.cpu.ir import I1, I64, PTR, Int, Value
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.target import Target
from tensorgraph.dims import ALWAYS, Extent, Guard, product
from tensorgraph.graph import STRUCTURAL, Node
from tensorgraph.op import Op
from tensorgraph.views import IndexMap

Emit = Callable[..., None]
CHUNK = 1 << 14  # elements (or comparable work) that are worth a chunk of their own
MOST_CHUNKS = 64
HEADER = ("status", "scratch", "scratch stride")
"""What `args` begins with: addresses, before those of the operands."""
MESSAGES: dict[int, str] = {}
"""By the code that a kernel leaves when it refuses its input."""


def code_of(message: str) -> int:
    """The code of a message, which is known by it from now on."""
    code = zlib.crc32(message.encode()) | 1
    MESSAGES[code] = message
    return code


def lay_out(rooms: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where parts of scratch of so many bytes begin, each at a multiple of 64, and the bytes of all."""
    found, at = {}, 0
    for name, n_bytes in rooms.items():
        found[name] = at
        at += -(-n_bytes // 64) * 64
    return found, at


class Kernel(Function):
    """The function being written by a kernel's `emit`.

    Attributes:
        lanes: f32 lanes of the target's widest register.
        thread, chunk, chunks: i64; which thread runs this, and which part of the work it is.
        first: i1, whether it is the first chunk of this step that this thread runs.
        messages: with which it may refuse its input.
        spread: whether the lanes of a vector are those of as many threads, not of a register.
    """

    spread = False

    def __init__(self, target: Target) -> None:
        super().__init__("kernel", {"args": PTR, "thread": I64, "chunk": I64, "chunks": I64, "first": I1}, target)
        self.args, self.thread, self.chunk, self.chunks, self.first = self.parameters.values()
        self.lanes = target.vector_bytes // 4
        self._next_slot = len(HEADER)
        self.messages: list[str] = []
        self._taken_bytes = 0  # of scratch

    def slot(self) -> Value:
        """The next entry of `args`: an address."""
        self._next_slot += 1
        return self._header(self._next_slot - 1)

    def _header(self, number: int) -> Value:
        return self.load(self.args + 8 * number, PTR, align=8)

    def scratch(self) -> Value:
        """Memory of this thread's own, as many bytes as the kernel's call asks for; it keeps what is in it between chunks of a
        step. Its address is a multiple of 64."""
        stride = self.load(self._header(HEADER.index("scratch stride")), I64)
        return self._header(HEADER.index("scratch")) + (self.thread * stride + self._taken_bytes)

    @contextmanager
    def alone(self, taken_bytes: int) -> Iterator[None]:
        """What is written in the block does all of its work itself, with scratch behind so many bytes."""
        before = self.chunk, self.chunks, self.first
        self.chunk, self.chunks, self.first = self.i64(0), self.i64(1), self.const(1, I1)
        self._taken_bytes = taken_bytes
        try:
            yield
        finally:
            self.chunk, self.chunks, self.first = before
            self._taken_bytes = 0

    def refuse(self, condition: Value, message: str, *values: Int) -> None:
        """Where the condition holds, the run ends with an InputError of this message, `{0}`, `{1}`, `{2}` being the values; what
        this kernel does afterwards must still be harmless."""
        code = code_of(message)
        self.messages.append(message)
        status = self._header(HEADER.index("status"))
        with self.when(condition & self.load(status, I64).eq(0)):  # the first to refuse has its say
            for i, value in reversed([*enumerate((code, *values))]):
                number = self.convert(value, I64) if isinstance(value, Value) else self.i64(value)
                self.store(number, status + 8 * i)

    @contextmanager
    def rows(self, shape: Sequence[Int]) -> Iterator[list[Value]]:
        """For each index over `shape` that belongs to this chunk; the last axis runs fastest. An empty shape is one index."""
        with self.span(self.size(shape)) as loop:
            yield self.unflatten(loop.i, shape)

    @contextmanager
    def span(self, n: Int) -> Iterator[Loop]:
        """For each of this chunk's numbers below n."""
        n = self.i64(n)
        with self.loop(self.chunk * n // self.chunks, (self.chunk + 1) * n // self.chunks) as loop:
            loop.next()
            yield loop

    @staticmethod
    def size(shape: Sequence[Int]) -> Int:
        """The product of extents."""
        total: Int = 1
        for extent in shape:
            total = extent * total if isinstance(total, int) else total * extent
        return total

    def unflatten(self, at: Value, shape: Sequence[Int]) -> list[Value]:
        """The index that a flat number means."""
        index: list[Value] = []
        for n in reversed(shape[1:]):
            index.insert(0, at % n)
            at = at // n
        return [at, *index] if shape else []

    def sweep(
        self, n: Int, body: Callable[[Value, Value | None, list[Value]], Values | None], carried: Values = (), lanes: int = 0
    ) -> list[Value]:
        """`body(i, mask, carried) -> carried` for i = 0, lanes, 2 lanes, ... below n; returns what was carried last.

        `mask` is None where all lanes are below n, and the lanes that are in the last turn where they are not.
        """
        lanes = lanes or self.lanes
        whole = n // lanes * lanes
        values = list(carried)
        if not (isinstance(whole, int) and whole == 0):
            with self.loop(0, whole, lanes, values) as loop:
                loop.next(*(body(loop.i, None, loop.values) or ()))
            values = loop.results
        if isinstance(n, int) and isinstance(whole, int):
            if n > whole:
                values = list(body(self.i64(whole), self.tail_mask(lanes, n - whole), values) or ())
            return values
        assert isinstance(whole, Value)
        left, start, before = n - whole, whole, values

        def tail() -> Values:
            return body(start, self.tail_mask(lanes, left), before) or ()

        return self.either(left.gt(0), tail, lambda: before)


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory of a fused kernel's own between its steps; equal only to itself."""

    size_bytes: Extent
    name: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ref:
    """An operand of a call: a node or a buffer, and the layout in which the kernel reads it; or an extent, which the kernel
    finds as its operand's only one.

    `known`: its extents are written into the code (one kernel for each shape), not read when it runs.
    `index_map`: which elements of the node's base are read, where not those of the node in its own shape.
    """

    of: Node | Buffer | Extent
    layout: str = "dense"
    known: bool = False
    index_map: IndexMap | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One native step: a kernel and what it is applied to.

    Attributes:
        emit: `emit(k, operands, **attrs)` writes the kernel; `operands` has the keys of `operands`.
        attrs: what else the code depends on; hashable.
        items: how much there is to divide; chunks are cut by it alone: one for each `grain`, at most `most_chunks`.
        apart: whether each thread goes through chunks that are neighbours, as reading memory in its order is fastest; else all go
            on together, as what they share is then in the cache.
        scratch_bytes: of each thread.
        guard: steps for which this call is made at all.
        nodes: what it computes, for profiles.
    """

    emit: Emit
    operands: Mapping[str, Ref | None]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    items: Extent = 1
    grain: int = 1
    most_chunks: int = MOST_CHUNKS
    apart: bool = False
    scratch_bytes: int = 0
    guard: Guard = ALWAYS
    nodes: tuple[Node, ...] = ()
    described = True  # that `emit` writes the kernel, whatever it is written in


@dataclass(frozen=True)
class Context:
    """What calls may depend on beside their node."""

    target: Target
    exact: bool  # keep activations in f32
    layout: Callable[[Node], str]  # in which a node is read: "dense" but for constants ("r16") and streams (theirs)
    layouts: Mapping[str, str] = field(default_factory=dict)  # in which streams are held, "rows" where not given
    lowerings: tuple[str, ...] = ()  # forms to take, whatever they cost
    backend: str = "cpu"
    by_row: bool = False  # whether calls are to be descriptions, of one row of a row program


Calls = Callable[[Node, Context], Sequence[Call]]
Reads = Callable[[Node, str], tuple[str, ...]]


def dense_only(node: Node, slot: str) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class NodeKernel:
    """How the CPU computes one node of an op.

    Attributes:
        calls: the calls it takes.
        supports: for which nodes.
        reads: the layouts, beside dense, in which it can read a constant or a stream that stands in a slot.
        by_row: for which nodes of two axes and more row i is made of rows i alone, where `Op.row_inputs` does not say so.
        vectors: slots whose vectors along the last axis, each alone, make those of the result; other slots give one for each row.
        whole: slots of which a row program (`row_programs`) gives all rows for each row.
        measures: for which nodes that read streams calls depend on what was measured of the machine (`measured`).
        plain: whether calls read the node's inputs and need no buffers, so that they are made only when they are wanted.
        forms: that `CompileOptions.lowerings` may name.
        portable: whether calls are descriptions that other backends can follow, without registers and layouts of a processor.
    """

    calls: Calls
    supports: Callable[[Node], bool] = lambda node: True
    reads: Reads = dense_only
    plain: bool = False
    forms: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    by_row: Callable[[Node], bool] = lambda node: False
    measures: Callable[[Node], bool] = lambda node: False
    portable: bool = False


def kernel_of(node: Node, backend: str = "cpu") -> NodeKernel | None:
    """How a backend computes a node of an op: by a kernel of its own, or by one of the CPU's that any can follow."""
    op: Op | None = registry.ops.get(node.op) if node.op not in STRUCTURAL else None
    if op is None:
        return None
    own: NodeKernel | None = op.kernel(backend)
    if own is not None or backend == "cpu":
        return own
    described: NodeKernel | None = op.kernel("cpu")
    return described if described is not None and described.portable else None


def cpu_kernel(
    op: Op,
    *,
    rows: Callable[[Node], Sequence[Extent]] = lambda node: node.shape[:-1],
    work: Callable[[Node], int] | None = None,
    scratch: Callable[[Node], int] = lambda node: 0,
    supports: Callable[[Node], bool] = lambda node: True,
    known: bool = False,
    by_row: Callable[[Node], bool] = lambda node: False,
    vectors: tuple[str, ...] = (),
) -> Callable[[Emit], Emit]:
    """Declares an op's kernel: `emit(k, *inputs, y, **attrs)` with operands as the op's signature orders them (None where
    absent); of an op without a signature `emit(k, slots, y, **attrs)` with a mapping. The attribute `shape` is left out: it is
    y's.

    Args:
        rows: the extents that `emit` divides with `k.rows`.
        work: elements (or comparable work) of one of those rows; those of a row of the result where not given.
        scratch: bytes that each thread needs, at the largest extents.
        supports: which nodes it can compute.
        known: extents and strides are written into the code; else only the stride of the last axis where it is 0 or 1.
        by_row, vectors: as of a `NodeKernel`.
    """

    def declare(emit: Emit) -> Emit:
        def calls(node: Node, context: Context) -> Sequence[Call]:
            slots = dict(zip(node.slots, node.inputs, strict=True))
            refs: dict[str, Ref | None] = {name: Ref(value, known=known) for name, value in slots.items()}
            if op.signature is not None:
                refs = {a.name: refs.get(a.name) for a in op.signature.inputs}
            each = work(node) if work else row_work(node)
            attrs = {name: value for name, value in node.attrs.items() if name != "shape"}
            return [
                Call(
                    _Applied(emit, op.signature is not None),
                    {**refs, "y": Ref(node, known=known)},
                    attrs,
                    items=product(rows(node)),
                    grain=max(1, CHUNK // max(each, 1)),
                    scratch_bytes=scratch(node),
                    nodes=(node,),
                )
            ]

        op.kernels["cpu"] = NodeKernel(calls, supports, plain=True, by_row=by_row, vectors=vectors, portable=True)
        return emit

    return declare


def row_work(node: Node) -> int:
    """Elements of a row of the result."""
    width = node.shape[-1] if node.shape else 1
    return width if isinstance(width, int) else width.max


@dataclass(frozen=True)
class _Applied:
    """An op's `emit` as calls take it."""

    emit: Emit
    by_position: bool

    def __call__(self, k: Kernel, operands: Mapping[str, Operand | None], **attrs: Any) -> None:
        slots = dict(operands)
        y = slots.pop("y")
        if self.by_position:
            self.emit(k, *slots.values(), y, **attrs)
        else:
            self.emit(k, slots, y, **attrs)
