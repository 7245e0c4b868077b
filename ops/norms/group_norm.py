"""Normalisation over groups of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import a_type, at_times_long

Array = NDArray[Any]

group_norm = Op(
    "group_norm",
    "x[..., C, H, W]: real -> y[..., C, H, W]: x",
    attrs={"n_groups": Attr(int, low=1), "eps": Attr(float, low=0.0)},
    inplace={"y": "x"},
    rows=(),
    source="arXiv:1803.08494, as ggml_group_norm",
)
"""`(x - mean) / sqrt(var + eps)` over H, W and the channels of a group, with the biased variance.

A group is ceil(C / n_groups) channels in a row; the last one may be shorter, and there may be fewer than n_groups. A group whose
elements are all equal gives NaN where eps = 0.

Shapes: x [..., C, H, W] -> [..., C, H, W].
"""


@group_norm.reference
def reference(x: Array, *, n_groups: int, eps: float) -> Array:
    *lead, channels, height, width = x.shape
    each, y = -(-channels // n_groups), np.empty(x.shape)
    for start in range(0, channels, max(each, 1)):
        part = x[..., start : start + each, :, :]
        size = part.shape[-3] * height * width
        flat = np.ascontiguousarray(part).reshape(*lead, size)  # dense, so that the order of summation is the logical one
        centred = flat - np.sum(flat, axis=-1, keepdims=True) / np.float64(size)
        square = np.sum(centred * centred, axis=-1, keepdims=True) / np.float64(size)
        y[..., start : start + each, :, :] = (centred / np.sqrt(square + eps)).reshape(part.shape)
    return y


@group_norm.flops
def seven_an_element(node: Node) -> Extent:
    return 7 * node.size


@group_norm.law
def groups_stand_alone(run: Callable[..., Array], x: Array, *, n_groups: int, eps: float) -> None:
    """What is in the first group changes nothing in the others."""
    first = slice(0, -(-x.shape[-3] // n_groups))
    changed, y = x.copy(), run(x, n_groups=n_groups, eps=eps).astype(np.float64)
    changed[..., first, :, :] = 1
    z = run(changed, n_groups=n_groups, eps=eps).astype(np.float64)
    np.testing.assert_array_equal(z[..., first.stop :, :, :], y[..., first.stop :, :, :])
    np.testing.assert_array_equal(z[..., first, :, :], np.full_like(z[..., first, :, :], 0 if eps else np.nan))


@group_norm.cases
def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = draw(st.sampled_from(((), (0,), (1,), (3,), (2, 2))))
    channels, height = draw(st.sampled_from((0, 1, 2, 5, 12))), draw(st.sampled_from((0, 1, 3)))
    x = rng.standard_normal(at_times_long(draw, (*lead, channels, height, draw(st.sampled_from((0, 1, 4, 8, 17))))))
    x = x * 10.0 ** draw(st.integers(-3, 3)) + draw(st.sampled_from((0.0, 1.0, 30.0)))
    attrs = {"n_groups": draw(st.sampled_from((1, 2, 3, 4, 12))), "eps": draw(st.sampled_from((0.0, 1e-6, 0.5)))}
    return {"x": x.astype(a_type(draw))}, attrs


@group_norm.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({"x": np.zeros((2, 320, 128, 128), np.float32)}, {"n_groups": 32, "eps": 1e-6})]
