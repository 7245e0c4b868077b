"""Tiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent, Shape, as_extent, divide_exact, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Prepared, Slots
from tensorgraph.ops.cases import ANY, at_times_long, numbers
from tensorgraph.source import source_line

Array = NDArray[Any]

repeat = Op("repeat", "x[...]: any -> y[shape]: x", attrs={"shape": Attr(tuple)}, source="ggml_repeat")
"""x tiled to `shape` as by `numpy.tile`: the whole of x again and again, not each row again and again."""


@repeat.prepare
def extents(x: Node, *, shape: Sequence[Extent]) -> Prepared:
    return {"x": x}, {"shape": tuple(map(as_extent, shape))}


@repeat.shape
def whole_tiles(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    x, shape = slots["x"], attrs["shape"]
    lead = len(shape) - x.ndim
    pairs = list(zip(shape[max(lead, 0) :], x.shape, strict=False))
    if lead < 0 or any(n != m and (m == 0 or divide_exact(n, m) is None) for n, m in pairs):
        wanted = f"a multiple of {shape_text(x.shape)} on every axis"
        raise ShapeError(f"[repeat] shape must be {wanted}; got {shape_text(shape)} ({source_line()})")
    return shape, x.dtype


@repeat.reference
def reference(x: Array, *, shape: tuple[int, ...]) -> Array:
    lead = len(shape) - x.ndim
    times = [1 if n == m else n // m for n, m in zip(shape[lead:], x.shape, strict=True)]
    return np.tile(x, [*shape[:lead], *times])


@repeat.flops
def none(node: Node) -> Extent:
    return 0


@repeat.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    shape = at_times_long(draw, draw(st.lists(st.sampled_from((0, 1, 2, 5, 8)), max_size=3)))
    times = draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape) + 1))
    lead = len(times) - len(shape)
    wanted = (*times[:lead], *(n * m for n, m in zip(times[lead:], shape, strict=True)))
    return {"x": numbers(draw, shape, ANY)}, {"shape": wanted}


@repeat.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({"x": np.zeros((512, 1, 4096), np.float32)}, {"shape": (512, 8, 4096)})]


@repeat.law
def begins_with_the_whole(run: Callable[..., Array], x: Array, *, shape: tuple[int, ...]) -> None:
    """Whatever is repeated at all stands at the beginning."""
    y = run(x, shape=shape)
    first = y[(0,) * (len(shape) - x.ndim)] if 0 not in shape else np.resize(x, (0,) * x.ndim)
    window = first[tuple(slice(n) for n in x.shape)]
    np.testing.assert_array_equal(window, x[tuple(slice(n) for n in window.shape)])
