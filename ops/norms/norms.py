"""Normalisations over the last axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op

Array = NDArray[Any]
Run = Callable[..., Array]

rms_norm = Op(
    "rms_norm",
    "x[..., D]: real, weight[D]?: real -> y[..., D]: x",
    attrs={"eps": Attr(float, low=0.0)},
    inplace={"y": "x"},
    source="arXiv:1910.07467",
)
"""`x / sqrt(mean(x^2) + eps) * weight`; a row of zeros with eps = 0 gives NaN."""

norm = Op(
    "norm",
    "x[..., D]: real, weight[D]?: real, bias[D]?: real -> y[..., D]: x",
    attrs={"eps": Attr(float, low=0.0)},
    inplace={"y": "x"},
    source="arXiv:1607.06450",
)
"""`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, with the biased variance; equal elements with eps = 0 give NaN."""


l1_norm = Op(
    "l1_norm",
    "x[..., D]: real -> y[..., D]: x",
    attrs={"eps": Attr(float, low=0.0)},
    inplace={"y": "x"},
    source="torch.nn.functional.normalize (p = 1) with eps added",
)
"""`x / (sum(|x|) + eps)`; a row of zeros with eps = 0 gives NaN."""


l2_norm = Op(
    "l2_norm",
    "x[..., D]: real -> y[..., D]: x",
    attrs={"eps": Attr(float, low=0.0)},
    inplace={"y": "x"},
    source="ggml_l2_norm",
)
"""`x / max(sqrt(sum(x^2)), eps)`; a row of zeros with eps = 0 gives NaN."""


def _mean(x: Array) -> Array:
    total: Array = np.sum(x, axis=-1, keepdims=True)
    return total / np.float64(x.shape[-1])


@rms_norm.reference
def rms(x: Array, weight: Array | None, *, eps: float) -> Array:
    x = np.ascontiguousarray(x)  # dense, so that the order of summation is the logical one
    y: Array = x / np.sqrt(_mean(x * x) + eps)
    return y if weight is None else y * weight


@norm.reference
def standard(x: Array, weight: Array | None, bias: Array | None, *, eps: float) -> Array:
    x = np.ascontiguousarray(x)
    alike = (x == x[..., :1]).all(-1, keepdims=True)  # no variance, however the mean is rounded
    centred = x - np.where(alike, x[..., :1], _mean(x))
    y: Array = centred / np.sqrt(_mean(centred * centred) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@l1_norm.reference
def unit_sum(x: Array, *, eps: float) -> Array:
    x = np.ascontiguousarray(x)
    y: Array = x / (np.sum(np.abs(x), axis=-1, keepdims=True) + np.float64(eps))
    return y


@l2_norm.reference
def unit_length(x: Array, *, eps: float) -> Array:
    x = np.ascontiguousarray(x)
    y: Array = x / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), eps)
    return y


@l1_norm.flops
def three_an_element(node: Node) -> Extent:
    return 3 * node.size


@rms_norm.flops
@l2_norm.flops
def four_an_element(node: Node) -> Extent:
    return 4 * node.size


@norm.flops
def seven_an_element(node: Node) -> Extent:
    return 7 * node.size


@rms_norm.law
def unit_root_mean_square(run: Run, x: Array, *_: Array | None, eps: float) -> None:
    y = run(x, eps=eps).astype(np.float64)
    unit = float(ml_dtypes.finfo(x.dtype).eps)  # type: ignore[no-untyped-call]
    assert not np.any(np.sum(y * y, -1) > y.shape[-1] * (1 + 4 * unit))


@l1_norm.law
def magnitudes_add_to_one_at_most(run: Run, x: Array, *, eps: float) -> None:
    y = run(x, eps=eps).astype(np.float64)
    unit = float(ml_dtypes.finfo(x.dtype).eps)  # type: ignore[no-untyped-call]
    assert not np.any(np.sum(np.abs(y), -1) > 1 + 4 * unit)


@l2_norm.law
def no_longer_than_one(run: Run, x: Array, *, eps: float) -> None:
    y = run(x, eps=eps).astype(np.float64)
    unit = float(ml_dtypes.finfo(x.dtype).eps)  # type: ignore[no-untyped-call]
    assert not np.any(np.sum(y * y, -1) > 1 + 4 * unit)


@norm.law
def weight_and_bias_come_last(run: Run, x: Array, *_: Array | None, eps: float) -> None:
    y = run(x, np.zeros_like(x, shape=x.shape[-1:]), np.ones_like(x, shape=x.shape[-1:]), eps=eps)
    assert np.all((y == 1) | np.isnan(y))
