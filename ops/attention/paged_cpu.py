"""Attention over dense streams on the CPU: K in groups of 16 rows, so that scores come out 16 rows at a time; V in rows.

Few tokens: each chunk takes one kv head and a slice of 64 rows for one token, and leaves a partial result (maximum, sum,
weighted values); a second call, or the kernel that uses the result, puts the slices together. Many tokens: each chunk takes a
tile of queries, all heads of one kv head, and goes through the rows once with a running soft-max.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorgraph.backends.cpu.functions import exp, tanh
from tensorgraph.backends.cpu.ir import F32, I32, I64, PTR, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand, read_value, stored_type
from tensorgraph.backends.cpu.state_calls import field
from tensorgraph.backends.cpu.streams import PAGE_ROWS

L = PAGE_ROWS  # lanes: the rows of a page
SLICE = 64  # rows scored at once
UNROLL = 4  # rows of values
LINE = 64  # bytes of a cache line
HEAD = 16  # floats before the values in a partial result: the maximum, the sum
Operands = Mapping[str, Operand | None]


@dataclass(frozen=True)
class Heads:
    """The extents that a paged attention is made for."""

    n_kv: int
    group: int  # query heads of one kv head
    d_k: int
    d_v: int
    scale: float
    softcap: float
    rules: tuple[tuple[int, int | None, bool], ...]  # every, window, causal of each segment

    @property
    def n_heads(self) -> int:
        return self.n_kv * self.group

    @property
    def partial(self) -> int:
        """Floats of one partial result."""
        return HEAD + self.d_v


def slices_of(n_rows: Any) -> Any:
    """How many slices hold the rows that one token sees of a segment, at most."""
    return (n_rows + (SLICE + L - 2)) // SLICE


@dataclass(frozen=True)
class Seen:
    """The rows lo..hi-1 of one sequence in one segment, for one query or for several."""

    lo: Value
    hi: Value


def seen_rows(k: Kernel, table: Value, seq: Value, pos: Value | None, rule: tuple[int, int | None, bool]) -> Seen:
    """What a token at `pos` sees of its sequence."""
    every, window, causal = rule
    lo, hi = field(k, table, seq, "seen_start"), field(k, table, seq, "seen_stop")
    if causal and pos is not None:
        hi = k.min(hi, (pos + 1) // every)
    if window is not None and pos is not None:
        lo = k.max(lo, pos + (1 - window))
    return Seen(lo, hi)


@dataclass(frozen=True)
class Block:
    """Up to 64 rows of one kv head, from row `start` on: where each of their pages begins.

    Attributes:
        keys, values: addresses [SLICE / L], in scratch, so that loops can go over pages.
    """

    k: Kernel
    start: Value
    keys: Value
    values: Value

    def page(self, listed: Value, number: Int) -> Value:
        """Where a page of `keys` or `values` begins."""
        return self.k.load(listed + self.k.i64(number) * 8, PTR)


LISTED_BYTES = 2 * SLICE // L * 8
"""What `find_block` needs of scratch."""


def find_block(
    k: Kernel, h: Heads, keys: Operand, values: Operand, seq: Value, head: Value, start: Value, hi: Value, listed: Value
) -> Block:
    """Pages beyond the last row are read as the last one; what is read there is masked."""
    lists = [listed, listed + SLICE // L * 8]
    for stream, to, width in zip((keys, values), lists, (h.d_k, h.d_v), strict=True):
        assert stream.table is not None
        pages, first = field(k, stream.table, seq, "pages"), field(k, stream.table, seq, "first")
        item = stored_type(stream.dtype).size_bytes
        last = (hi - 1 - first) // L
        inner = width * L * item if stream is keys else width * item
        for page in range(SLICE // L):
            at = k.min((start - first) // L + page, last)
            number = k.load(k.convert_pointer(pages) + at * 8, I64)
            k.store(stream.address + (number * (h.n_kv * width * L * item) + head * inner), to + page * 8)
    return Block(k, start, *lists)


def scores(
    k: Kernel, h: Heads, dtype: Any, pages: Sequence[Value], queries: Sequence[Value], unit: float = 1.0
) -> list[list[Value]]:
    """Logits of each query (addresses of f32 [Dk]) and page of keys (addresses), times `unit`: [query][page], lanes are rows."""
    unroll = 4 if h.d_k % 4 == 0 else 1
    stored = stored_type(dtype)
    zero = k.zero(F32.x(L))
    with k.loop(0, h.d_k, unroll, [zero] * (len(queries) * len(pages))) as loop:
        sums = list(loop.values)
        for u in range(unroll):
            at = loop.i + u
            rows = [read_value(k, k.load(page + at * (L * stored.size_bytes), stored.x(L)), dtype) for page in pages]
            for q, query in enumerate(queries):
                factor = k.splat(k.load(query + at * 4, F32), L)
                for p, row in enumerate(rows):
                    place = q * len(pages) + p
                    sums[place] = k.fma(row, factor, sums[place])
        loop.next(*sums)
    results = []
    for place, total in enumerate(loop.results):
        if h.softcap:
            scaled = tanh(k, total * (h.scale / h.softcap)) * (h.softcap * unit)
        else:
            scaled = total * (h.scale * unit)
        results.append((place // len(pages), scaled))
    return [[s for q, s in results if q == query] for query in range(len(queries))]


def shown(k: Kernel, start: Value, seen: Seen) -> Value:
    """Which rows are seen, of those from `start` on: [L]."""
    lowest = k.convert(seen.lo - start, I32)
    count = k.convert(seen.hi - seen.lo, I32)
    return (k.lane_numbers(L) - k.splat(lowest, L)).below(k.splat(count, L))


def add_values(
    k: Kernel,
    h: Heads,
    dtype: Any,
    block: Block,
    first: Value,
    stop: Value,
    weights: Sequence[Value],
    sums: Sequence[Value],
    at: Int,
) -> list[Value]:
    """sums[w][v] + sum over rows first..stop-1 of the block of weight * value, for value vectors from element `at` on.

    `weights`: for each query the address of its f32 weights [64].
    """
    stored = stored_type(dtype)
    n, row_bytes = len(sums) // len(weights), h.n_kv * h.d_v * stored.size_bytes

    def rows(start: Value, stop: Value, step: int, sums: Sequence[Value]) -> list[Value]:
        """Rows that lie in one page, `step` at a time."""
        with k.loop(start, stop, step, sums) as loop:
            sums = loop.values
            base = block.page(block.values, loop.i // L) + ((loop.i & (L - 1)) * row_bytes + k.i64(at) * stored.size_bytes)
            for i in range(step):
                row = base + i * row_bytes
                loaded = [read_value(k, k.load(row + v * L * stored.size_bytes, stored.x(L)), dtype) for v in range(n)]
                following = []
                for w, weight in enumerate(weights):
                    factor = k.splat(k.load(weight + (loop.i + i) * 4, F32), L)
                    following += [k.fma(factor, value, sums[w * n + v]) for v, value in enumerate(loaded)]
                sums = following
            loop.next(*sums)
        return loop.results

    even = k.min((first + (UNROLL - 1)) & -UNROLL, k.max(stop, first))
    whole = k.max(stop & -UNROLL, even)
    return rows(whole, stop, 1, rows(even, whole, UNROLL, rows(first, even, 1, sums)))


def slice_scratch(h: Heads) -> int:
    """Bytes that a thread needs for a slice: weights of each query head, and where the pages are."""
    return h.group * SLICE * 4 + LISTED_BYTES


def emit_slices(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """Partial results of (token, kv head, slice): `part` [T, Hkv, slices, G, HEAD + Dv]."""
    h, q, part, slices = heads, *(operands[name] for name in ("q", "part", "slices"))
    assert q is not None and part is not None and slices is not None
    n_slices = slices.shape[0]
    with k.rows((q.shape[0], h.n_kv, n_slices)) as (t, head, slice_number):
        seq, pos = token_of(k, operands, t)
        to = part.address + ((t * h.n_kv + head) * n_slices + slice_number) * (h.group * h.partial * 4)
        number = slice_number
        for i, rule in enumerate(h.rules):
            keys, values = operands[f"k{i}"], operands[f"v{i}"]
            assert keys is not None and values is not None and keys.table is not None
            mine = slices_of(keys.shape[0])
            with k.when(number.below(mine)):
                seen = seen_rows(k, keys.table, seq, pos, rule)
                start = seen.lo // L * L + number * SLICE
                with k.when(start.lt(seen.hi)):
                    write_slice(k, h, keys, values, seq, head, start, seen, q.at([t, head * h.group]), to)
                with k.when(start.ge(seen.hi)):
                    for g in range(h.group):
                        k.store(k.const(float("-inf"), F32), to + g * h.partial * 4)
                        k.store(k.const(0.0, F32), to + g * h.partial * 4 + 4)
            number = number - mine


def write_slice(
    k: Kernel,
    h: Heads,
    keys: Operand,
    values: Operand,
    seq: Value,
    head: Value,
    start: Value,
    seen: Seen,
    query: Value,
    to: Value,
) -> None:
    """One partial result for each query head of a kv head."""
    weights = k.scratch()
    block = find_block(k, h, keys, values, seq, head, start, seen.hi, weights + h.group * SLICE * 4)
    prefetch(k, h, keys, values, block)
    pages = range(SLICE // L)
    at_once = len(pages) if k.lanes == L else 1
    together = queries_at_once(k, at_once)
    for g in range(0, h.group, together):
        mine = range(g, min(g + together, h.group))
        found: list[list[Value]] = [[] for _ in mine]
        for p in range(0, len(pages), at_once):
            some = [block.page(block.keys, number) for number in pages[p : p + at_once]]
            new = scores(k, h, keys.dtype, some, [query + m * h.d_k * 4 for m in mine])
            found = [row + more for row, more in zip(found, new, strict=True)]
        for m, row in zip(mine, found, strict=True):
            row = [k.select(shown(k, start + p * L, seen), s, float("-inf")) for p, s in zip(pages, row, strict=True)]
            top = k.fold(tree(k, row, lambda a, b: k.max(a, b)), lambda a, b: k.max(a, b))
            shifted = [exp(k, s - top) for s in row]
            for p, weight in zip(pages, shifted, strict=True):
                k.store(weight, weights + (m * SLICE + p * L) * 4)
            k.store(top, to + m * h.partial * 4)
            k.store(k.sum(tree(k, shifted, lambda a, b: a + b)), to + m * h.partial * 4 + 4)
    first, stop = k.max(seen.lo - start, 0), k.min(seen.hi - start, k.i64(SLICE))
    for begin, end, n in value_blocks(k, h):
        together = queries_at_once(k, n)
        for g in range(0, h.group, together):
            mine = range(g, min(g + together, h.group))
            with k.loop(begin, end, n * L) as columns:
                columns.next()
                sums = [k.zero(F32.x(L))] * (len(mine) * n)
                listed = [weights + m * SLICE * 4 for m in mine]
                sums = add_values(k, h, values.dtype, block, first, stop, listed, sums, columns.i)
                for w, m in enumerate(mine):
                    for v in range(n):
                        k.store(sums[w * n + v], to + (columns.i + (m * h.partial + HEAD + v * L)) * 4)


def prefetch(k: Kernel, h: Heads, keys: Operand, values: Operand, block: Block) -> None:
    """Ask for all lines of a block before the first is used: its rows lie apart, and nothing else foresees them."""
    of_page = h.d_k * L * stored_type(keys.dtype).size_bytes
    row_bytes = h.d_v * stored_type(values.dtype).size_bytes
    for number in range(SLICE // L):
        page = block.page(block.keys, number)
        with k.loop(0, of_page, 4 * LINE) as loop:
            loop.next()
            for line in range(0, min(4 * LINE, of_page), LINE):
                k.prefetch(page + loop.i + line)
    for number in range(SLICE // L):
        page = block.page(block.values, number)
        with k.loop(0, L) as loop:
            loop.next()
            for line in range(0, row_bytes, LINE):
                k.prefetch(page + loop.i * (h.n_kv * row_bytes) + line)


def queries_at_once(k: Kernel, vectors: int) -> int:
    """How many queries' sums, of so many vectors of L lanes each, registers hold beside what is added to them."""
    if k.lanes == L:
        return max(1, 24 // vectors)
    registers = L // k.lanes  # of one vector
    return max(1, (15 - registers * vectors) // (registers * vectors))


def value_blocks(k: Kernel, h: Heads) -> list[tuple[int, int, int]]:
    """Elements of a value from where to where, and so many vectors of them at once."""
    n = min(h.d_v // L, 8) if k.lanes == L else 1
    whole = h.d_v // (n * L) * (n * L)
    return [(0, whole, n), *([(whole, h.d_v, (h.d_v - whole) // L)] if whole < h.d_v else ())]


def combine(k: Kernel, h: Heads, part: Value, n_slices: Int, sink: Value | None, to: Value) -> None:
    """Put the partial results of one token's head together: f32 [Dv] at `to`. `part`: the address of the first one."""
    stride = h.group * h.partial * 4
    begin = sink if sink is not None else k.const(float("-inf"), F32)
    with k.loop(0, k.i64(n_slices), 1, [begin]) as tops:
        tops.next(k.max(tops.values[0], k.load(part + tops.i * stride, F32)))
    top = tops.results[0]
    shift = k.select(top.eq(float("-inf")), k.const(0.0, F32), top)
    n = h.d_v // L
    total = k.const(0.0, F32) if sink is None else exp(k, k.splat(sink - shift, L))[0]
    for v in range(n):
        k.store(k.zero(F32.x(L)), to + v * L * 4)
    with k.loop(0, k.i64(n_slices), 1, [total]) as loop:
        one = part + loop.i * stride
        size = k.load(one + 4, F32)

        def add() -> list[Value]:
            weight = exp(k, k.splat(k.load(one, F32) - shift, L))
            for v in range(n):
                place = to + v * L * 4
                k.store(k.fma(weight, k.load(one + (HEAD + v * L) * 4, F32.x(L)), k.load(place, F32.x(L))), place)
            return [k.fma(weight[0], size, loop.values[0])]

        loop.next(*k.either(size.gt(0.0), add, lambda: [loop.values[0]]))
    whole = k.splat(k.select(loop.results[0].eq(0.0), k.const(1.0, F32), loop.results[0]), L)
    for v in range(n):
        k.store(k.load(to + v * L * 4, F32.x(L)) / whole, to + v * L * 4)


def emit_combine(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """y [T, H, Dv] from the partial results."""
    h, y, part, slices, sinks = heads, *(operands[name] for name in ("y", "part", "slices", "sinks"))
    assert y is not None and part is not None and slices is not None
    with k.rows((y.shape[0], h.n_kv, h.group)) as (t, head, g):
        n = slices.shape[0]
        one = part.address + (((t * h.n_kv + head) * n) * h.group + g) * (h.partial * 4)
        sink = sinks.load([head * h.group + g]) if sinks is not None else None
        combine(k, h, one, n, sink, y.at([t, head * h.group + g]))


def token_of(k: Kernel, operands: Operands, t: Value) -> tuple[Value, Value | None]:
    """A token's sequence in the batch, and its position where there is one."""
    seq, pos = operands["seq"], operands["pos"]
    return (
        k.convert(seq.load([t]), I64) if seq is not None else k.i64(0),
        k.convert(pos.load([t]), I64) if pos is not None else None,
    )


def tree(k: Kernel, values: Sequence[Value], combine: Any) -> Value:
    listed = list(values)
    while len(listed) > 1:
        listed = [combine(*listed[i : i + 2]) if i + 1 < len(listed) else listed[i] for i in range(0, len(listed), 2)]
    return listed[0]
