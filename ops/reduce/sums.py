"""Sums: of everything, of rows, of what came before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Op

Array = NDArray[Any]
Run = Callable[..., Array]


def _reduction(name: str, signature: str, formula: Callable[[Array], Array]) -> Op:
    op = Op(name, signature, source=f"ggml_{name}")

    @op.reference
    def reference(x: Array) -> Array:
        return formula(np.ascontiguousarray(x))  # dense, so that the order of summation is the logical one

    @op.flops
    def additions(node: Node) -> Extent:
        return node.inputs[0].size

    return op


sum = _reduction("sum", "x[...]: real -> y[1]: x", lambda x: np.sum(x.reshape(1, -1), axis=1))
"""Of all elements."""
sum_rows = _reduction("sum_rows", "x[..., N]: real -> y[..., 1]: x", lambda x: np.sum(x, axis=-1, keepdims=True))
mean = _reduction(
    "mean", "x[..., N]: real -> y[..., 1]: x", lambda x: np.sum(x, axis=-1, keepdims=True) / np.float64(x.shape[-1])
)
"""Of each row; NaN for rows of no elements."""
cumsum = _reduction("cumsum", "x[..., N]: real -> y[..., N]: x", lambda x: np.cumsum(x, axis=-1))
"""Each element with all that precede it in its row."""


@sum.law
@sum_rows.law
def of_zeros(run: Run, x: Array) -> None:
    assert not run(np.zeros_like(x)).any()


@mean.law
def of_equal_values(run: Run, x: Array) -> None:
    y = run(np.full_like(x, 3)).astype(np.float64)
    np.testing.assert_array_equal(y, np.full((*x.shape[:-1], 1), 3 if x.shape[-1] else np.nan))


@cumsum.law
def begins_with_the_first(run: Run, x: Array) -> None:
    np.testing.assert_array_equal(run(x)[..., :1], x[..., :1])
