"""Elements moved along axes, those that fall off the end put in front."""

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

roll = Op("roll", "x[...]: any -> y[...]: x", attrs={"shifts": Attr(tuple)}, rows=(), source="ggml_roll")
"""`y[..., (i + shifts[d]) mod n, ...] = x[..., i, ...]` for each axis d of n elements, as `numpy.roll`.

Of fewer shifts than axes are meant the last axes.
Shapes: x [...] -> x's. Dtypes: any but block types -> x's.
Raises: ShapeError: an axis that is rolled is known only when a step runs.
"""


@roll.prepare
def given_by_axis(x: Node, *, shifts: Sequence[int]) -> Prepared:
    return {"x": x}, {"shifts": of_every_axis(x, shifts)}


@roll.shape
def like_x(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    x, shifts = slots["x"], attrs["shifts"]
    if len(shifts) != x.ndim or not all(type(n) is int for n in shifts):
        wanted = f"whole numbers, at most one for each axis of {shape_text(x.shape)}"
        raise AttributeValueError(f"[roll] shifts must be {wanted}; got {shifts} ({source_line()})")
    if x.dtype.is_block:
        raise DTypeError(f"[roll] x must not be of a block type; got {x.dtype} ({source_line()})")
    if any(by and not isinstance(n, int) for n, by in zip(x.shape, shifts, strict=True)):
        wanted = "a known length of every axis that is rolled"
        raise ShapeError(f"[roll] wanted {wanted}; got shifts {shifts} for x {shape_text(x.shape)} ({source_line()})")
    return x.shape, x.dtype


@roll.reference
def reference(x: Array, *, shifts: tuple[int, ...]) -> Array:
    return np.roll(x, shifts, tuple(range(x.ndim))) if x.ndim else np.array(x)


@roll.flops
def none(node: Node) -> Extent:
    return 0


@roll.law
def back_again(run: Callable[..., Array], x: Array, *, shifts: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(run(run(x, shifts=shifts), shifts=tuple(-n for n in shifts)), x)


@roll.cases
def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    shape = draw(st.lists(st.sampled_from((0, 1, 2, 5, 8, 33)), max_size=4))
    shifts = tuple(draw(st.sampled_from((0, 0, 1, -1, 3, -70, 35))) for _ in shape)
    return {"x": numbers(draw, shape, ANY)}, {"shifts": shifts}


@roll.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({"x": np.zeros((2048, 4096), np.float32)}, {"shifts": (0, 7)})]
