"""Where the largest element of each row stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Op
from tensorgraph.ops.select.argsort import draw_rows

Array = np.ndarray[Any, Any]

argmax = Op("argmax", "x[..., N]: float -> y[...]: i32", rows=(), tolerance=0.0, source="ggml_argmax, with NaN defined")
"""The index of the largest element of each row; of equal ones the highest, unlike `top_k` and `argsort`.

NaN is passed over; -1 where a row has no number.
Shapes: x [..., N] -> [...].
"""


@argmax.reference
def reference(x: Array) -> Array:
    n = x.shape[-1]
    if n == 0:
        return np.full(x.shape[:-1], -1, np.int32)
    number = ~np.isnan(x)
    peak = np.max(np.where(number, x, -np.inf), -1, keepdims=True)
    y: Array = np.max(np.where(number & (x == peak), np.arange(n), -1), -1)
    return y.astype(np.int32)


@argmax.flops
def flops(node: Node) -> Extent:
    return node.inputs[0].size


@argmax.law
def nothing_later_is_as_large(run: Callable[..., Array], x: Array) -> None:
    found = run(x)
    for row, at in zip(x.reshape(found.size, x.shape[-1]), found.reshape(-1).tolist(), strict=True):
        numbers = [(float(v), i) for i, v in enumerate(row) if v == v]
        assert at == max(numbers, default=(0.0, -1))[1]


@argmax.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    x, nan = draw_rows(draw), draw(st.sampled_from((0.0, 0.1, 1.0)))
    x[np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(x.shape) < nan] = np.nan
    return {"x": x}, {}
