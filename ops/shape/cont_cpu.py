"""Copies on the CPU: bits moved from one set of strides to another, in rows that are as long as the strides allow.

What is copied where is known before any code is written, so axes that run on in both are joined first; then a row is moved at
once where it is dense in both, a matrix in tiles where it is transposed, and anything else one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import I1, I8, I64, PTR, Int, Type, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.dims import Extent, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont import cont
from tensorgraph.views import IndexMap

TILE = 16  # elements along each side of a tile of a transposed matrix
_WORTH_TILES = 8  # along both axes


@dataclass(frozen=True)
class _Axis:
    """An axis of a copy: its length, and how many elements apart its entries are there and here."""

    n: Extent
    x: Extent
    y: Extent

    def run_on(self, inner: _Axis) -> bool:
        """Whether this and the axis inside it are one longer axis."""
        return self.x == inner.x * inner.n and self.y == inner.y * inner.n


def copy_call(node: Node, x: Node, y: Node, *, unless_same: bool = False) -> Call:
    """The call that copies x to y, of one shape and dtype and in any strides; y is a view of `node`, whose value it makes.

    Args:
        unless_same: does nothing where y lies in x's memory.
    """
    axes = _joined(x, y)
    turned = _transposed(axes)
    if turned is not None:
        *rest, across, along = turned
        tiles = (*rest, _Axis(_tiles(across.n), 0, 0), _Axis(_tiles(along.n), 0, 0))
        emit, attrs = emit_tiles, {"unless_same": unless_same}
        items, work, source = product(a.n for a in tiles), TILE * TILE, [*rest, along, across]
    else:
        *rest, row = axes
        split = maximum(row.n) > CHUNK
        pieces = (row.n + (CHUNK - 1)) // CHUNK if split else 1
        emit, attrs = emit_rows, {"unless_same": unless_same, "split": split}
        items, work, source = product([*(a.n for a in rest), pieces]), min(maximum(row.n), CHUNK), axes
    refs = {"x": Ref(_view(x, [(a.n, a.x) for a in source])), "y": Ref(_view(y, [(a.n, a.y) for a in turned or axes]))}
    return Call(emit, refs, attrs, items=items, grain=max(1, CHUNK // max(work, 1)), nodes=(node,))


def _joined(x: Node, y: Node) -> list[_Axis]:
    """The axes of a copy, those of length 1 left out and those that run on in both joined."""
    found: list[_Axis] = []
    for n, there, here in zip(x.shape, x.index_map.strides, y.index_map.strides, strict=True):
        axis = _Axis(n, there, here)
        if n == 1:
            continue
        if found and found[-1].run_on(axis):
            axis = _Axis(found.pop().n * n, there, here)
        found.append(axis)
    return found or [_Axis(1, 1, 1)]


def _transposed(axes: Sequence[_Axis]) -> list[_Axis] | None:
    """The axes of a matrix that is transposed, its two last and the others first; None where there is nothing to turn."""
    *others, along = axes
    across = next((a for a in others if a.x == 1), None)
    if along.y != 1 or along.x in (0, 1) or across is None or min(maximum(along.n), maximum(across.n)) < _WORTH_TILES:
        return None
    return [*(a for a in others if a is not across), across, along]


def _tiles(n: Extent) -> Extent:
    return (n + (TILE - 1)) // TILE


def _view(node: Node, axes: Sequence[tuple[Extent, Extent]]) -> Node:
    """A node's base, read with other axes from the same first element."""
    old = node.index_map
    index_map = IndexMap(tuple(n for n, _ in axes), tuple(stride for _, stride in axes), old.offset, old.within)
    return Node("view", (node.base,), index_map.shape, node.dtype, {"map": index_map}, ("x",), where=node.where)


