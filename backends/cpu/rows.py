"""Which nodes go row by row: each row of a result is made of the rows at its place of what has as many, and of values without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tensorgraph import registry
from tensorgraph.backends.cpu.elementwise import broadcast_inputs, kernel_of, kernel_on
from tensorgraph.backends.cpu.kernel import NodeKernel
from tensorgraph.dims import Dim, Shape, Symbol
from tensorgraph.graph import Node
from tensorgraph.views import IndexMap

MOST_ELEMENTS = 4096
"""Of a row of a result: more are worth several threads even where there is but one row."""
MOST_READ = 1 << 16
"""Of a row that is read."""


@dataclass(frozen=True)
class Rows:
    """How a node goes row by row.

    Attributes:
        axes: the leading ones, over which its rows stand: that of tokens, or those of tokens and heads.
        depth: by slot, over how many of them rows of the input stand; 0 where all of it is read for each row.
    """

    axes: Shape
    depth: Mapping[str, int]


def slots_of(node: Node) -> Sequence[tuple[str, Node]]:
    """What a node reads; of an append, what is appended."""
    return list(zip(node.slots, node.inputs, strict=True)) if node.op != "append" else [("", node.inputs[0])]


def whole_slots(node: Node, backend: str = "cpu") -> tuple[str, ...]:
    """The slots of which a node reads all rows."""
    kernel = kernel_on(node, backend)
    return kernel.whole if kernel is not None else ()


def rows_of(node: Node, backend: str = "cpu") -> Rows | None:
    """How a node goes row by row, None where it does not: all sizes but the number of tokens are known then."""
    if node.op == "append":
        x = node.inputs[0]
        fits = x.ndim > 1 and _is_small(x, 1) and not is_free(x) and _lies_in_rows(x, x.shape[:1], 1)
        return Rows(x.shape[:1], {"": 1}) if fits else None
    kernel = kernel_on(node, backend)
    if kernel is None or not kernel.supports(node) or not (backend == "cpu" or kernel.portable or kernel.by_row(node)):
        return None
    slots = {slot: value for slot, value in slots_of(node) if slot not in kernel.whole}
    if any(is_free(x) and (kernel.reads(node, slot) or elements(x) > MOST_ELEMENTS) for slot, x in slots.items()):
        return None  # weights, which are held as products read them, or are too large to be read for every row
    n_axes = 1 if _is_small(node, 1) else 2
    if not _is_small(node, n_axes):
        return None
    depth = _by_token(node, kernel, slots) if n_axes == 1 else _by_head(node, kernel, slots)
    axes = node.shape[:n_axes]
    if depth is None or not all(_lies_in_rows(x, axes, depth[slot]) for slot, x in slots.items() if depth[slot]):
        return None
    return Rows(axes, {**depth, **dict.fromkeys(kernel.whole, 0)})


def _by_token(node: Node, kernel: NodeKernel, slots: Mapping[str, Node]) -> dict[str, int] | None:
    depth = {slot: 0 if is_free(value) else 1 for slot, value in slots.items()}
    named, rows = registry.ops.get(node.op).row_inputs, {slot for slot, n in depth.items() if n}
    # of one axis alone, elements are what others have as rows, and what goes along the last axis goes from one to the next
    known = node.ndim > 1 and ((bool(named) and rows <= set(named)) or kernel.by_row(node))
    return depth if known or kernel_of(node) is not None else None


def _by_head(node: Node, kernel: NodeKernel, slots: Mapping[str, Node]) -> dict[str, int] | None:
    """Element-wise by NumPy's rule, or of vectors along the last axis."""
    formula, depth = kernel_of(node), dict[str, int]()
    for slot, value in slots.items():
        lead = node.ndim - value.ndim  # axes that are repeated
        per_head = lead < 2 and value.shape[1 - lead] != 1
        if kernel.vectors:
            depth[slot] = 2 if slot in kernel.vectors else 0 if is_free(value) else 1
        elif formula is None or formula.operands is not broadcast_inputs or (per_head if is_free(value) else lead > 0):
            return None
        else:
            depth[slot] = 0 if is_free(value) else 2 if per_head else 1
    return depth


def _is_small(node: Node, n_axes: int) -> bool:
    """Whether rows over so many axes are of one known, small size."""
    sizes = node.shape[1:]
    known = len(node.shape) > n_axes - (n_axes == 1) and isinstance(node.shape[0], Dim) and all(isinstance(n, int) for n in sizes)
    return known and not node.dtype.is_block and row_size(node, n_axes) <= MOST_ELEMENTS


def _lies_in_rows(value: Node, axes: Shape, depth: int) -> bool:
    """Whether a value's rows over `depth` of some axes lie in rows of its base, that of the same place where the base has those
    axes too; of two axes, each row in one piece."""
    base, index_map, n_inner = value.base, value.index_map, len(value.shape) - 1
    inside = value.shape[:depth] == axes[:depth] and base.shape[:1] == axes[:1] and base.op not in ("append", "read")
    if not inside or index_map.within or base.dtype.is_block or not all(isinstance(n, int) for n in base.shape[1:]):
        return False
    extents = (*index_map.shape[1:], *index_map.strides[1:], index_map.strides[0], index_map.offset)
    numbers = [e for e in extents if isinstance(e, int)]
    if len(numbers) < len(extents):
        return False
    sizes, strides, (row, offset) = numbers[:n_inner], numbers[n_inner : 2 * n_inner], numbers[2 * n_inner :]
    reach = [(n - 1) * stride for n, stride in zip(sizes, strides, strict=True)]
    size = row_size(base, 1)
    if row != size or size > MOST_READ or offset < 0 or offset + sum(reach) >= row or min(strides, default=0) < 0:
        return False
    if len(axes) == 1:
        return True
    piece = IndexMap(tuple(sizes[depth - 1 :]), tuple(strides[depth - 1 :]))
    if not piece.is_dense or base.shape[:2] != axes:
        return piece.is_dense
    inner = row_size(base, 2)
    return depth == 2 and strides[0] == inner and offset + sum(reach[1:]) < inner


def is_free(value: Node) -> bool:
    """Whether a value has no rows: it is the same in every step."""
    return value.base.op == "constant" and not any(isinstance(e, Symbol) for e in (*value.shape, value.index_map.offset))


def elements(value: Node) -> int:
    """Of a value without rows."""
    return prod(n for n in value.shape if isinstance(n, int))


def row_size(node: Node, n_axes: int) -> int:
    """Elements of a row over so many axes."""
    return prod(n for n in node.shape[n_axes:] if isinstance(n, int))
