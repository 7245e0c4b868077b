"""Padding at both ends of axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent, Shape, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import AttributeValueError, DTypeError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Prepared, Slots
from tensorgraph.source import source_line

Array = NDArray[Any]

pad = Op(
    "pad",
    "x[...]: any -> y[...]: x",
    attrs={"before": Attr(tuple), "after": Attr(tuple), "circular": Attr(bool, False)},
    rows=(),
    source="ggml_pad_ext, ggml_pad_ext_circular",
)
"""x with `before[i]` zeros in front of axis i and `after[i]` behind it; `circular`: with x's own elements from the other end.

Of fewer numbers than axes are meant the last axes.
Shapes: x [...] -> each axis longer by `before[i] + after[i]`.
Dtypes: any but block types -> x's.
Raises: ShapeError: circular padding is longer than its axis, or the axis is known only when a step runs.
"""


@pad.prepare
def of_every_axis(x: Node, *, before: Sequence[int] = (), after: Sequence[int] = (), circular: bool = False) -> Prepared:
    n = x.ndim if isinstance(x, Node) else 0
    sides = {name: (*(0,) * (n - len(given)), *given) for name, given in (("before", before), ("after", after))}
    return {"x": x}, {**sides, "circular": circular}


@pad.shape
def longer(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    x, before, after = slots["x"], attrs["before"], attrs["after"]
    for name, given in (("before", before), ("after", after)):
        if len(given) != x.ndim or not all(type(n) is int and n >= 0 for n in given):
            wanted = f"numbers that are not negative, at most one for each axis of {shape_text(x.shape)}"
            raise AttributeValueError(f"[pad] {name} must be {wanted}; got {given} ({source_line()})")
    if x.dtype.is_block:
        raise DTypeError(f"[pad] x must not be of a block type; got {x.dtype} ({source_line()})")
    for n, sides in zip(x.shape, zip(before, after, strict=True), strict=True):
        if attrs["circular"] and any(sides) and not (isinstance(n, int) and max(sides) <= n):
            wanted = f"at most as long as its axis, for x {shape_text(x.shape)}"
            raise ShapeError(f"[pad] circular padding must be {wanted}; got {before} and {after} ({source_line()})")
    return tuple(n + low + high for n, low, high in zip(x.shape, before, after, strict=True)), x.dtype


@pad.reference
def reference(x: Array, *, before: tuple[int, ...], after: tuple[int, ...], circular: bool) -> Array:
    if circular:
        for axis, (n, low, high) in enumerate(zip(x.shape, before, after, strict=True)):
            x = x.take([*range(n - low, n), *range(n), *range(high)], axis)
        return np.array(x)
    y = np.zeros([n + low + high for n, low, high in zip(x.shape, before, after, strict=True)], x.dtype)
    y[tuple(slice(low, low + n) for n, low in zip(x.shape, before, strict=True))] = x
    return y


@pad.flops
def none(node: Node) -> Extent:
    return 0


@pad.law
def ends_come_off(run: Callable[..., Array], x: Array, *, before: tuple[int, ...], **attrs: Any) -> None:
    """The middle is x; around it are zeros, or what stands as far on in x."""
    y = run(x, before=before, **attrs)
    middle = tuple(slice(low, low + n) for low, n in zip(before, x.shape, strict=True))
    np.testing.assert_array_equal(y[middle], x)
    if not attrs["circular"]:
        assert np.count_nonzero(y) == np.count_nonzero(x)
    elif x.size:
        back = [(np.arange(n) - low) % m for n, m, low in zip(y.shape, x.shape, before, strict=True)]
        np.testing.assert_array_equal(y, x[np.ix_(*back)] if back else x)


@pad.cases
def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as arrays

    shape = draw(st.lists(st.sampled_from((0, 1, 2, 5, 8, 33)), max_size=4 if draw(st.booleans()) else 2))
    circular = draw(st.booleans())
    ends = [st.sampled_from([n for n in (0, 0, 1, 3, 19) if not circular or n <= extent]) for extent in shape]
    attrs = {name: tuple(draw(end) for end in ends) for name in ("before", "after")}
    dtype, values = draw(st.sampled_from(((np.float32, st.floats(-9, 9, width=16)), (np.int32, st.integers(-9, 9)))))
    return {"x": draw(arrays.arrays(dtype, tuple(shape), elements=values))}, attrs | {"circular": circular}
