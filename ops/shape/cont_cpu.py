"""Copies on the CPU: bits moved from one set of strides to another, in rows that are as long as the strides allow.

What is copied where is known before any code is written, so axes that run on in both are joined first; then a row is moved at
once where it is dense in both, a matrix in tiles where it is transposed, and anything else one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tensorgraph.backends.cpu.ir import Int, Type, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Emit, Kernel, NodeKernel, Ref
from tensorgraph.backends.cpu.lines import Axis, join_axes
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.dims import Extent, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont import cont
from tensorgraph.views import IndexMap

TILE = 16  # elements along each side of a tile of a transposed matrix
_WORTH_TILES = 8  # along both axes


def copy_call(
    node: Node, x: Node, source: IndexMap | None = None, target: IndexMap | None = None, *, unless_same: bool = False
) -> Call:
    """The call that copies elements of x to the memory of `node`, whose value it makes (or a part of it).

    Args:
        source, target: which elements of x's base go where in the result, of one shape; all of x to all of it where not given.
        unless_same: does nothing where the result lies in x's memory.
    """
    source, target = source or x.index_map, target or node.index_map
    axes = join_axes(source.shape, (source, target))
    turned = _transposed(axes)
    attrs: dict[str, Any] = {"unless_same": unless_same}
    emit: Emit
    if turned is not None:
        *rest, across, along = turned
        emit, work = emit_tiles, TILE * TILE
        items = product([*(n for n, _ in rest), _tiles(across[0]), _tiles(along[0])])
        there, here = [*rest, along, across], turned
    else:
        *rest, (n, _) = axes
        attrs["split"] = maximum(n) > CHUNK
        emit, work = emit_rows, min(maximum(n), CHUNK)
        items = product([*(n for n, _ in rest), _pieces(n) if attrs["split"] else 1])
        there = here = axes
    refs = {"x": Ref(x, index_map=_along(there, 0, source.offset)), "y": Ref(node, index_map=_along(here, 1, target.offset))}
    return Call(emit, refs, attrs, items=items, grain=max(1, CHUNK // max(work, 1)), nodes=(node,))


def _transposed(axes: Sequence[Axis]) -> list[Axis] | None:
    """The axes of a matrix that is transposed, its two last and the others first; None where there is nothing to turn."""
    *others, along = axes
    across = next((axis for axis in others if axis[1][0] == 1), None)
    if along[1][1] != 1 or along[1][0] in (0, 1) or across is None:
        return None
    if min(maximum(along[0]), maximum(across[0])) < _WORTH_TILES:
        return None
    return [*(axis for axis in others if axis is not across), across, along]


def _along(axes: Sequence[Axis], operand: int, offset: Extent) -> IndexMap:
    return IndexMap(tuple(n for n, _ in axes), tuple(strides[operand] for _, strides in axes), offset)


def _tiles(n: Extent) -> Extent:
    return (n + (TILE - 1)) // TILE


def _pieces(n: Extent) -> Extent:
    return (n + (CHUNK - 1)) // CHUNK


def emit_rows(k: Kernel, operands: dict[str, Operand], *, unless_same: bool, split: bool) -> None:
    """Row by row, a long one in pieces."""
    x, y = operands["x"], operands["y"]
    n = y.shape[-1]

    pieces = (n + (CHUNK - 1)) // CHUNK if split else 1
    with _unless(k, unless_same, x, y), k.rows([*y.shape[:-1], pieces]) as [*index, piece]:
        first: Int = piece * CHUNK if split else 0
        length = k.min(k.i64(n) - first, CHUNK) if split else n
        k.move(stored_type(y.dtype), y.at([*index, first]), y.strides[-1], x.at([*index, first]), x.strides[-1], length)


def _unless(k: Kernel, unless_same: bool, x: Operand, y: Operand) -> AbstractContextManager[None]:
    """What is within happens; where `unless_same`, only if x and y lie in different places."""
    return k.when(x.address.ne(y.address)) if unless_same else nullcontext()


def emit_tiles(k: Kernel, operands: dict[str, Operand], *, unless_same: bool) -> None:
    """Transposed: x [..., C, J] to y [..., J, C], both dense along their last axis, in tiles of 16 by 16."""
    x, y = operands["x"], operands["y"]
    item, n_j, n_c = stored_type(y.dtype), k.i64(x.shape[-1]), k.i64(y.shape[-1])

    counts = [(n + (TILE - 1)) // TILE for n in (n_j, n_c)]
    with _unless(k, unless_same, x, y), k.rows([*y.shape[:-2], *counts]) as [*index, tile_j, tile_c]:
        j, c = tile_j * TILE, tile_c * TILE
        there, here = x.at([*index, c, j]), y.at([*index, j, c])
        left_j, left_c = n_j - j, n_c - c
        whole = left_j.ge(TILE) & left_c.ge(TILE)
        if not k.spread:
            with k.when(whole):
                _turn_tile(k, item, here, y.strides[-2], there, x.strides[-2])
        with nullcontext() if k.spread else k.when(whole.invert()), k.loop(0, k.min(left_j, TILE)) as rows:
            source, to = there + rows.i * item.size_bytes, here + rows.i * y.strides[-2] * item.size_bytes
            k.move(item, to, 1, source, x.strides[-2], k.min(left_c, TILE))
            rows.next()


def _turn_tile(k: Kernel, item: Type, to: Value, to_stride: Int, source: Value, stride: Int) -> None:
    """One whole tile, in squares whose sides are vectors."""
    size = item.size_bytes
    lanes = min(k.lanes, k.target.vector_bytes // size)
    with k.loop(0, TILE, lanes) as rows:
        with k.loop(0, TILE, lanes) as columns:
            there = source + (columns.i * stride + rows.i) * size
            here = to + (rows.i * to_stride + columns.i) * size
            square = [k.load(there + k.i64(stride) * (i * size), item.x(lanes)) for i in range(lanes)]
            for i, row in enumerate(transpose(square)):
                k.store(row, here + k.i64(to_stride) * (i * size))
            columns.next()
        rows.next()


def transpose(rows: Sequence[Value]) -> list[Value]:
    """As many vectors as each has lanes, a power of two: lane j of vector i goes to lane i of vector j."""
    rows, n = list(rows), len(rows)
    half = n // 2
    while half:
        low = [i if not i & half else n + i - half for i in range(n)]
        high = [i + half if not i & half else n + i for i in range(n)]
        for i in range(n):
            if not i & half:
                a, b = rows[i], rows[i + half]
                rows[i], rows[i + half] = a.shuffle(low, b), a.shuffle(high, b)
        half //= 2
    return rows


def zero_call(node: Node, target: IndexMap) -> Call:
    """The call that writes zeros to elements of the memory of `node`."""
    axes = join_axes(target.shape, (target,))
    index_map = IndexMap(tuple(n for n, _ in axes), tuple(s for _, (s,) in axes), target.offset)
    grain = max(1, CHUNK // max(maximum(index_map.shape[-1]), 1))
    y = Ref(node, index_map=index_map)
    return Call(emit_zeros, {"y": y}, items=product(index_map.shape[:-1]), grain=grain, nodes=(node,))


def emit_zeros(k: Kernel, operands: dict[str, Operand]) -> None:
    """Row by row."""
    y = operands["y"]
    size = stored_type(y.dtype).size_bytes
    with k.rows(y.shape[:-1]) as index:
        row = y.row(index)
        if isinstance(row.stride, int) and row.stride == 1:
            k.clear(row.address, k.i64(y.shape[-1]) * size)
            return
        with k.loop(0, k.i64(y.shape[-1])) as loop:
            k.store(k.zero(stored_type(y.dtype)), row.address + loop.i * row.stride * size)
            loop.next()


def calls(node: Node, context: Context) -> Sequence[Call]:
    return [copy_call(node, node.inputs[0])]


cont.kernels["cpu"] = NodeKernel(calls, portable=True)
