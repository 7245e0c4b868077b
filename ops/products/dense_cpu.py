"""Matrix products of any strides in f32, for matrices that are not interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorgraph.backends.cpu.ir import F32, Int, Value
from tensorgraph.backends.cpu.kernel import Call, Kernel, Ref
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.dims import maximum, product
from tensorgraph.graph import Node

BLOCK = 64  # of a's rows in one piece of work
TOKENS = 4  # of b's rows
WORK = 1 << 17  # products in a chunk


def dense_calls(node: Node) -> Sequence[Call]:
    """mul_mat of two values that lie anyhow."""
    a, b = node.inputs
    by_rows = a.index_map.strides[-2] == 1 and a.index_map.strides[-1] != 1
    items = product(b.shape[:-2]) * ((b.shape[-2] + (TOKENS - 1)) // TOKENS) * ((a.shape[-2] + (BLOCK - 1)) // BLOCK)
    grain = max(1, WORK // max(1, maximum(a.shape[-1]) * BLOCK * TOKENS))
    return [Call(multiply_dense, {"a": Ref(a), "b": Ref(b), "y": Ref(node)}, {"by_rows": by_rows}, items, grain, nodes=(node,))]


def multiply_dense(k: Kernel, operands: Mapping[str, Operand], *, by_rows: bool) -> None:
    """[*A, M, K] and [*B, N, K] to [*B, N, M], each of A's matrices for neighbours in B."""
    a, b, y = operands["a"], operands["b"], operands["y"]
    batch, n_rows, height = y.shape[:-2], k.i64(y.shape[-2]), k.i64(y.shape[-1])
    lead = len(batch) - (a.ndim - 2)
    shared = [k.i64(n) // k.max(k.i64(m), 1) for n, m in zip(batch[lead:], a.shape[:-2], strict=True)]
    pieces = (n_rows + (TOKENS - 1)) // TOKENS, (height + (BLOCK - 1)) // BLOCK
    with k.rows([*batch, *pieces]) as index:
        *at, token, block = index
        mine = [i // s for i, s in zip(at[lead:], shared, strict=True)]
        first, stop = block * BLOCK, k.min(block * BLOCK + BLOCK, height)

        def rows(count: int) -> None:
            numbers = [token * TOKENS + t for t in range(count)]
            xs = [b.row([*at, k.min(n, n_rows - 1)]) for n in numbers]
            outs = [y.row([*at, n]) for n in numbers]
            inside = [n.lt(n_rows) for n in numbers]
            (along_rows if by_rows else along_width)(k, a, mine, xs, outs, inside, first, stop, b.shape[-1])

        alone = (token * TOKENS).eq(n_rows - 1)
        with k.when(alone):
            rows(1)
        with k.when(alone.invert()):
            rows(TOKENS)


def along_width(
    k: Kernel,
    a: Operand,
    mine: Sequence[Int],
    xs: Sequence[Row],
    outs: Sequence[Row],
    inside: Sequence[Value],
    first: Value,
    stop: Value,
    width: Int,
) -> None:
    """Rows of a from `first` to `stop`, some at once, times rows; a vector is of neighbours along the width."""
    lanes, at_once = k.lanes, 4 if k.lanes == 16 or len(xs) == 1 else 2
    with k.loop(first, stop, at_once) as loop:
        loop.next()
        ws = [a.row([*mine, k.min(loop.i + i, stop - 1)]) for i in range(at_once)]

        def step(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
            loaded = [k.convert(x.load(i, lanes, mask), F32) for x in xs]
            by_row = [k.convert(w.load(i, lanes, mask), F32) for w in ws]
            return [k.fma(w, x, sums[r * len(xs) + t]) for r, w in enumerate(by_row) for t, x in enumerate(loaded)]

        found = k.sweep(width, step, [k.zero(F32.x(lanes))] * (at_once * len(xs)))
        totals = [k.sum(v) for v in found]
        for r in range(at_once):
            for t, out in enumerate(outs):
                with k.when((loop.i + r).lt(stop) & inside[t]):
                    out.store(loop.i + r, totals[r * len(xs) + t])


def along_rows(
    k: Kernel,
    a: Operand,
    mine: Sequence[Int],
    xs: Sequence[Row],
    outs: Sequence[Row],
    inside: Sequence[Value],
    first: Value,
    stop: Value,
    width: Int,
) -> None:
    """As `along_width` where a's rows are neighbours in memory: a vector is of neighbouring rows."""
    lanes = k.lanes

    def columns(i: Value, mask: Value | None, _: list[Value]) -> None:
        with k.loop(0, width, 1, [k.zero(F32.x(lanes))] * len(xs)) as loop:
            row = Row(k, a.dtype, a.at([*mine, 0, loop.i]), 1)
            w = k.convert(row.load(first + i, lanes, mask), F32)
            terms = [k.splat(k.convert(x.load(loop.i), F32), lanes) for x in xs]
            loop.next(*(k.fma(w, x, total) for x, total in zip(terms, loop.values, strict=True)))
        for t, out in enumerate(outs):
            with k.when(inside[t]):
                out.store(first + i, loop.results[t], mask)

    k.sweep(stop - first, columns)
