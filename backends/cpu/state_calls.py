"""Kernels of state: rows written to a stream's pages, and read from them into one dense array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorgraph.backends.cpu.ir import I64, Int, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, Ref
from tensorgraph.backends.cpu.operands import Operand, Row, stored_type
from tensorgraph.backends.cpu.streams import FIELDS, PAGE_ROWS
from tensorgraph.dims import product
from tensorgraph.graph import Node

Slots = Mapping[str, Operand]


def state_calls(node: Node, context: Context) -> Sequence[Call]:
    """An append's rows are written first; then all rows are read where somebody needs them in one piece."""
    calls = []
    if node.op == "append":
        rows, stream = node.inputs[0], Ref(node, context.layouts.get(node.attrs["stream"], "rows"))
        calls.append(Call(write_rows, {"x": Ref(rows), "stream": stream}, {}, rows.shape[0], _grain(node), nodes=(node,)))
    if context.layout(node) == "dense":
        calls.append(read_call(node, context))
    return calls


def read_call(node: Node, context: Context) -> Call:
    """All rows of a stream in one piece."""
    stream = Ref(node, context.layouts.get(node.attrs["stream"], "rows"))
    return Call(read_rows, {"stream": stream, "y": Ref(node)}, {}, node.shape[0], _grain(node), nodes=(node,))


def _grain(node: Node) -> int:
    width = product(node.shape[1:])
    assert isinstance(width, int)
    return max(1, CHUNK // max(width, 1))


def write_rows(k: Kernel, operands: Slots) -> None:
    """Row n of x to the place of the n-th new row of the batch."""
    x, stream = operands["x"], operands["stream"]
    width = k.size(stream.shape[1:])
    with k.rows(x.shape[:1]) as index:
        at, stride = element_place(k, stream, index[0], "new")
        to = Row(k, stream.dtype, at, stride)
        if x.ndim == 2:
            copy_row(k, x.row(index), to, width)
            continue_with: list[Int] = []
        else:
            continue_with = list(x.shape[1:])
        if continue_with:
            inner = k.i64(continue_with[-1])
            with k.loop(0, k.i64(k.size(continue_with[:-1]))) as outer:
                outer.next()
                part = Row(k, stream.dtype, at + outer.i * inner * stride * stored_type(stream.dtype).size_bytes, stride)
                copy_row(k, x.row([*index, *k.unflatten(outer.i, continue_with[:-1])]), part, inner)


def read_rows(k: Kernel, operands: Slots) -> None:
    """The s-th seen row of the batch to row s of y."""
    y, stream = operands["y"], operands["stream"]
    width = k.size(stream.shape[1:])
    item = stored_type(y.dtype).size_bytes
    with k.rows(y.shape[:1]) as index:
        at, stride = element_place(k, stream, index[0], "seen")
        copy_row(k, Row(k, stream.dtype, at, stride), Row(k, y.dtype, y.address + index[0] * width * item, 1), width)


def copy_row(k: Kernel, source: Row, to: Row, width: Int) -> None:
    """Element by element, rounded to the destination's type."""

    def body(i: Value, mask: Value | None, _: list[Value]) -> None:
        to.store(i, source.load(i, k.lanes, mask), mask)

    k.sweep(width, body)


def field(k: Kernel, table: Value, seq: Int, name: str) -> Value:
    """A field of a sequence in a class's table."""
    return k.load(table + (k.i64(seq) * 8 + (8 + FIELDS.index(name))) * 8, I64)


def n_sequences(k: Kernel, table: Value) -> Value:
    return k.load(table, I64)


def row_address(k: Kernel, stream: Operand, seq: Int, row: Value) -> tuple[Value, Int]:
    """Where row `row` of a sequence of the batch begins, and how many elements apart its elements lie."""
    assert stream.table is not None
    pages, first = field(k, stream.table, seq, "pages"), field(k, stream.table, seq, "first")
    place = row - first
    page = k.load(k.convert_pointer(pages) + (place // PAGE_ROWS) * 8, I64)
    item = stored_type(stream.dtype).size_bytes
    width = k.size(stream.shape[1:])
    base = stream.address + page * width * (PAGE_ROWS * item)
    if stream.layout == "rows16":
        return base + (place % PAGE_ROWS) * item, PAGE_ROWS
    return base + (place % PAGE_ROWS) * width * item, 1


def element_place(k: Kernel, stream: Operand, n: Value, kind: str) -> tuple[Value, Int]:
    """The address and the element stride of the n-th new or seen row of the batch (`kind` is "new" or "seen")."""
    assert stream.table is not None
    table = stream.table
    seq = sequence_of(k, table, n, kind)
    row = n - field(k, table, seq, f"{kind}_at") + field(k, table, seq, f"{kind}_start")
    return row_address(k, stream, seq, row)


def sequence_of(k: Kernel, table: Value, n: Value, kind: str) -> Value:
    """The sequence of the batch that has the n-th new or seen row: the last that begins at or before n and is not empty."""
    with k.loop(0, n_sequences(k, table), 1, [k.i64(0)]) as loop:
        begins = field(k, table, loop.i, f"{kind}_at")
        some = field(k, table, loop.i, f"{kind}_stop").gt(field(k, table, loop.i, f"{kind}_start"))
        loop.next(k.select(begins.le(n) & some, loop.i, loop.values[0]))
    return loop.results[0]
