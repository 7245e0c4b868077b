"""Kernels of state: rows written to a stream's pages, and read from them into one dense array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, I64, Int, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, Ref
from tensorgraph.backends.cpu.operands import Operand, PanelRow, Row, stored_type
from tensorgraph.backends.cpu.streams import FIELDS, PAGE_ROWS, PANEL, coded
from tensorgraph.dims import product
from tensorgraph.dtypes import DType, u8
from tensorgraph.graph import Node

Slots = Mapping[str, Operand]


def state_calls(node: Node, context: Context) -> Sequence[Call]:
    """An append's rows are written first; then all rows are read where somebody needs them in one piece."""
    calls = []
    if node.op == "append":
        rows, stream = node.inputs[0], Ref(node, context.layouts.get(node.attrs["stream"], "rows"))
        calls.append(Call(write_rows, {"x": Ref(rows), "stream": stream}, {}, rows.shape[0], _grain(node), nodes=(node,)))
    if context.layout(node) == "dense":
        calls.append(read_call(node, node, context))
    return calls


def read_call(node: Node, y: Node, context: Context) -> Call:
    """All rows of a stream in one piece, rounded to the type of y."""
    stream = Ref(node, context.layouts.get(node.attrs["stream"], "rows"))
    return Call(read_rows, {"stream": stream, "y": Ref(y)}, {}, node.shape[0], _grain(node), nodes=(y,))


def _grain(node: Node) -> int:
    width = product(node.shape[1:])
    assert isinstance(width, int)
    return max(1, CHUNK // max(width, 1))


def write_rows(k: Kernel, operands: Slots) -> None:
    """Row n of x to the place of the n-th new row of the batch."""
    x = operands["x"]
    with k.rows(x.shape[:1]) as (n,):
        write_row(k, x, n, operands["stream"], n)


def write_row(k: Kernel, x: Operand, row: Int, stream: Operand, n: Value) -> None:
    """A row of x to the place of the n-th new row of the batch."""
    outer_shape, inner = x.shape[1:-1], k.i64(x.shape[-1] if x.ndim > 1 else 1)
    to = stream_row(k, stream, n, "new")
    with k.loop(0, k.i64(k.size(outer_shape))) as outer:
        outer.next()
        line = x.row([row, *k.unflatten(outer.i, outer_shape)]) if x.ndim > 1 else Row(k, x.dtype, x.at([row]), 1)
        if stream.dtype.is_block:
            write_blocks(k, stream.dtype, line, inner, to, outer.i * inner)
        else:
            copy_row(k, line, replace(to, address=to.at(outer.i * inner)), inner)


def read_rows(k: Kernel, operands: Slots) -> None:
    """The s-th seen row of the batch to row s of y."""
    y, stream = operands["y"], operands["stream"]
    width = k.size(stream.shape[1:])
    with k.rows(y.shape[:1]) as index:
        row = stream_row(k, stream, index[0], "seen")
        to = Row(k, y.dtype, y.address + index[0] * width * stored_type(y.dtype).size_bytes, 1)
        if stream.dtype.is_block:
            with k.loop(0, k.i64(width), stream.dtype.block_size) as loop:
                loop.next()
                to.store(loop.i, read_block(k, stream.dtype, row, loop.i))
        else:
            copy_row(k, row, to, width)


def write_blocks(k: Kernel, dtype: DType, row: Row, width: Int, to: Row, first: Value) -> None:
    """A row's elements, rounded, to a row of blocks from element `first` on; `to` has its bytes."""
    with k.loop(0, k.i64(width), dtype.block_size) as loop:
        loop.next()
        scale, codes = coded(dtype).encode(k, k.convert(row.load(loop.i, dtype.block_size), F32))
        at = (first + loop.i) // dtype.block_size * dtype.block_bytes
        to.store(at, scale.bits_as(I8.x(2)))
        to.store(at + 2, codes)


def read_block(k: Kernel, dtype: DType, row: Row, first: Value) -> Value:
    """The elements of a block, of which `first` is the first, in f32; `row` has bytes."""
    at = first // dtype.block_size * dtype.block_bytes
    scale = k.half_to_f32(row.raw(at, 2).bits_as(I16))
    codes = k.convert(k.convert(row.raw(at + 2, dtype.block_size), I32), F32)
    return codes * k.splat(scale, dtype.block_size)


def widen_blocks(k: Kernel, dtype: DType, address: Value, to: Value, width: Int) -> None:
    """A row of blocks that lie one behind the other, in f32."""
    with k.loop(0, k.i64(width), dtype.block_size) as loop:
        loop.next()
        k.store(read_block(k, dtype, Row(k, u8, address, 1), loop.i), to + loop.i * 4)


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


def page_of(k: Kernel, stream: Operand, seq: Int, row: Value) -> tuple[Value, Value]:
    """Where the page begins that a row of a sequence of the batch lies on, and which of its rows it is."""
    assert stream.table is not None
    pages, first = field(k, stream.table, seq, "pages"), field(k, stream.table, seq, "first")
    place, width = row - first, k.size(stream.shape[1:])
    assert isinstance(width, int)
    page = k.load(k.convert_pointer(pages) + (place // PAGE_ROWS) * 8, I64)
    return stream.address + page * (stream.dtype.size_bytes(width) * PAGE_ROWS), place % PAGE_ROWS


def row_address(k: Kernel, stream: Operand, seq: Int, row: Value) -> tuple[Value, Int]:
    """Where row `row` of a sequence of the batch begins, and how many elements (of a block type: bytes) apart its elements lie;
    of layouts "rows" and "rows16"."""
    page, place = page_of(k, stream, seq, row)
    item, width = 1 if stream.dtype.is_block else stream.dtype.block_bytes, k.size(stream.shape[1:])
    assert isinstance(width, int) and stream.layout != "panels"
    if stream.layout == "rows16":
        return page + place * item, PAGE_ROWS
    return page + place * stream.dtype.size_bytes(width), 1


def stream_row(k: Kernel, stream: Operand, n: Value, kind: str) -> Row:
    """The n-th new or seen row of the batch (`kind` is "new" or "seen"); of a block type its bytes."""
    assert stream.table is not None
    table, dtype = stream.table, stream.dtype
    seq = sequence_of(k, table, n, kind)
    row = n - field(k, table, seq, f"{kind}_at") + field(k, table, seq, f"{kind}_start")
    held, unit = (u8, dtype.block_bytes) if dtype.is_block else (dtype, PANEL)
    if stream.layout == "panels":
        page, place = page_of(k, stream, seq, row)
        return PanelRow(k, held, page + place * (unit * held.block_bytes), PAGE_ROWS * unit, unit)
    return Row(k, held, *row_address(k, stream, seq, row))


def sequence_of(k: Kernel, table: Value, n: Value, kind: str) -> Value:
    """The sequence of the batch that has the n-th new or seen row: the last that begins at or before n and is not empty."""
    with k.loop(0, n_sequences(k, table), 1, [k.i64(0)]) as loop:
        begins = field(k, table, loop.i, f"{kind}_at")
        some = field(k, table, loop.i, f"{kind}_stop").gt(field(k, table, loop.i, f"{kind}_start"))
        loop.next(k.select(begins.le(n) & some, loop.i, loop.values[0]))
    return loop.results[0]
