"""Which rows of a segment a query sees, on the CPU: their addresses, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import F32, I1, I8, I32, I64, Int, Type, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.state_calls import field, n_sequences, row_address
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.attend_tile_cpu import TILE


@dataclass(frozen=True)
class Query:
    """Some heads, all of one kv head, of a token or of several tokens in a row: `n_heads` of each, `count` in all.

    Attributes:
        lanes: 0 for one token, else the most tokens that there can be.
        pos, seq: of the token, or vectors of `lanes`, the last token repeated; None where there are none. i64, as all else.
    """

    token: Value
    kv_head: Value
    first_head: Value
    n_heads: Int
    count: Value
    lanes: int
    pos: Value | None
    seq: Value | None

    def head(self, k: Kernel, number: Value) -> tuple[Value, Value]:
        """The token and the head of a number; those that are too large mean the last."""
        n = k.min(number, self.count - 1)
        if not self.lanes:
            return self.token, self.first_head + n
        return self.token + n // self.n_heads, self.first_head + n % self.n_heads


@dataclass(frozen=True)
class Segment:
    """The operands of a segment; `values` may be `keys`. `by_pos`: whether its rows have positions, read or not."""

    number: int
    rule: Rule
    by_pos: bool
    keys: Operand
    values: Operand
    pos: Operand | None
    seq: Operand | None
    ids: Operand | None
    mask: Operand | None

    @property
    def table(self) -> Value | None:
        """Of the class whose rows are read where they lie."""
        return self.keys.table if self.keys.table is not None else self.values.table


@dataclass(frozen=True)
class Span:
    """Rows lo..hi-1 of the segment (numbers over all sequences), outside which a query sees nothing.

    Attributes:
        own: the query's sequence in the batch, where rows are read in place.
        shift: what a row's number is more than its number within that sequence.
    """

    lo: Value
    hi: Value
    own: Value | None = None
    shift: Value | None = None

    def address(self, k: Kernel, rows: Operand, row: Value, head: Value) -> Value:
        """Where a row of a kv head begins."""
        if rows.table is None:
            return rows.at([row, head])
        assert self.own is not None and self.shift is not None
        at, stride = row_address(k, rows, self.own, row - self.shift)
        width = rows.shape[2]
        assert isinstance(width, int)
        return at + head * (rows.dtype.size_bytes(width) * k.i64(stride))


def element_stride(rows: Operand) -> Int:
    """Elements between those of one row."""
    return {"rows": 1, "rows16": 16}.get(rows.layout) or rows.strides[2]


def span(k: Kernel, segment: Segment, query: Query) -> Span:
    """All rows of a dense segment; of a stream exactly those that the query sees."""
    if segment.table is None:
        return Span(k.i64(0), k.i64(segment.keys.shape[0]))
    table, (every, window, causal) = segment.table, segment.rule
    assert query.seq is not None
    known = query.seq.below(n_sequences(k, table))
    own = k.select(known, query.seq, k.i64(0))
    start, stop = (field(k, table, own, f"seen_{name}") for name in ("start", "stop"))
    shift = field(k, table, own, "seen_at") - start
    lo, hi = start, stop
    if query.pos is not None and segment.by_pos:
        if causal:
            hi = k.min(hi, k.max(query.pos + 1, 0) // every)
        if window is not None:
            lo = k.max(lo, query.pos + (1 - window))
    hi = k.select(known, k.max(hi, lo), lo)
    return Span(lo + shift, hi + shift, own, shift)


def _sees(k: Kernel, segment: Segment, query: Query, row: Value) -> Value | None:
    """Whether a row within the query's span is one that it sees (of several tokens: each), by position and sequence; None
    where that is certain."""
    every, window, causal = segment.rule
    found: list[Value] = []
    if segment.table is not None:
        return None
    if segment.seq is not None and query.seq is not None:
        found.append(k.convert(segment.seq.load([row]), I64).eq(query.seq))
    if segment.pos is not None and query.pos is not None and (causal or window is not None):
        pos = k.convert(segment.pos.load([row]), I64)
        if causal:
            found.append(((pos + 1) * every - 1).le(query.pos))
        if window is not None:
            found.append(pos.gt(query.pos - window))
    return _all(found)


def _all(found: list[Value]) -> Value | None:
    together = None
    for one in found:
        together = one if together is None else together & one
    return together


@dataclass(frozen=True)
class Lists:
    """Scratch for the rows of a tile.

    Attributes:
        keys, values: addresses of rows, i64 [TILE + 8].
        added: what the mask adds, f32 [1 or heads, TILE].
        seen: of each row, i8 [TILE], a bit for each token that sees it, where there are several.
        ids: i64, of a token's rows each once. bits: one for each row of a segment.
    """

    keys: Value
    values: Value
    added: Value
    seen: Value
    ids: Value
    bits: Value


def list_tile(
    k: Kernel,
    segment: Segment,
    query: Query,
    rows: Span,
    lists: Lists,
    row_of: Callable[[Value], Value],
    start: Value,
    stop: Value,
) -> tuple[Value, bool]:
    """List those of the candidates start..stop-1 that some token of the query sees; `row_of` gives a candidate's row.

    Returns how many there are, and whether `lists.seen` says which token sees which of them; else all see all, but for the mask.
    """
    by_token = False
    with k.loop(start, stop, 1, [k.i64(0)]) as loop:
        (n,) = loop.values
        row = row_of(loop.i)
        k.store(as_number(k, rows.address(k, segment.keys, row, query.kv_head)), lists.keys + n * 8)
        if segment.values is not segment.keys:
            k.store(as_number(k, rows.address(k, segment.values, row, query.kv_head)), lists.values + n * 8)
        seen = _sees(k, segment, query, row)
        if seen is not None and seen.lanes:
            bits = k.convert(seen.bits_as(Type("i", seen.lanes)), I8, signed=False)
            k.store(bits, lists.seen + n)
            seen, by_token = bits.ne(0), True
        if segment.mask is not None:
            shown = _list_mask(k, segment.mask, query, row, lists.added + n * 4)
            seen = shown if seen is None else seen & shown
        loop.next(n + 1 if seen is None else n + k.convert(seen, I64, signed=False))
    return loop.results[0], by_token


def as_number(k: Kernel, address: Value) -> Value:
    """An address as an i64."""
    return k.number_of(address)


def one_for_all(mask: Operand, query: Query) -> bool:
    """Whether a mask adds the same for all heads of a query."""
    return mask.ndim == 2 and not query.lanes


def _list_mask(k: Kernel, mask: Operand, query: Query, row: Value, to: Value) -> Value:
    """Write what the mask adds for a row, and say whether any head sees it."""
    if one_for_all(mask, query):
        value = k.convert(mask.load([query.token, row]), F32)
        k.store(value, to)
        return value.gt(-math.inf)
    with k.loop(0, query.count, 1, [k.const(0, I1)]) as heads:
        token, head = query.head(k, heads.i)
        value = k.convert(mask.load([token, row] if mask.ndim == 2 else [head, token, row]), F32)
        k.store(value, to + heads.i * (TILE * 4))
        heads.next(heads.values[0] | value.gt(-math.inf))
    return heads.results[0]


def list_ids(k: Kernel, segment: Segment, token: Value, rows: Span, to: Value, bits: Value) -> Value:
    """List the rows of a token's ids that lie within a span, each once: as i64 at `to`, and as bits counted from its first row.

    Returns how many there are. Refuses ids out of range.
    """
    ids = segment.ids
    assert ids is not None
    n_rows, extent = k.i64(segment.keys.shape[0]), rows.hi - rows.lo
    with k.loop(0, (extent + 31) // 32, 16) as words:
        words.next()
        k.store(k.zero(I32.x(16)), bits + words.i * 4)
    with k.loop(0, ids.shape[1], 1, [k.i64(0), k.const(0, I1)]) as loop:
        n, bad = loop.values
        row = k.convert(ids.load([token, loop.i]), I64)
        inside = (row - rows.lo).below(extent)
        bit_number = k.select(inside, row - rows.lo, k.i64(0))
        at = bits + (bit_number // 32) * 4
        word = k.load(at, I32)
        bit = k.const(1, I32) << k.convert(bit_number & 31, I32)
        fresh = inside & (word & bit).eq(0)
        k.store(k.select(inside, word | bit, word), at)
        k.store(row, to + n * 8)
        loop.next(n + k.convert(fresh, I64, signed=False), bad | row.lt(-1) | row.ge(n_rows))
    n, bad = loop.results
    with k.when(bad):
        _refuse_ids(k, ids, n_rows, segment.number, bad)
    return n


def _refuse_ids(k: Kernel, ids: Operand, n_rows: Value, number: int, bad: Value) -> None:
    ends = [k.i64((1 << 63) - 1), k.i64(-(1 << 63))]
    with k.loop(0, ids.shape[0], 1, ends) as tokens:
        with k.loop(0, ids.shape[1], 1, tokens.values) as each:
            row = k.convert(ids.load([tokens.i, each.i]), I64)
            each.next(k.min(each.values[0], row), k.max(each.values[1], row))
        tokens.next(*each.results)
    message = f"[flash_attn] ids{number} must be below {{2}}, or -1 for none; got {{0}} to {{1}}"
    k.refuse(bad, message, *tokens.results, n_rows)
