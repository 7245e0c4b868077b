"""Elements by number along one axis, read and written, as torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Extent, Shape, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import AttributeValueError, DTypeError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import ANY, INTS, THOUSANDS, a_type, at_times_long, numbers
from tensorgraph.ops.rows.index import none_of
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]
Slots = Mapping[str, Node]


def _fits(op: str, x: Node, ids: Node, axis: int) -> None:
    """Check that `ids` number elements of `x` along `axis` and stay within it along the others."""
    if not -x.ndim <= axis < x.ndim:
        raise AttributeValueError(f"[{op}] axis must be one of {shape_text(x.shape)}; got {axis} ({source_line()})")
    if x.dtype.is_block:
        raise DTypeError(f"[{op}] x must not be of a block type; got {x.dtype} ({source_line()})")
    if ids.dtype.kind != "int":
        raise DTypeError(f"[{op}] ids must be int; got {ids.dtype} ({source_line()})")
    fits = x.ndim == ids.ndim
    for i, (n, m) in enumerate(zip(x.shape, ids.shape, strict=False)):
        within = m <= n if isinstance(m, int) and isinstance(n, int) else m == n
        fits = fits and (within or i == axis % x.ndim)
    if not fits:
        wanted = f"within {shape_text(x.shape)} but for axis {axis}"
        raise ShapeError(f"[{op}] ids must lie {wanted}; got {shape_text(ids.shape)} ({source_line()})")


def _at(x: Array, ids: Array, axis: int) -> tuple[Array, ...]:
    """Index of every element that `ids` names, by axis."""
    at: list[Array] = list(np.indices(ids.shape, sparse=True))
    at[axis] = ids
    return tuple(at)


gather = Op(
    "gather",
    "x[*X]: any, ids[*I]: int -> y[*I]: x",
    attrs={"axis": Attr(int, -1)},
    tolerance=0.0,
    source="torch.gather",
)
"""`y[i, j, k] = x[i, ids[i, j, k], k]` for axis 1, and so on; the index -1 gives zero.

Shapes: ids has x's number of axes, each at most as long as x's but for `axis` -> ids'.
Dtypes: any but block types -> x's.
Raises: InputError, when run, for an index below -1 or not below the axis' length.
"""


@gather.shape
def gather_shape(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    _fits("gather", slots["x"], slots["ids"], attrs["axis"])
    return slots["ids"].shape, slots["x"].dtype


@gather.reference
def gather_reference(x: Array, ids: Array, *, axis: int) -> Array:
    none = none_of("gather", ids, x.shape[axis])
    if none is None:
        return x[_at(x, ids, axis)]
    y = np.zeros(ids.shape, x.dtype)
    at = np.nonzero(~none)
    y[at] = x[tuple(ids[at] if i == axis % x.ndim else a for i, a in enumerate(at))]
    return y


scatter = Op(
    "scatter",
    "x[*X]: any, ids[*I]: int, src[*I]: x -> y[*X]: x",
    attrs={"axis": Attr(int, -1)},
    inplace={"y": "x"},
    tolerance=0.0,
    source="torch.Tensor.scatter",
)
"""A copy of x in which `y[i, ids[i, j, k], k] = src[i, j, k]` for axis 1, and so on; the index -1 writes nothing.

The indices of one result element are distinct. Shapes: as gather, src as ids -> x's.
Dtypes: any but block types; src has x's.
Raises: InputError, when run, for an index below -1 or not below the axis' length.
"""


@scatter.shape
def scatter_shape(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    x, ids, src = slots["x"], slots["ids"], slots["src"]
    _fits("scatter", x, ids, attrs["axis"])
    if src.shape != ids.shape:
        wanted, got = shape_text(ids.shape), shape_text(src.shape)
        raise ShapeError(f"[scatter] src must be {wanted}, as ids; got {got} ({source_line()})")
    if src.dtype != x.dtype:
        raise DTypeError(f"[scatter] src must be {x.dtype}, as x; got {src.dtype} ({source_line()})")
    return x.shape, x.dtype


@scatter.reference
def scatter_reference(x: Array, ids: Array, src: Array, *, axis: int) -> Array:
    none = none_of("scatter", ids, x.shape[axis])
    y = x.copy()
    if none is None:
        y[_at(x, ids, axis)] = src
    else:
        at = np.nonzero(~none)
        y[tuple(ids[at] if i == axis % x.ndim else a for i, a in enumerate(at))] = src[at]
    return y


@gather.flops
@scatter.flops
def flops(node: Node) -> Extent:
    return 0


@scatter.law
def gathered_again(run: Callable[..., Array], x: Array, ids: Array, src: Array, *, axis: int) -> None:
    """What was written is found where it was written, and everything else is x."""
    y = run(x, ids, src, axis=axis)
    written = np.zeros(x.shape, bool)
    at = [a[ids >= 0] for a in np.broadcast_arrays(*_at(x, ids, axis))]
    written[tuple(at)] = True
    np.testing.assert_array_equal(y[tuple(at)], src[ids >= 0])
    np.testing.assert_array_equal(y[~written], x[~written])


def _draw_ids(draw: Any, distinct: bool) -> tuple[Array, Array, int]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = at_times_long(draw, draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    wanted = [n if n in THOUSANDS else draw(st.integers(0, n)) for n in shape]
    if not distinct:
        wanted[axis] = draw(st.integers(0, 9))
    ids = np.argsort(rng.random(shape), axis)  # distinct along the axis
    if not distinct:
        ids = rng.integers(0, shape[axis], [max(m, n) for m, n in zip(wanted, shape, strict=True)])
    ids = ids[tuple(slice(n) for n in wanted)]
    if none := draw(st.booleans()):
        ids[rng.random(ids.shape) < 0.3] = -1
    fitting = [t for t in INTS if shape[axis] <= np.iinfo(t).max and -none >= np.iinfo(t).min]
    return numbers(draw, shape, ANY), ids.astype(a_type(draw, fitting)), axis


@gather.cases
def gather_cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    x, ids, axis = _draw_ids(draw, distinct=False)
    return {"x": x, "ids": ids}, {"axis": axis}


@scatter.cases
def scatter_cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    x, ids, axis = _draw_ids(draw, distinct=True)
    return {"x": x, "ids": ids, "src": np.arange(ids.size).reshape(ids.shape).astype(x.dtype)}, {"axis": axis}


@gather.typical
def gather_typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    x = np.zeros((2048, 4096), np.float32)
    return [({"x": x, "ids": rng.integers(0, 4096, (2048, 4096)).astype(np.int32)}, {"axis": -1})]


@scatter.typical
def scatter_typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    x = np.zeros((2048, 4096), np.float32)
    ids = rng.permuted(np.broadcast_to(np.arange(4096, dtype=np.int32), x.shape), axis=1)[:, :512]
    return [({"x": x, "ids": ids, "src": np.zeros(ids.shape, np.float32)}, {"axis": -1})]


@gather.law
def in_order(run: Callable[..., Array], x: Array, ids: Array, *, axis: int) -> None:
    """The numbers 0, 1, 2, ... along the axis give x."""
    numbers = np.moveaxis(np.broadcast_to(np.arange(x.shape[axis]), np.moveaxis(x, axis, -1).shape), -1, axis)
    np.testing.assert_array_equal(run(x, numbers.astype(ids.dtype), axis=axis), x)
