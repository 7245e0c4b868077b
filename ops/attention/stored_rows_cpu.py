"""How attention reads rows where a stream holds them: 16 rows of one element (layout "rows16"), or 16 elements of one row
("panels"), in f32. Of a coded type (`streams.Coded`) these are its blocks' bytes, each with a scale of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, I64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand, read_value, stored_type
from tensorgraph.backends.cpu.state_calls import field
from tensorgraph.backends.cpu.streams import PAGE_ROWS
from tensorgraph.dtypes import DType

L = PAGE_ROWS  # lanes: the rows of a page, and the elements of a panel
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Finder:
    """Finds one sequence's pages of a stream.

    Attributes:
        numbers: where the numbers of its pages stand; `first`, `last`: the pages, counted from row 0, that they are of.
        head_bytes: from what is one kv head's of a page to what is the next one's.
    """

    k: Kernel
    numbers: Value
    first: Value
    last: Value
    base: Value
    page_bytes: int
    head_bytes: int

    @staticmethod
    def of(k: Kernel, stream: Operand, n_kv: int, width: int, seq: Value, stop: Value) -> Finder:
        """Of rows below `stop`."""
        assert stream.table is not None
        numbers = k.convert_pointer(field(k, stream.table, seq, "pages"))
        row_bytes = stream.dtype.size_bytes(width)
        head_bytes = row_bytes if stream.layout == "rows" else row_bytes * L
        first = field(k, stream.table, seq, "first") // L
        return Finder(k, numbers, first, (stop - 1) // L, stream.address, n_kv * row_bytes * L, head_bytes)

    def page(self, number: Value, head: Value) -> Value:
        """Where a kv head's part of a page begins; of those behind the last, the last one's."""
        k = self.k
        at = k.load(self.numbers + (k.min(number, self.last) - self.first) * 8, I64)
        return self.base + (at * self.page_bytes + head * self.head_bytes)


def key_element(k: Kernel, dtype: DType, page: Value, i: Value) -> Value:
    """Element i of a page's 16 rows; of a coded type without its scale."""
    if dtype.is_block:
        byte = i + i // dtype.block_size * 2 + 2
        return k.convert(k.convert(k.load(page + byte * L, I8.x(L)), I32), F32)
    stored = stored_type(dtype)
    return read_value(k, k.load(page + i * (L * stored.size_bytes), stored.x(L)), dtype)


def key_scales(k: Kernel, dtype: DType, page: Value, i: Value) -> Value:
    """Of a coded type, the scales of the block that element i of each of 16 rows is in."""
    low = page + i // dtype.block_size * (dtype.block_bytes * L)
    both = k.load(low, I8.x(2 * L)).shuffle([i // 2 + i % 2 * L for i in range(2 * L)])
    return k.half_to_f32(both.bits_as(I16.x(L)))


def value_elements(k: Kernel, dtype: DType, page: Value, row: Int, column: Value) -> Value:
    """16 elements of one row of a page, from `column` on, a multiple of 16."""
    if not dtype.is_block:
        stored = stored_type(dtype)
        return read_value(k, k.load(page + (column + k.i64(row)) * (L * stored.size_bytes), stored.x(L)), dtype)
    at = page + (column // dtype.block_size * L + row) * dtype.block_bytes
    codes = k.load(at + (column % dtype.block_size + 2), I8.x(L))
    return k.convert(k.convert(codes, I32), F32) * k.splat(k.half_to_f32(k.load(at, I16)), L)


def queries_at_once(k: Kernel, vectors: int) -> int:
    """How many queries' sums, of so many vectors of 16 lanes each, registers hold beside what is added to them."""
    if k.lanes == L:
        return max(1, 24 // vectors)
    registers = L // k.lanes  # of one vector
    held = 31 if "neon" in k.target.has else 15
    return max(1, (held - registers * vectors) // (registers * vectors))


def tree(values: Sequence[Value], combine: Callable[[Value, Value], Value]) -> Value:
    listed = list(values)
    while len(listed) > 1:
        listed = [combine(*listed[i : i + 2]) if i + 1 < len(listed) else listed[i] for i in range(0, len(listed), 2)]
    return listed[0]


Meanwhile = Callable[[Value, int], None]
"""`(i, u)`: called where element i + u is next."""


def copy_keys(k: Kernel, dtype: DType, width: int, page: Value, to: Value, meanwhile: Meanwhile = lambda i, u: None) -> None:
    """A page's keys as f32 [width, L]."""
    block = dtype.block_size if dtype.is_block else width
    step = next(n for n in (4, 2, 1) if block % n == 0)
    with k.loop(0, width, block) as blocks:
        blocks.next()
        scales = key_scales(k, dtype, page, blocks.i) if dtype.is_block else None
        with k.loop(blocks.i, blocks.i + block, step) as loop:
            loop.next()
            for u in range(step):
                meanwhile(loop.i, u)
                value = key_element(k, dtype, page, loop.i + u)
                k.store(value if scales is None else value * scales, to + (loop.i + u) * (L * 4))


def dot(
    k: Kernel,
    dtype: DType,
    width: int,
    page: Value,
    queries: Sequence[Value],
    meanwhile: Meanwhile = lambda i, u: None,
) -> list[Value]:
    """Products of a page's rows with queries (addresses of f32 [width]): for each query, lanes are rows."""
    step = next(n for n in (4, 2, 1) if width % n == 0)
    zero = [k.zero(F32.x(L))] * len(queries)

    def some(start: Value | int, stop: Value | int, sums: Sequence[Value]) -> list[Value]:
        with k.loop(start, stop, step, sums) as loop:
            sums = loop.values
            for u in range(step):
                meanwhile(loop.i, u)
                row = key_element(k, dtype, page, loop.i + u)
                # one by one: in this order no more than one of them takes registers
                factors = (k.splat(k.load(query + (loop.i + u) * 4, F32), L) for query in queries)
                sums = [k.fma(row, factor, total) for factor, total in zip(factors, sums, strict=True)]
            loop.next(*sums)
        return loop.results

    if not dtype.is_block:
        return some(0, width, zero)
    with k.loop(0, width, dtype.block_size, zero) as blocks:
        found = some(blocks.i, blocks.i + dtype.block_size, zero)
        scales = key_scales(k, dtype, page, blocks.i)
        blocks.next(*(k.fma(x, scales, total) for x, total in zip(found, blocks.values, strict=True)))
    return blocks.results
