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
from tensorgraph.ops.cases import ANY, numbers
from tensorgraph.ops.shape.axes import of_every_axis
from tensorgraph.source import source_line

Array = NDArray[Any]

pad = Op(
    "pad",
    "x[...]: any -> y[...]: x",
    attrs={
        "before": Attr(tuple),
        "after": Attr(tuple),
        "mode": Attr(str, "zeros", choices=("zeros", "circular", "reflect")),
    },
    rows=(),
    source="ggml_pad_ext, ggml_pad_ext_circular, ggml_pad_reflect_1d",
)
"""x with `before[i]` elements in front of axis i and `after[i]` behind it.

They are zeros; with "circular" x's own from the other end; with "reflect" x's own backwards, the end itself not once more. Of
fewer numbers than axes are meant the last axes.
Shapes: x [...] -> each axis longer by `before[i] + after[i]`.
Dtypes: any but block types -> x's.
Raises: ShapeError: but for zeros, x is too short for so many, or the axis is known only when a step runs.
"""


@pad.prepare
def given_by_axis(x: Node, *, before: Sequence[int] = (), after: Sequence[int] = (), mode: str = "zeros") -> Prepared:
    return {"x": x}, {"before": of_every_axis(x, before), "after": of_every_axis(x, after), "mode": mode}


@pad.shape
def longer(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    x, before, after, mode = slots["x"], attrs["before"], attrs["after"], attrs["mode"]
    for name, given in (("before", before), ("after", after)):
        if len(given) != x.ndim or not all(type(n) is int and n >= 0 for n in given):
            wanted = f"numbers that are not negative, at most one for each axis of {shape_text(x.shape)}"
            raise AttributeValueError(f"[pad] {name} must be {wanted}; got {given} ({source_line()})")
    if x.dtype.is_block:
        raise DTypeError(f"[pad] x must not be of a block type; got {x.dtype} ({source_line()})")
    for n, *sides in zip(x.shape, before, after, strict=True):
        if mode != "zeros" and any(sides) and not (isinstance(n, int) and max(sides) <= n - (mode == "reflect")):
            wanted = f"an axis of x {shape_text(x.shape)} that has so many elements to give"
            raise ShapeError(f"[pad] {mode} wanted {wanted}; got {before} and {after} ({source_line()})")
    return tuple(n + low + high for n, low, high in zip(x.shape, before, after, strict=True)), x.dtype


@pad.reference
def reference(x: Array, *, before: tuple[int, ...], after: tuple[int, ...], mode: str) -> Array:
    if mode == "zeros":
        y = np.zeros([n + low + high for n, low, high in zip(x.shape, before, after, strict=True)], x.dtype)
        y[tuple(slice(low, low + n) for n, low in zip(x.shape, before, strict=True))] = x
        return y
    for axis, (n, low, high) in enumerate(zip(x.shape, before, after, strict=True)):
        if mode == "circular":
            ends = range(n - low, n), range(high)
        else:
            ends = range(low, 0, -1), range(n - 2, n - 2 - high, -1)
        x = x.take([*ends[0], *range(n), *ends[1]], axis)
    return np.array(x)


@pad.flops
def none(node: Node) -> Extent:
    return 0


@pad.law
def ends_come_off(run: Callable[..., Array], x: Array, *, before: tuple[int, ...], mode: str, **after: Any) -> None:
    """The middle is x; around it are zeros, or what stands as far on in x, or as far back."""
    y = run(x, before=before, mode=mode, **after)
    middle = tuple(slice(low, low + n) for low, n in zip(before, x.shape, strict=True))
    np.testing.assert_array_equal(y[middle], x)
    if mode == "zeros":
        assert np.count_nonzero(y) == np.count_nonzero(x)
    elif x.size and x.ndim:
        at = [np.arange(n) - low for n, low in zip(y.shape, before, strict=True)]
        ends = [n - 1 for n in x.shape]
        back = [i % (n + 1) if mode == "circular" else n - np.abs(n - np.abs(i)) for i, n in zip(at, ends, strict=True)]
        np.testing.assert_array_equal(y, x[np.ix_(*back)])


@pad.cases
def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    shape = draw(st.lists(st.sampled_from((0, 1, 2, 5, 8, 33)), max_size=4 if draw(st.booleans()) else 2))
    mode = draw(st.sampled_from(("zeros", "circular", "reflect")))
    ends = [st.sampled_from([n for n in (0, 0, 1, 3, 19) if mode == "zeros" or n <= max(extent - 1, 0)]) for extent in shape]
    attrs = {name: tuple(draw(end) for end in ends) for name in ("before", "after")}
    return {"x": numbers(draw, shape, ANY)}, attrs | {"mode": mode}


@pad.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({"x": np.zeros((2048, 4096), np.float32)}, {"before": (0, 0), "after": (0, 256)})]
