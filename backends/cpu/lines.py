"""How results and operands of one shape are walked: axes joined until few are left, and lines long enough for vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tensorgraph.dims import Extent, Shape, product
from tensorgraph.views import IndexMap

SHORT = 16
"""Lines of fewer elements are joined with the axes around them, whatever the strides."""
LONG = 512
"""Enough elements for such a joined line."""
PIECE = 4096
"""Elements of a piece of a line that may be long: what is divided then."""

Axis = tuple[Extent, tuple[Extent, ...]]  # an extent, and the stride of every operand


@dataclass(frozen=True)
class Lines:
    """A shape as rows of lines.

    Attributes:
        inner: the axes after the first of those that were made one line.
        maps: where the elements of each operand lie: shape `(*rows, line)`, or `(*rows, outer, *inner)` for an operand whose
            elements along a line are no fixed distance apart; a line is then `outer` times the product of `inner` elements.
        pieces: whether a line is divided into pieces of `PIECE` elements.
    """

    rows: Shape
    line: Extent
    inner: tuple[int, ...]
    maps: tuple[IndexMap, ...]

    @property
    def pieces(self) -> bool:
        return not isinstance(self.line, int) or self.line > PIECE

    @property
    def items(self) -> Extent:
        """How much there is to divide: lines, or pieces of them."""
        n = product(self.rows)
        return n * ((self.line + (PIECE - 1)) // PIECE) if self.pieces else n

    @property
    def item_size(self) -> int:
        """Elements of one of those, at most."""
        return PIECE if self.pieces else int(self.line)  # type: ignore[arg-type]


def arrange(shape: Sequence[Extent], maps: Sequence[IndexMap]) -> Lines:
    """The longest lines over which every operand can be walked; maps are all of this shape."""
    axes = join_axes(shape, maps)
    n, taken = axes[-1][0], 1
    if isinstance(n, int) and n < SHORT:
        while taken < len(axes) and _static_size(axes[-taken:]) < LONG:
            taken += 1
    rows, group = axes[:-taken], axes[-taken:]
    outer, inner = group[0][0], tuple(n for n, _ in group[1:] if isinstance(n, int))
    found = []
    for i, given in enumerate(maps):
        along: list[Axis] = [(n, (s[i],)) for n, s in group]
        one = _joined(along)
        places = [*((n, s[i]) for n, s in rows), *((n, s) for n, (s,) in (one if len(one) == 1 else along))]
        found.append(IndexMap(tuple(n for n, _ in places), tuple(s for _, s in places), given.offset))
    return Lines(tuple(n for n, _ in rows), product((outer, *inner)), inner, tuple(found))


def join_axes(shape: Sequence[Extent], maps: Sequence[IndexMap]) -> list[Axis]:
    """At least one axis: those longer than 1, neighbours made one where each operand's elements stay the same distance apart."""
    if 0 in shape:
        return [(0, (1,) * len(maps))]
    axes = [(n, tuple(m.strides[i] for m in maps)) for i, n in enumerate(shape) if n != 1]
    return _joined(axes) or [(1, (1,) * len(maps))]


def _joined(axes: Sequence[Axis]) -> list[Axis]:
    found: list[Axis] = []
    for n, steps in axes:
        if found and all(before == n * step for before, step in zip(found[-1][1], steps, strict=True)):
            found[-1] = (found[-1][0] * n, steps)
        else:
            found.append((n, steps))
    return found


def _static_size(axes: Sequence[Axis]) -> int:
    """The product of extents; enough of them where one is not known."""
    return prod(n if isinstance(n, int) else LONG for n, _ in axes)
