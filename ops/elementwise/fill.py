"""A constant array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent, as_extent
from tensorgraph.dtypes import DType, as_dtype, f32
from tensorgraph.errors import DTypeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Prepared
from tensorgraph.source import source_line

fill = Op(
    "fill",
    "-> y[shape]: dtype",
    attrs={"shape": Attr(tuple), "value": Attr(float), "dtype": Attr(DType, f32)},
    source="ggml_fill",
)
"""`value` everywhere; axes of `shape` may be Dims."""


@fill.prepare
def extents(*, shape: Sequence[Extent], value: float, dtype: DType | str = f32) -> Prepared:
    element = as_dtype(dtype)
    if element.is_block:
        raise DTypeError(f"[fill] dtype must be a scalar type; got {element} ({source_line()})")
    return {}, {"shape": tuple(map(as_extent, shape)), "value": value, "dtype": element}


@fill.reference
def reference(*, shape: tuple[int, ...], value: float, dtype: DType) -> NDArray[Any]:
    return np.full(shape, value, np.float64 if dtype.is_float else dtype.numpy)


@fill.flops
def none(node: Node) -> Extent:
    return 0


@fill.law
def one_value(run: Callable[..., NDArray[Any]], *, shape: tuple[int, ...], value: float, dtype: DType) -> None:
    y = run(shape=shape, value=value, dtype=dtype)
    assert y.shape == tuple(shape) and (y == np.float64(value).astype(y.dtype)).all()
