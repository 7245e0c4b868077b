"""Views as index maps: which element of its base each element of a view is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import mul

from tensorgraph.dims import Bindings, Extent, Shape, Symbol, divide_exact, evaluate, evaluate_shape, product, shape_text
from tensorgraph.errors import ShapeError
from tensorgraph.source import source_line


def contiguous_strides(shape: Sequence[Extent]) -> Shape:
    """Strides, in elements, of a dense array of `shape`."""
    return tuple(accumulate(reversed(shape), mul, initial=1))[-2::-1]


@dataclass(frozen=True)
class IndexMap:
    """Element `i` of the view is element `offset + sum(i[d] * strides[d])` of the base, counted in elements.

    `within` are the extents that a step must find >= 0 for its slices to lie within their axes, where that is not certain.
    """

    shape: Shape
    strides: Shape
    offset: Extent = 0
    within: tuple[Symbol, ...] = ()

    @staticmethod
    @lru_cache(1 << 12)  # every layer has the same few shapes
    def dense(shape: Shape) -> IndexMap:
        return IndexMap(shape, contiguous_strides(shape))

    @cached_property
    def is_dense(self) -> bool:
        """Whether the elements lie one after another from the base's first (axes of length 1 have any stride)."""
        step: Extent = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != step:
                return False
            step = step * extent
        return self.offset == 0

    def permute(self, axes: Sequence[int]) -> IndexMap:
        return IndexMap(tuple(self.shape[a] for a in axes), tuple(self.strides[a] for a in axes), self.offset, self.within)

    def slice(self, axis: int, start: Extent, stop: Extent, step: int = 1) -> IndexMap:
        length = stop - start
        shape, strides = list(self.shape), list(self.strides)
        shape[axis] = length if step == 1 else (length + (step - 1)) // step
        offset = self.offset + start * strides[axis]
        strides[axis] = strides[axis] * step
        unsure = (e for e in (start, self.shape[axis] - stop) if isinstance(e, Symbol) and e.min < 0)
        return IndexMap(tuple(shape), tuple(strides), offset, (*self.within, *unsure))

    def broadcast(self, shape: Sequence[Extent]) -> IndexMap:
        """NumPy's rule: axes of length 1 and missing leading axes repeat."""
        lead = len(shape) - len(self.shape)
        strides: list[Extent] = [0] * lead
        for mine, stride, wanted in zip(self.shape, self.strides, shape[lead:] if lead >= 0 else (), strict=False):
            if mine != wanted and mine != 1:
                lead = -1
                break
            strides.append(stride if mine == wanted else 0)
        if lead < 0:
            raise ShapeError(f"[broadcast] {shape_text(self.shape)} does not broadcast to {shape_text(shape)} ({source_line()})")
        return IndexMap(tuple(shape), tuple(strides), self.offset, self.within)

    def reshape(self, shape: Sequence[Extent]) -> IndexMap | None:
        """The same elements in row order under another shape; None where strides cannot say it (a copy is needed)."""
        if self.is_dense:
            return IndexMap(tuple(shape), contiguous_strides(shape), 0, self.within)
        if 0 in self.shape:
            return IndexMap(tuple(shape), contiguous_strides(shape), self.offset, self.within)
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        strides: list[Extent] = []
        at = 0
        position = 0
        new = list(shape)
        while position < len(new):
            if new[position] == 1:
                strides.append(0)
                position += 1
                continue
            if at == len(old):
                return None
            old_end, new_end = at + 1, position + 1
            old_size, new_size = old[at][0], new[position]
            while old_size != new_size:
                if _sample(new_size) < _sample(old_size):
                    if new_end == len(new):
                        return None
                    new_size, new_end = new_size * new[new_end], new_end + 1
                else:
                    if old_end == len(old) or old[old_end - 1][1] != old[old_end][1] * old[old_end][0]:
                        return None
                    old_size, old_end = old_size * old[old_end][0], old_end + 1
            step = old[old_end - 1][1]
            group: list[Extent] = []
            for extent in reversed(new[position:new_end]):
                group.append(step)
                step = step * extent
            strides.extend(reversed(group))
            at, position = old_end, new_end
        return IndexMap(tuple(shape), tuple(strides), self.offset, self.within) if at == len(old) else None

    def resolve(self, bindings: Bindings) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shape, strides and offset as numbers, in elements."""
        return evaluate_shape(self.shape, bindings), evaluate_shape(self.strides, bindings), evaluate(self.offset, bindings)

    def __str__(self) -> str:
        offset = f" + {self.offset}" if self.offset != 0 else ""
        within = f" within {shape_text(self.within)}" if self.within else ""
        return f"{shape_text(self.shape)} strides {shape_text(self.strides)}{offset}{within}"


def _sample(extent: Extent) -> int:
    """Its value where Dims are far apart: of the products that reshape meets, that of fewer factors is smaller."""
    if isinstance(extent, int):
        return extent
    names = sorted(d.name for d in extent.dims())
    return extent.evaluate({name: 1_000_003 * 101**i for i, name in enumerate(names)})


def infer_reshape(shape: Shape, wanted: Sequence[Extent]) -> Shape:
    """Check a reshape and fill in its one axis of -1.

    Raises: ShapeError: the element counts differ, or more than one axis is -1.
    """
    free = [i for i, e in enumerate(wanted) if isinstance(e, int) and e == -1]
    total = product(shape)
    result = list(wanted)
    if len(free) == 1:
        known = product(e for i, e in enumerate(wanted) if i != free[0])
        quotient = divide_exact(total, known) if known != 0 else None
        if quotient is None:
            raise ShapeError(f"[reshape] -1 is not determined in {shape_text(wanted)} for {shape_text(shape)} ({source_line()})")
        result[free[0]] = quotient
    if len(free) > 1 or product(result) != total:
        given = f"{shape_text(wanted)} ({source_line()})"
        raise ShapeError(f"[reshape] wanted as many elements as {shape_text(shape)}; got {given}")
    return tuple(result)
