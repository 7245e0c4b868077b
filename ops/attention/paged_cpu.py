"""Attention over streams on the CPU, by pages: K with 16 rows side by side, so that scores come out 16 rows at a time; V in
panels of 16 rows and 16 elements, so that a head's values lie in the order in which they are needed.

Few tokens: rows are divided into slices, each of which leaves a partial result: maximum, sum, weighed values. A second call, or
the kernel that uses the result, puts them together. Many tokens: tiles of queries go through the rows. Logits are in units of
log(2), so that weights are powers of 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tensorgraph.backends.cpu.functions import exp2_nonpositive, tanh
from tensorgraph.backends.cpu.ir import F32, I64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.state_calls import field
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.stored_rows_cpu import L

HEAD = 16  # floats before the values in a partial result: the maximum, the sum
LOG2_E = math.log2(math.e)
Operands = Mapping[str, Operand | None]


@dataclass(frozen=True)
class Heads:
    """The extents that a paged attention is made for.

    Attributes:
        group: query heads of one kv head.
        rules: every, window, causal of each segment.
    """

    n_kv: int
    group: int
    d_k: int
    d_v: int
    scale: float
    softcap: float
    rules: tuple[Rule, ...]

    @property
    def n_heads(self) -> int:
        return self.n_kv * self.group

    @property
    def partial(self) -> int:
        """Floats of one partial result."""
        return HEAD + self.d_v


@dataclass(frozen=True)
class Seen:
    """The rows lo..hi-1 of one sequence in one segment, for one query or for several."""

    lo: Value
    hi: Value


def token_of(k: Kernel, operands: Operands, t: Value) -> tuple[Value, Value | None]:
    """A token's sequence in the batch, and its position where there is one."""
    seq, pos = operands["seq"], operands["pos"]
    return (
        k.convert(seq.load([t]), I64) if seq is not None else k.i64(0),
        k.convert(pos.load([t]), I64) if pos is not None else None,
    )


def seen_rows(k: Kernel, table: Value, seq: Value, pos: Value | None, rule: Rule) -> Seen:
    """What a token at `pos` sees of its sequence."""
    every, window, causal = rule
    lo, hi = field(k, table, seq, "seen_start"), field(k, table, seq, "seen_stop")
    if causal and pos is not None:
        hi = k.min(hi, (pos + 1) // every)
    if window is not None and pos is not None:
        lo = k.max(lo, pos + (1 - window))
    return Seen(lo, hi)


def segments(operands: Operands, heads: Heads) -> list[tuple[Operand, Operand, Rule]]:
    """Keys, values and rule of each segment."""
    found = []
    for i, rule in enumerate(heads.rules):
        keys, values = operands[f"k{i}"], operands[f"v{i}"]
        assert keys is not None and values is not None and keys.table is not None
        found.append((keys, values, rule))
    return found


def logits_of(k: Kernel, h: Heads, products: Value) -> Value:
    """In units of log(2)."""
    if h.softcap:
        return tanh(k, products * (h.scale / h.softcap)) * (h.softcap * LOG2_E)
    return products * (h.scale * LOG2_E)


def evenly(n: int, most: int) -> int:
    """The size of equal parts of n, at most `most`."""
    return -(-n // -(-n // most))


def combine(k: Kernel, h: Heads, part: Value, n_slices: Int, sink: Value | None, to: Value) -> None:
    """Put the partial results of one token's head together: f32 [Dv] at `to`. `part`: the address of the first one."""
    stride = h.group * h.partial * 4
    sink = sink * LOG2_E if sink is not None else None
    with k.loop(0, k.i64(n_slices), 1, [sink if sink is not None else k.const(-math.inf, F32)]) as tops:
        tops.next(k.max(tops.values[0], k.load(part + tops.i * stride, F32)))
    top = tops.results[0]
    shift = k.select(top.eq(-math.inf), k.const(0.0, F32), top)
    n = h.d_v // L
    total = k.const(0.0, F32) if sink is None else exp2_nonpositive(k, sink - shift)
    for v in range(n):
        k.store(k.zero(F32.x(L)), to + v * L * 4)
    with k.loop(0, k.i64(n_slices), 1, [total]) as loop:
        one = part + loop.i * stride
        size = k.load(one + 4, F32)

        def add() -> list[Value]:
            weight = exp2_nonpositive(k, k.load(one, F32) - shift)
            weights = k.splat(weight, L)
            for v in range(n):
                place = to + v * L * 4
                k.store(k.fma(weights, k.load(one + (HEAD + v * L) * 4, F32.x(L)), k.load(place, F32.x(L))), place)
            return [k.fma(weight, size, loop.values[0])]

        loop.next(*k.either(size.gt(0.0), add, lambda: [loop.values[0]]))
    inverse = k.splat(1.0 / k.select(loop.results[0].eq(0.0), k.const(1.0, F32), loop.results[0]), L)
    for v in range(n):
        k.store(k.load(to + v * L * 4, F32.x(L)) * inverse, to + v * L * 4)


def emit_combine(k: Kernel, operands: Operands, *, heads: Heads) -> None:
    """y [T, H, Dv] from the partial results."""
    h, y, part, slices, sinks = heads, *(operands[name] for name in ("y", "part", "slices", "sinks"))
    assert y is not None and part is not None and slices is not None
    with k.rows((y.shape[0], h.n_kv, h.group)) as (t, head, g):
        n = slices.shape[0]
        one = part.address + (((t * h.n_kv + head) * n) * h.group + g) * (h.partial * 4)
        sink = sinks.load([head * h.group + g]) if sinks is not None else None
        combine(k, h, one, n, sink, y.at([t, head * h.group + g]))
