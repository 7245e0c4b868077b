"""Lists of rows of streams on the CPU: each token's ids as rows of its own sequence that it sees, each once, in order."""

from __future__ import annotations

from collections.abc import Mapping

from tensorgraph.backends.cpu.ir import I1, I32, I64, Value
from tensorgraph.backends.cpu.kernel import Buffer, Call, Kernel, Ref
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dims import maximum
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.attend_rows_cpu import Query, Segment, list_ids, span

WORD = 64


def list_stride(node: Node, number: int) -> int:
    """The numbers that a token's list has room for; 0 where the segment has no ids."""
    ids = node.at(f"ids{number}")
    return 0 if ids is None else 1 + maximum(ids.shape[1])


def listing_call(node: Node, number: int) -> Call:
    """Writes `listed` i32 [T, stride] of a segment: how many rows a token sees, and which, counted within its sequence."""
    ids, keys, stride = node.at(f"ids{number}"), node.at(f"k{number}"), list_stride(node, number)
    assert ids is not None and keys is not None
    attrs = {"rule": node.attrs["segments"][number], "by_pos": node.at(f"pos{number}") is not None}
    refs: dict[str, Ref | None] = {name: None if (x := node.at(name)) is None else Ref(x) for name in ("pos", "seq")}
    listed = Ref(Buffer((maximum(ids.shape[0]) * stride + 1) * 4, f"listed{number}"))  # one behind an empty list is read
    return Call(
        emit_lists,
        {**refs, "ids": Ref(ids), "keys": Ref(keys, "rows"), "listed": listed},
        {"number": number, "stride": stride, **attrs},
        items=ids.shape[0],
        scratch_bytes=stride * 8 + (-(-maximum(keys.shape[0]) // 512) + 2) * 64,
        nodes=(node,),
    )


def emit_lists(k: Kernel, operands: Mapping[str, Operand | None], *, number: int, stride: int, rule: Rule, by_pos: bool) -> None:
    ids, keys, listed, pos, seq = (operands[name] for name in ("ids", "keys", "listed", "pos", "seq"))
    assert ids is not None and keys is not None and listed is not None and seq is not None
    scratch = k.scratch()
    bits = scratch + stride * 8
    segment = Segment(number, rule, by_pos, keys, keys, None, None, ids, None)
    with k.rows(ids.shape[:1]) as (token,):
        own = None if pos is None else k.convert(pos.load([token]), I64)
        zero, one = k.i64(0), k.i64(1)
        query = Query(token, zero, zero, 1, one, 0, own, k.convert(seq.load([token]), I64))
        rows = span(k, segment, query)
        assert rows.shift is not None
        n = list_ids(k, segment, token, rows, scratch, bits)
        to = listed.address + token * (stride * 4)
        k.store(k.narrow(n, I32), to)
        write_rows(k, bits, rows.lo - rows.shift, rows.hi - rows.lo, to + 4)


def write_rows(k: Kernel, bits: Value, first: Value, n: Value, to: Value) -> Value:
    """Of n bits, which stand for rows from `first` on, the numbers of those that are set, as i32; returns how many they are."""
    with k.loop(0, (n + (WORD - 1)) // WORD, 1, [k.i64(0)]) as words:
        word, before = k.load(bits + words.i * 8, I64), words.values[0]
        count = k.unary("ctpop", word)
        with k.loop(0, count, 1, [word]) as each:
            left = each.values[0]
            row = first + words.i * WORD + k.call("llvm.cttz.i64", I64, left, k.const(0, I1))
            k.store(k.narrow(row, I32), to + (before + each.i) * 4)
            each.next(left & (left - 1))
        words.next(before + count)
    return words.results[0]
