"""Joining along an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent, Shape, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import DTypeError, GraphError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Prepared, Slots
from tensorgraph.ops.cases import ANY, a_type, at_times_long, numbers
from tensorgraph.source import source_line

Array = NDArray[Any]

concat = Op("concat", attrs={"axis": Attr(int)}, source="ggml_concat")
"""`concat(*xs, axis=-1)`: any number of values of one type, equal on every other axis, one after another."""


@concat.prepare
def numbered(*xs: Node, axis: int = -1) -> Prepared:
    if not xs or not all(isinstance(x, Node) for x in xs):
        raise GraphError(f"[concat] wanted values of a graph, at least one; got {xs} ({source_line()})")
    if not -xs[0].ndim <= axis < xs[0].ndim:
        raise ShapeError(f"[concat] axis must be one of {shape_text(xs[0].shape)}; got {axis} ({source_line()})")
    return {f"x{i}": x for i, x in enumerate(xs)}, {"axis": axis % xs[0].ndim}


@concat.shape
def joined(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    first, *others = slots.values()
    shape, axis = list(first.shape), attrs["axis"]
    for slot, x in slots.items():
        if x.dtype != first.dtype:
            raise DTypeError(f"[concat] {slot} must be {first.dtype}, as x0; got {x.dtype} ({source_line()})")
        if x.ndim != first.ndim or _without(x.shape, axis) != _without(first.shape, axis):
            wanted = f"{shape_text(first.shape)}, of any length on axis {axis}"
            raise ShapeError(f"[concat] {slot} must be {wanted}; got {shape_text(x.shape)} ({source_line()})")
    for x in others:
        shape[axis] = shape[axis] + x.shape[axis]
    return tuple(shape), first.dtype


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


@concat.reference
def reference(slots: Mapping[str, Array], *, axis: int) -> Array:
    return np.concatenate(list(slots.values()), axis=axis)


@concat.flops
def none(node: Node) -> Extent:
    return 0


@concat.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    shape = at_times_long(draw, draw(st.lists(st.sampled_from((0, 1, 2, 5, 8)), min_size=1, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    lengths, types = draw(st.lists(st.sampled_from((0, 1, 3, 7, shape[axis])), min_size=1, max_size=4)), [a_type(draw, ANY)]
    shapes = [(*shape[:axis], n, *shape[axis + 1 :]) for n in lengths]
    return {f"x{i}": numbers(draw, s, types) for i, s in enumerate(shapes)}, {"axis": axis}


@concat.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({f"x{i}": np.zeros((4096, 2048), np.float32) for i in range(2)}, {"axis": -1})]


@concat.law
def slices_are_the_inputs(run: Callable[..., Array], slots: dict[str, Array], *, axis: int) -> None:
    """Each in its place."""
    y, start = run(slots, axis=axis), 0
    for x in slots.values():
        np.testing.assert_array_equal(y.take(range(start, start + x.shape[axis]), axis), x)
        start += x.shape[axis]
