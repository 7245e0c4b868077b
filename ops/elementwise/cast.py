"""Conversion to another element type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Shape, divide_exact, shape_text
from tensorgraph.dtypes import BY_NAME, DType
from tensorgraph.errors import DTypeError, ShapeError
from tensorgraph.op import Attr, Op, Slots
from tensorgraph.ops.cases import at_times_long
from tensorgraph.ops.formats import FORMATS, block_format, decode, encode
from tensorgraph.source import source_line

Array = NDArray[Any]

SCALARS = tuple(dtype for dtype in BY_NAME.values() if not dtype.is_block)

cast = Op("cast", "x[...]: any -> y[...]: dtype", attrs={"dtype": Attr(DType)}, source="ggml_cast")
"""x as `dtype`: from every scalar type to every other, from block types to scalars, and from floats to the block types that can
be written.

Dtypes: to floats the nearest, ties to even, integers by way of f64; floats to integers toward zero, held within the type's
range, NaN to 0; integers to narrower ones by their low bits; to bool whether it is not 0; to block types as ggml quantises,
to iq1, iq2 and iq3 by a search of our own that takes no importance matrix.
Raises: ShapeError: the last axis is no multiple of a block. DTypeError: the block type is only read, or is x's already.
"""


@cast.shape
def check_blocks(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    x, dtype = slots["x"], attrs["dtype"]
    if dtype.is_block:
        if x.dtype == dtype:
            raise DTypeError(f"[cast] x is {dtype} already, and would be rounded again ({source_line()})")
        if not x.dtype.is_float or block_format(dtype).encode is None:
            raise DTypeError(f"[cast] there is no conversion from {x.dtype} to {dtype} ({source_line()})")
        if not x.shape or divide_exact(x.shape[-1], dtype.block_size) is None:
            wanted = f"[..., a multiple of {dtype.block_size}] for {dtype}"
            raise ShapeError(f"[cast] x must be {wanted}; got {shape_text(x.shape)} ({source_line()})")
    return x.shape, dtype


@cast.reference
def reference(x: Array, *, dtype: DType) -> Array:
    if dtype.is_block:
        return decode(encode(x.astype(np.float32), dtype), dtype).astype(np.float64)
    if dtype.is_float:
        return x.astype(np.float64)
    if dtype.kind == "int" and x.dtype.kind == "f":
        return _held_within(x, dtype)
    return x.astype(dtype.numpy)


def _held_within(x: Array, dtype: DType) -> Array:
    """Toward zero, and to the nearest number that an integer type has; 0 for NaN."""
    assert dtype.numpy is not None
    info = np.iinfo(dtype.numpy)
    low, end = float(info.min), float(info.max) + 1.0
    whole = np.trunc(x)
    inside = np.where((whole >= low) & (whole < end), whole, 0.0).astype(dtype.numpy)
    return np.where(whole >= end, dtype.numpy.type(info.max), np.where(whole < low, dtype.numpy.type(info.min), inside))


@cast.law
def zeros_stay_and_once_is_enough(run: Callable[..., Array], x: Array, *, dtype: DType) -> None:
    assert not run(np.zeros_like(x), dtype=dtype).any()
    if not dtype.is_block:
        y = run(x, dtype=dtype)
        again = run(y, dtype=dtype)
        assert np.all((again == y) | ((again != again) & (y != y)))


@cast.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = at_times_long(draw, draw(st.sampled_from(((), (0,), (1,), (3, 0), (2, 33), (5, 64), (2, 256)))))
    source, scalars = draw(st.sampled_from(SCALARS)), draw(st.booleans())
    last = shape[-1] if shape else 1
    blocks = [f.dtype for f in FORMATS.values() if f.encode and last % f.dtype.block_size == 0] if source.kind == "float" else []
    scalars = scalars or not blocks
    decades = (-3, 0, 0, 2, 4) if scalars or source.name == "f16" else (-3, 0, 2, -38, -16, -12, 8, 12, 24, 37)
    x = rng.standard_normal(shape) * 10.0 ** draw(st.sampled_from(decades))
    if draw(st.booleans()):
        x = np.round(2 * x) / 2
    if source.kind != "float":
        x = np.trunc(x).astype(np.int64)
    elif scalars:
        x = np.where(rng.random(shape) < 0.1, draw(st.sampled_from((np.inf, -np.inf, np.nan, -(2.0**31), 2.0**31, 2.0**63))), x)
    with np.errstate(over="ignore"):
        values = np.asarray(x).astype(source.numpy)
    return {"x": values}, {"dtype": draw(st.sampled_from(SCALARS if scalars else blocks))}
