"""mul_mat on the CPU: interleaved weights times few rows or many, and a plain form for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tensorgraph.backends.cpu.activations import Kind, Load, Rows, row_bytes, write_row
from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.elementwise import Read, cpu_formula
from tensorgraph.backends.cpu.gemm import MOST_TOKENS, MOST_TURNS, multiply, plan_tiles, rows_kind
from tensorgraph.backends.cpu.ir import F32, Int, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Buffer, Call, Context, Kernel, Ref
from tensorgraph.backends.cpu.matvec import kind_of, tile_dot, tiles_at_once, unit_tiles
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.backends.cpu.weights import n_tiles, same_tiles, tile_bytes
from tensorgraph.dims import ALWAYS, Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.products.dense_cpu import dense_calls
from tensorgraph.ops.products.mul_mat import mul_mat

FEW = 4
"""Rows up to which each weight is read once and multiplied by all of them."""
MOST_TERMS = 8
"""Products that are summed element by element."""
_PACKED = ("f32", "f16", "bf16")


def reads(node: Node, slot: str) -> tuple[str, ...]:
    a = node.at("a")
    assert a is not None
    packed = a.dtype.is_block or a.dtype.name in _PACKED
    return ("r16",) if slot == "a" and packed and same_tiles(a) is not None else ()


def calls(node: Node, context: Context) -> Sequence[Call]:
    a, b = node.inputs
    if context.layout(a) != "r16":
        return dense_calls(node)
    height, width = a.shape[-2:]
    assert isinstance(height, int) and isinstance(width, int)
    kind = kind_of(a.dtype, context.exact)
    single = product(a.shape[:-2]) == 1
    batch, n_rows = (1, product(b.shape[:-1])) if single else (product(b.shape[:-2]), b.shape[-2])
    prepared = rows_kind(context.target, [a.dtype], kind, width if single and not context.exact else 0)
    rows = Buffer((batch * n_rows + MOST_TOKENS) * row_bytes(prepared, width), "rows")
    operands = {"a": Ref(a), "b": Ref(b), "y": Ref(node)}
    written = Call(
        write_rows,
        {"b": Ref(b), "to": Ref(rows)},
        {"kind": prepared, "width": width},
        batch * n_rows,
        max(1, CHUNK // max(width, 1)),
        nodes=(node,),
    )
    tile = tile_bytes(a)
    tiling = plan_tiles(context.target, [a.dtype], prepared, height, MOST_TURNS)
    many = Call(
        multiply_many,
        {**operands, "rows": Ref(rows)},
        {"kind": prepared, "single": single},
        tiling.items(n_rows) * batch,
        scratch_bytes=tiling.scratch_bytes,
        nodes=(node,),
    )
    found: list[Call] = [] if single else [written]
    for tokens, guard in ((1, n_rows <= 1), (FEW, (n_rows >= 2) & (n_rows <= FEW))):
        attrs = {"kind": kind if single else prepared, "tokens": tokens}
        if single:
            scratch = tokens * row_bytes(kind, width)
            few = Call(multiply_few, operands, attrs, units(height), vec_grain(height, tile), apart=True, scratch_bytes=scratch)
        else:
            items, grain = batch * units(height), vec_grain(height, tile)
            few = Call(multiply_each, {**operands, "rows": Ref(rows)}, attrs, items, grain, apart=True)
        found += guarded(replace(few, nodes=(node,)), guard)
    for call in (written, many) if single else (many,):
        found += guarded(call, n_rows > FEW)
    return found


def guarded(call: Call, guard: Guard | bool) -> list[Call]:
    """A call for the steps of a guard; none where that is known to be false."""
    return [replace(call, guard=guard if isinstance(guard, Guard) else ALWAYS)] if guard is not False else []


def vec_grain(height: int, tile_bytes: int) -> int:
    """Units in a chunk: eighths of a matrix, but no less than 32 KiB of it and no more than 256 KiB."""
    each = max(tile_bytes, 1) * tiles_at_once(n_tiles(height))
    return max(1, (32 << 10) // each, min(units(height) // 8, (256 << 10) // each))


def load_f32(k: Kernel, row: Row) -> Load:
    """A row's elements as f32."""
    return lambda i, lanes: k.convert(row.load(i, 0 if lanes == 1 else lanes), F32)


def write_rows(k: Kernel, operands: Mapping[str, Operand], *, kind: Kind, width: int) -> None:
    """The rows of b one after another, in the form of `kind`."""
    b, to = operands["b"], operands["to"]
    with k.rows(b.shape[:-1]) as index:
        write_row(k, kind, load_f32(k, b.row(index)), width, to.address + flat(k, index, b.shape[:-1]) * row_bytes(kind, width))


def flat(k: Kernel, index: Sequence[Int], shape: Sequence[Int]) -> Value:
    """The number of an index in row order."""
    at = k.i64(0)
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def store_tile(k: Kernel, y: Operand, row: Value, tile: Value, sums: Value) -> None:
    """16 results of a row of y, which is dense; rows are counted over all leading axes."""
    height = y.shape[-1]
    assert isinstance(height, int)
    at = y.address + (row * height + tile * ROWS) * 4
    k.store(sums, at, mask=tile_mask(k, height, tile * ROWS))


