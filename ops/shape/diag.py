"""Rows as the diagonals of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Op
from tensorgraph.ops.cases import ANY, numbers

Array = NDArray[Any]

diag = Op("diag", "x[..., 1, N]: any -> y[..., N, N]: x", rows=(), source="ggml_diag")
"""`y[..., i, i] = x[..., 0, i]`, and zeros beside.

Shapes: x [..., 1, N] -> [..., N, N].
"""


@diag.reference
def reference(x: Array) -> Array:
    n = x.shape[-1]
    y = np.zeros((*x.shape[:-2], n, n), x.dtype)
    y[..., np.arange(n), np.arange(n)] = x[..., 0, :]
    return y


@diag.flops
def none(node: Node) -> Extent:
    return 0


@diag.law
def rows_and_columns_hold_one_number(run: Callable[..., Array], x: Array) -> None:
    y = run(x)
    np.testing.assert_array_equal(y.sum(-2, keepdims=True, dtype=x.dtype), x)
    np.testing.assert_array_equal(y, np.swapaxes(y, -1, -2))


@diag.cases
def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    lead = draw(st.sampled_from(((), (0,), (1,), (4,), (2, 3))))
    return {"x": numbers(draw, (*lead, 1, draw(st.sampled_from((0, 1, 2, 5, 17, 64)))), ANY)}, {}


@diag.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({"x": np.zeros((4, 1, 2048), np.float32)}, {})]
