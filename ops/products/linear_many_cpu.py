"""The same as `linear_cpu` for many tokens: their rows are prepared once, then each weight is a product of matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tensorgraph.backends.cpu.activations import Kind, Rows, row_bytes
from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.gemm import MOST_TOKENS, MOST_TURNS, multiply, plan_tiles, rows_kind
from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import CHUNK, Buffer, Call, Context, Kernel, Ref
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dims import Extent, Guard
from tensorgraph.graph import Node
from tensorgraph.ops.products.linear_cpu import Part, Source, finish, write_source

Operands = Mapping[str, Operand | None]
OF_SOURCE = ("x", "norm", "tokens")


def many_calls(
    context: Context,
    source: Source,
    parts: Sequence[Part],
    operands: Mapping[str, Ref | None],
    n_tokens: Extent,
    guard: Guard,
    nodes: tuple[Node, ...],
) -> list[Call]:
    """A call that prepares the rows, and one for each part; operands as `linear_cpu.emit_few` takes them."""
    dtypes = [ref.of.dtype for name, ref in operands.items() if name[0] in "wv" and ref is not None and isinstance(ref.of, Node)]
    source = replace(source, kind=rows_kind(context.target, dtypes, source.kind, 0 if context.exact else source.width))
    each = row_bytes(source.kind, source.width)
    rows = Ref(Buffer((n_tokens + MOST_TOKENS) * each, "rows"))
    given = {name: operands.get(name) for name in OF_SOURCE}
    grain = max(1, CHUNK // source.width)
    calls = [Call(emit_rows, {**given, "rows": rows}, {"source": source}, n_tokens, grain, guard=guard, nodes=nodes[:1])]
    for p, part in enumerate(parts):
        own = {f"{name[: -len(str(p))]}0": ref for name, ref in operands.items() if name not in OF_SOURCE and _number(name) == p}
        weights = [ref.of for ref in (own["w0"], own.get("v0")) if ref is not None and isinstance(ref.of, Node)]
        tiling = plan_tiles(context.target, [w.dtype for w in weights], source.kind, part.rows, MOST_TURNS)
        attrs = {"kind": source.kind, "part": part}
        taken = {"rows": rows, "tokens": Ref(n_tokens), **own}
        items, room = tiling.items(n_tokens), tiling.scratch_bytes
        calls.append(Call(emit_many, taken, attrs, items, scratch_bytes=room, guard=guard, nodes=nodes))
    return calls


def _number(name: str) -> int:
    digits = name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) if digits else -1


def emit_rows(k: Kernel, operands: Operands, *, source: Source) -> None:
    """Every row in the form that products read."""
    tokens, rows = operands["tokens"], operands["rows"]
    assert tokens is not None and rows is not None
    with k.rows(tokens.shape) as (t,):
        write_source(k, operands, source, t, rows.address + t * row_bytes(source.kind, source.width), rows.address)


def emit_many(k: Kernel, operands: Operands, *, kind: Kind, part: Part) -> None:
    """One part, for all tokens."""
    rows, tokens = operands["rows"], operands["tokens"]
    assert rows is not None and tokens is not None
    weights = [w for w in (operands["w0"], operands.get("v0")) if w is not None]

    def epilogue(tile: Value, token: Value, sums: list[Value]) -> None:
        finish(k, operands, 0, part, [tile * ROWS], token, sums)

    width = weights[0].shape[-1]
    assert isinstance(width, int)
    multiply(k, weights, Rows(kind, rows.address, row_bytes(kind, width)), tokens.shape[0], epilogue)
