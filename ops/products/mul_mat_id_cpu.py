"""mul_mat_id on the CPU: each row by its own expert where there are few, rows sorted by expert where there are many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tensorgraph.backends.cpu.activations import Kind, Rows, row_bytes, write_row
from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.gemm import MOST_TOKENS, plan_tiles, rows_kind
from tensorgraph.backends.cpu.ir import F32, I32, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Buffer, Call, Context, Kernel, NodeKernel, Ref
from tensorgraph.backends.cpu.matvec import kind_of, tile_dot, unit_tiles
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.weights import n_tiles, tile_bytes
from tensorgraph.dims import maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.products.dense_cpu import BLOCK, WORK, along_rows, along_width
from tensorgraph.ops.products.mul_mat_cpu import (
    guarded,
    known_width,
    load_f32,
    reads,
    store_tile,
    store_tiles,
    units,
    vec_grain,
    write_rows,
)
from tensorgraph.ops.products.mul_mat_id import mul_mat_id
from tensorgraph.ops.products.pairs_cpu import Sorted, most_pieces, multiply_rows, order_bytes, sort_pairs
from tensorgraph.ops.rows.index_cpu import checked

FEW = 16
"""Pairs of a token and an expert up to which each reads the expert's weights by itself."""


def calls(node: Node, context: Context) -> Sequence[Call]:
    a, b, ids = node.inputs
    if context.layout(a) != "r16":
        return _dense_calls(node)
    n_experts, height, width = a.shape
    assert isinstance(n_experts, int) and isinstance(height, int) and isinstance(width, int)
    kind, pairs = kind_of(a.dtype, context.exact), product(ids.shape)
    each = row_bytes(kind, width)
    shared = b.shape[1] != ids.shape[1]
    grain, attrs = max(1, CHUNK // max(width, 1)), {"kind": kind, "shared": shared}
    operands: dict[str, Ref | None] = {"a": Ref(a), "ids": Ref(ids), "y": Ref(node)}

    plain = Ref(Buffer((product(b.shape[:-1]) + MOST_TOKENS) * each, "rows"))
    written = Call(write_rows, {"b": Ref(b), "to": plain}, {"kind": kind, "width": width}, product(b.shape[:-1]), grain)
    alone = pairs * units(height), vec_grain(height, tile_bytes(a))
    few = Call(multiply_pairs, {**operands, "rows": plain}, attrs, *alone, apart=True)

    tiling = plan_tiles(context.target, [a.dtype], kind, height)
    sorted_kind = rows_kind(context.target, [a.dtype], kind)
    each, attrs = row_bytes(sorted_kind, width), {**attrs, "kind": sorted_kind}
    order = Ref(Buffer(order_bytes(n_experts, pairs, tiling.tokens), "order"))
    rows = Ref(Buffer((pairs + MOST_TOKENS) * each, "rows"))
    sort = Call(sort_pairs, {"ids": Ref(ids), "order": order}, {"n_experts": n_experts, "tokens": tiling.tokens})
    given: dict[str, Ref | None] = {"b": Ref(b), "ids": Ref(ids), "order": order, "rows": rows, "y": Ref(node)}
    place_attrs = {**attrs, "n_experts": n_experts, "width": width}
    place = Call(place_rows, given, place_attrs, product(b.shape[:-1]), grain, scratch_bytes=each if shared else 0)
    items = most_pieces(n_experts, pairs, tiling.tokens) * tiling.groups
    taken: dict[str, Ref | None] = {"a": Ref(a), "order": order, "rows": rows, "y": Ref(node)}
    many = Call(multiply_sorted, taken, {"kind": sorted_kind}, items, scratch_bytes=tiling.scratch_bytes)
    found: list[Call] = []
    for call in (written, few):
        found += guarded(replace(call, nodes=(node,)), pairs <= FEW)
    for call in (sort, place, many):
        found += guarded(replace(call, nodes=(node,)), pairs > FEW)
    return found


def multiply_pairs(k: Kernel, operands: Mapping[str, Operand], *, kind: Kind, shared: bool) -> None:
    """Each row of the result by itself."""
    a, ids, rows = operands["a"], operands["ids"], operands["rows"]
    y = known_width(operands["y"], a)
    n_experts, height, width = a.shape
    assert isinstance(height, int) and isinstance(width, int)
    each = row_bytes(kind, width)
    one = k.i64(1)
    with k.rows([k.size(y.shape[:-1]), units(height)]) as (pair, unit):
        tiles = unit_tiles(n_tiles(height), unit)
        token, used = k.unflatten(pair, y.shape[:-1])
        expert, named = checked(k, "mul_mat_id", ids.load([token, used]), n_experts)
        with k.when(named):
            x = Rows(kind, rows.address + (token if shared else pair) * each, each)
            store_tiles(k, y, pair, one, tiles, tile_dot(k, a, tiles, x, batch=expert))
        with k.when(named.invert()):
            store_tiles(k, y, pair, one, tiles, [[k.zero(F32.x(ROWS))]] * len(tiles))


def place_rows(k: Kernel, operands: Mapping[str, Operand], *, kind: Kind, shared: bool, n_experts: int, width: int) -> None:
    """Rows of b in the form of `kind`, at the places of their pairs; and zeros for pairs without an expert."""
    b, y, rows = operands["b"], operands["y"], operands["rows"]
    n_used, each = k.i64(y.shape[1]), row_bytes(kind, width)
    order = Sorted(k, operands["order"].address, n_experts, k.i64(k.size(y.shape[:-1])))

    def zeros(i: Value, mask: Value | None, _: list[Value]) -> None:
        out.store(i, k.zero(F32.x(k.lanes)), mask)

    def copy(i: Value, mask: Value | None, _: list[Value]) -> None:
        k.store(k.load(k.scratch() + i * 4, I32.x(k.lanes), mask=mask), to + i * 4, mask=mask)

    with k.rows(b.shape[:-1]) as (token, number):
        if shared:
            write_row(k, kind, load_f32(k, b.row([token, number])), width, k.scratch())
        with k.loop(0, n_used if shared else 1) as loop:
            loop.next()
            used = loop.i if shared else number
            place, out = order.read(order.place(token * n_used + used)), y.row([token, used])
            to = rows.address + place * each
            with k.when(place.ge(0)):
                if shared:
                    k.sweep(each // 4, copy)
                else:
                    write_row(k, kind, load_f32(k, b.row([token, number])), width, to)
            with k.when(place.lt(0)):
                k.sweep(y.shape[-1], zeros)


def multiply_sorted(k: Kernel, operands: Mapping[str, Operand], *, kind: Kind) -> None:
    """Every piece, so that pieces of one expert that follow each other find its weights in the cache."""
    a, rows = operands["a"], operands["rows"]
    y = known_width(operands["y"], a)
    n_experts, height, width = a.shape
    assert isinstance(n_experts, int) and isinstance(height, int) and isinstance(width, int)
    tiling, each = plan_tiles(k.target, [a.dtype], kind, height), row_bytes(kind, width)
    order = Sorted(k, operands["order"].address, n_experts, k.i64(k.size(y.shape[:-1])))
    with k.rows([order.n_pieces, tiling.groups]) as (piece, group):
        expert, first, count = order.read_piece(piece)

        def store(tile: Value, n: Value, sums: list[Value]) -> None:
            store_tile(k, y, order.read(order.pair(first + n)), tile, sums[0])

        x = Rows(kind, rows.address + first * each, each)
        multiply_rows(k, [a], tiling, group, expert, x, count, store)


def _dense_calls(node: Node) -> Sequence[Call]:
    """Of experts that lie anyhow."""
    a, b, ids = node.inputs
    by_rows = a.index_map.strides[-2] == 1 and a.index_map.strides[-1] != 1
    operands = {"a": Ref(a), "b": Ref(b), "ids": Ref(ids), "y": Ref(node)}
    attrs = {"by_rows": by_rows, "shared": b.shape[1] != ids.shape[1]}
    items = product(ids.shape) * ((a.shape[1] + (BLOCK - 1)) // BLOCK)
    grain = max(1, WORK // max(1, maximum(a.shape[-1]) * BLOCK))
    return [Call(multiply_dense, operands, attrs, items, grain, nodes=(node,))]


def multiply_dense(k: Kernel, operands: Mapping[str, Operand], *, by_rows: bool, shared: bool) -> None:
    """Some neighbouring results of a pair at a time."""
    a, b, ids, y = (operands[name] for name in ("a", "b", "ids", "y"))
    n_tokens, n_used, height = (k.i64(n) for n in y.shape)
    with k.rows([n_tokens, n_used, (height + (BLOCK - 1)) // BLOCK]) as (token, used, block):
        expert, named = checked(k, "mul_mat_id", ids.load([token, used]), a.shape[0])
        out, first, stop = y.row([token, used]), block * BLOCK, k.min(block * BLOCK + BLOCK, height)
        with k.when(named):
            row, inside = b.row([token, 0 if shared else used]), k.const(1, named.type)
            (along_rows if by_rows else along_width)(k, a, [expert], [row], [out], [inside], first, stop, b.shape[-1])
        with k.when(named.invert()), k.loop(first, stop) as loop:
            loop.next()
            out.store(loop.i, k.zero(F32))


mul_mat_id.kernels["cpu"] = NodeKernel(calls, reads=reads)