def store_tiles(
    k: Kernel, y: Operand, first: Value, count: Value, tiles: Sequence[Value], found: Sequence[Sequence[Value]]
) -> None:
    """What a few rows of y, from `first` on, have of some tiles: [tile][row]; those behind `count` are not there."""
    for tile, sums in zip(tiles, found, strict=True):
        for t, total in enumerate(sums):
            with k.when(k.i64(t).lt(count)):
                store_tile(k, y, first + t, tile, total)


def units(height: int) -> int:
    """How often tiles are read of so many rows of weights, as many at once as mat-vec does."""
    return n_tiles(height) // tiles_at_once(n_tiles(height))


def tile_mask(k: Kernel, height: int, row: Value) -> Value | None:
    """The lanes of a tile from a row on that are rows; None where all are."""
    return k.tail_mask(ROWS, k.i64(height) - row) if height % ROWS else None


def multiply_few(k: Kernel, operands: Mapping[str, Operand], *, kind: Kind, tokens: int) -> None:
    """One matrix times at most `tokens` rows, which each thread converts for itself."""
    a, b, y = operands["a"], operands["b"], known_width(operands["y"], operands["a"])
    height, width = a.shape[-2:]
    assert isinstance(height, int) and isinstance(width, int)
    each, scratch = row_bytes(kind, width), k.scratch()
    count = k.i64(k.size(b.shape[:-1]))
    with k.when(k.first), k.loop(0, count) as loop:
        loop.next()
        write_row(k, kind, load_f32(k, b.row(k.unflatten(loop.i, b.shape[:-1]))), width, scratch + loop.i * each)
    with k.span(units(height)) as loop:
        tiles = unit_tiles(n_tiles(height), loop.i)
        found = tile_dot(k, a, tiles, Rows(kind, scratch, each, tokens))
        store_tiles(k, y, k.i64(0), count, tiles, found)


def multiply_each(k: Kernel, operands: Mapping[str, Operand], *, kind: Kind, tokens: int) -> None:
    """Several matrices times at most `tokens` rows each, converted before."""
    a, y = operands["a"], known_width(operands["y"], operands["a"])
    (height, width), count = a.shape[-2:], k.i64(operands["b"].shape[-2])
    assert isinstance(height, int) and isinstance(width, int)
    each = row_bytes(kind, width)
    with k.rows([k.size(y.shape[:-2]), units(height)]) as (number, unit):
        row, tiles = number * count, unit_tiles(n_tiles(height), unit)
        x = Rows(kind, operands["rows"].address + row * each, each, tokens)
        store_tiles(k, y, row, count, tiles, tile_dot(k, a, tiles, x, batch=matrix_of(k, a, y, number)))


def multiply_many(k: Kernel, operands: Mapping[str, Operand], *, kind: Kind, single: bool) -> None:
    """Matrices times many rows, converted before."""
    a, y = operands["a"], known_width(operands["y"], operands["a"])
    width = a.shape[-1]
    assert isinstance(width, int)
    x = Rows(kind, operands["rows"].address, row_bytes(kind, width))

    def store(tile: Value, row: Value, sums: list[Value]) -> None:
        store_tile(k, y, row, tile, sums[0])

    if single:
        multiply(k, [a], x, k.size(y.shape[:-1]), store)
    else:
        batch = k.size(y.shape[:-2])
        multiply(k, [a], x, y.shape[-2], store, batch=batch, matrix=lambda number: matrix_of(k, a, y, number))


def known_width(y: Operand, a: Operand) -> Operand:
    """The result with the number of the weights' rows as its last extent, which is known."""
    return replace(y, shape=(*y.shape[:-1], a.shape[-2]))


def matrix_of(k: Kernel, a: Operand, y: Operand, number: Value) -> Value:
    """Which matrix a number of y's batch is multiplied by: neighbours share one."""
    few, many = a.shape[:-2], y.shape[:-2]
    index = k.unflatten(number, many)[len(many) - len(few) :]
    shared = [k.i64(n) // m for n, m in zip(many[len(many) - len(few) :], few, strict=True)]
    return flat(k, [i // s for i, s in zip(index, shared, strict=True)], few)


def is_narrow(node: Node) -> bool:
    """Whether it is summed element by element: few products each, and rows of a, which no layout holds, that are neighbours."""
    a, b = node.inputs
    width = b.shape[-1]
    by_rows = a.index_map.strides[-2] == 1 and a.base.op != "constant"
    alike = all(n in (1, m) for n, m in zip(a.shape[-3::-1], b.shape[-3::-1], strict=False))
    return by_rows and alike and isinstance(width, int) and 1 <= width <= MOST_TERMS


def terms(node: Node) -> tuple[Read, ...]:
    """Both factors of each product, in the result's shape: `a[..., m, i]` and `b[..., n, i]` for each i."""
    (a, b), found = node.inputs, list[Read]()
    order = [*range(a.ndim - 2), a.ndim - 1, a.ndim - 2]
    for i in range(maximum(b.shape[-1])):
        mine, theirs = (x.index_map.slice(x.ndim - 1, i, i + 1) for x in (a, b))
        found += [Read(a, mine.permute(order).broadcast(node.shape)), Read(b, theirs.broadcast(node.shape))]
    return tuple(found)


@cpu_formula(mul_mat, operands=terms, applies=is_narrow, otherwise=calls, supports=lambda node: True, reads=reads)
def sum_of_products(k: Kernel, *factors: Value) -> Value:
    total = k.zero(F32.x(factors[0].lanes))
    for x, y in zip(factors[::2], factors[1::2], strict=True):
        total = k.fma(k.convert(x, F32), k.convert(y, F32), total)
    return total
