"""Conversion to another element type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Shape, divide_exact, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import DTypeError, ShapeError
from tensorgraph.op import Attr, Op, Slots
from tensorgraph.ops.formats import block_format, decode, encode
from tensorgraph.source import source_line

Array = NDArray[Any]

cast = Op("cast", "x[...]: any -> y[...]: dtype", attrs={"dtype": Attr(DType)}, source="ggml_cast")
"""x as `dtype`: nearest, ties to even, for floats; toward zero for integers; block types as ggml quantises them."""


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
    return x.astype(dtype.numpy)


@cast.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as arrays

    shape = draw(st.sampled_from(((), (0,), (1,), (3, 0), (2, 33), (5, 64))))
    source = draw(st.sampled_from((np.float32, np.float16, np.int32, np.bool_)))
    whole = np.dtype(source).kind != "f"
    values = None if source is np.bool_ else st.integers(-100, 100) if whole else st.floats(-100, 100, width=16)
    blocks = ("q8_0", "q4_0") if not whole and shape and shape[-1] % 32 == 0 else ()
    dtype = draw(st.sampled_from(("f32", "f16", "bf16", "i32", "i64", *blocks)))
    return {"x": draw(arrays.arrays(source, shape, elements=values))}, {"dtype": dtype}


@cast.law
def nothing_stays_nothing(run: Callable[..., Array], x: Array, *, dtype: DType) -> None:
    assert not run(np.zeros_like(x), dtype=dtype).any()


@cast.law
def what_fits_stays(run: Callable[..., Array], x: Array, *, dtype: DType) -> None:
    """A value of the type casts to itself."""
    if not dtype.is_block:
        y = run(x, dtype=dtype)
        np.testing.assert_array_equal(run(y, dtype=dtype), y)
