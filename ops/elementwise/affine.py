"""Scale and clamp: the element-wise operators with numbers of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.op import Attr, Op

Array = NDArray[Any]

scale = Op(
    "scale",
    "x[...]: real -> y[...]: x",
    attrs={"scale": Attr(float), "bias": Attr(float, 0.0)},
    inplace={"y": "x"},
    source="ggml_scale_bias",
)
"""`scale * x + bias`."""

clamp = Op(
    "clamp",
    "x[...]: real -> y[...]: x",
    attrs={"min": Attr(float), "max": Attr(float)},
    inplace={"y": "x"},
    source="ggml_clamp",
)
"""`max(min(x, max), min)`; a bound may be infinite."""


@scale.reference
def scaled(x: Array, *, scale: float, bias: float) -> Array:
    return x * scale + bias


@clamp.reference
def clamped(x: Array, *, min: float, max: float) -> Array:
    return np.maximum(np.minimum(x, max), min)


@scale.law
def one_and_zero_change_nothing(run: Callable[..., Array], x: Array, **attrs: float) -> None:
    np.testing.assert_array_equal(run(x, scale=1.0, bias=0.0), x)


@clamp.law
def idempotent(run: Callable[..., Array], x: Array, *, min: float, max: float) -> None:
    y = run(x, min=min, max=max)
    np.testing.assert_array_equal(run(y, min=min, max=max), y)