def emit_rows(k: Kernel, operands: dict[str, Operand], *, unless_same: bool, split: bool) -> None:
    """Row by row, a long one in pieces."""
    x, y = operands["x"], operands["y"]
    n = y.shape[-1]

    def write() -> None:
        pieces = (n + (CHUNK - 1)) // CHUNK if split else 1
        with k.rows([*y.shape[:-1], pieces]) as [*index, piece]:
            first: Int = piece * CHUNK if split else 0
            length = k.min(k.i64(n) - first, CHUNK) if split else n
            copy_row(k, stored_type(y.dtype), y.at([*index, first]), y.strides[-1], x.at([*index, first]), x.strides[-1], length)

    if unless_same:
        with k.when(x.address.ne(y.address)):
            write()
    else:
        write()


def copy_row(k: Kernel, item: Type, to: Value, to_stride: Int, source: Value, stride: Int, n: Int) -> None:
    """Move n elements from one address to another; strides in elements."""
    size = item.size_bytes
    if _is_one(stride) and _is_one(to_stride):
        copy_bytes(k, to, source, k.i64(n) * size)
        return
    done: Int = 0
    value = None
    if isinstance(stride, int) and stride == 0:
        value = k.load(source, item)
        if _is_one(to_stride):
            lanes = k.target.vector_bytes // size
            done, many = n // lanes * lanes, k.splat(value, lanes)
            with k.loop(0, k.i64(done), lanes) as loop:
                k.store(many, to + loop.i * size)
                loop.next()
    with k.loop(done, k.i64(n)) as loop:
        k.store(value or k.load(source + loop.i * stride * size, item), to + loop.i * to_stride * size)
        loop.next()


def copy_bytes(k: Kernel, to: Value, source: Value, n_bytes: Int) -> None:
    """Move bytes between two places that have none in common."""
    name = "llvm.memcpy.p0.p0.i64"
    k.declare(name, None, (PTR, PTR, I64, I1))
    k.write(f"call void @{name}(ptr {to.ref}, ptr {source.ref}, i64 {k.i64(n_bytes).ref}, i1 false)")


def zero_bytes(k: Kernel, to: Value, n_bytes: Int) -> None:
    """Write zeros."""
    name = "llvm.memset.p0.i64"
    k.declare(name, None, (PTR, I8, I64, I1))
    k.write(f"call void @{name}(ptr {to.ref}, i8 0, i64 {k.i64(n_bytes).ref}, i1 false)")


def _is_one(stride: Int) -> bool:
    return isinstance(stride, int) and stride == 1


def emit_tiles(k: Kernel, operands: dict[str, Operand], *, unless_same: bool) -> None:
    """Transposed: x [..., C, J] to y [..., J, C], both dense along their last axis, in tiles of 16 by 16."""
    x, y = operands["x"], operands["y"]
    item, n_j, n_c = stored_type(y.dtype), k.i64(x.shape[-1]), k.i64(y.shape[-1])

    def write() -> None:
        counts = [(n + (TILE - 1)) // TILE for n in (n_j, n_c)]
        with k.rows([*y.shape[:-2], *counts]) as [*index, tile_j, tile_c]:
            j, c = tile_j * TILE, tile_c * TILE
            there, here = x.at([*index, c, j]), y.at([*index, j, c])
            left_j, left_c = n_j - j, n_c - c
            whole = left_j.ge(TILE) & left_c.ge(TILE)
            with k.when(whole):
                _turn_tile(k, item, here, y.strides[-2], there, x.strides[-2])
            with k.when(whole.invert()), k.loop(0, k.min(left_j, TILE)) as rows:
                source, to = there + rows.i * item.size_bytes, here + rows.i * y.strides[-2] * item.size_bytes
                copy_row(k, item, to, 1, source, x.strides[-2], k.min(left_c, TILE))
                rows.next()

    if unless_same:
        with k.when(x.address.ne(y.address)):
            write()
    else:
        write()


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


def calls(node: Node, context: Context) -> Sequence[Call]:
    return [copy_call(node, node.inputs[0], node)]


cont.kernels["cpu"] = NodeKernel(calls)
