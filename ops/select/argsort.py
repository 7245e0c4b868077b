"""The order of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import a_type

Array = np.ndarray[Any, Any]

argsort = Op(
    "argsort",
    "x[..., N]: float -> y[..., N]: i32",
    attrs={"descending": Attr(bool, False)},
    tolerance=0.0,
    source="ggml_argsort, with the ties defined",
)
"""Indices that sort each row; of equal elements the lower index first in both directions, NaN last in both.

Shapes: x [..., N] -> [..., N].
"""


@argsort.reference
def reference(x: Array, *, descending: bool) -> Array:
    return np.argsort(-x if descending else x, -1, kind="stable").astype(np.int32)


@argsort.law
def sorts(run: Callable[..., Array], x: Array, *, descending: bool) -> None:
    """Every index once, in the order of the elements."""
    order = run(x, descending=descending)
    if x.shape[-1]:
        rows = zip(x.reshape(-1, x.shape[-1]), order.reshape(-1, x.shape[-1]), strict=True)
        for row, got in rows:
            ranked = sorted(range(len(row)), key=lambda i, row=row: float(-row[i] if descending else row[i]))  # type: ignore[misc]
            assert got.tolist() == ranked


def draw_rows(draw: Any) -> Array:
    """Rows of normal numbers, maybe with ties, and some of what sorts apart."""
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = draw(st.sampled_from(((), (0,), (1,), (4,), (2, 3))))
    x = rng.standard_normal((*lead, draw(st.sampled_from((0, 1, 2, 17, 64, 300)))))
    if draw(st.booleans()):
        x = np.round(x)
    x[rng.random(x.shape) < 0.05] = draw(st.sampled_from((0.0, np.inf, -np.inf)))
    return x.astype(a_type(draw))


@argsort.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    return {"x": draw_rows(draw)}, {"descending": draw(st.booleans())}
