"""The largest elements of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import a_type

Array = np.ndarray[Any, Any]

_SORTED_WHOLE = 1024  # rows up to this length are sorted; longer ones are first cut to the candidates

top_k = Op(
    "top_k",
    "x[..., N]: float -> y[..., k]: i32",
    attrs={"k": Attr(int, low=1)},
    tolerance=0.0,
    source="ggml_top_k, with the order and the ties defined",
)
"""Indices of the k largest elements of each row, largest first; of equal ones the lower index first.

-inf and NaN are never selected. Places left over are -1, also where the row is shorter than k.
Shapes: x [..., N] -> [..., k].
"""


@top_k.reference
def reference(x: Array, *, k: int) -> Array:
    n = x.shape[-1]
    rows = np.where(np.isnan(x), -np.inf, x).reshape(int(np.prod(x.shape[:-1])), n)
    y = np.full((len(rows), k), -1, np.int32)
    kept = min(k, n)
    if n <= max(_SORTED_WHOLE, k):
        order = np.argsort(-rows, -1, kind="stable")[:, :kept]
        y[:, :kept] = np.where(np.take_along_axis(rows, order, -1) > -np.inf, order, -1)
    else:
        for row, out in zip(rows, y, strict=True):
            least = np.partition(row, n - k)[n - k]  # the k-th largest
            candidates = np.flatnonzero(row >= least) if least > -np.inf else np.flatnonzero(row > -np.inf)
            chosen = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
            out[: len(chosen)] = chosen
    return y.reshape(*x.shape[:-1], k)


@top_k.flops
def flops(node: Node) -> Extent:
    return node.inputs[0].size


@top_k.law
def selects(run: Callable[..., Array], x: Array, *, k: int) -> None:
    """Nothing left out ranks above anything selected, and the selected stand in order."""
    ids = run(x, k=k)
    chosen_rows = ids.reshape(-1, k)
    for row, chosen in zip(x.reshape(len(chosen_rows), x.shape[-1]), chosen_rows, strict=True):
        able = [int(i) for i in np.flatnonzero(~np.isnan(row) & (row > -np.inf))]
        ranked = sorted(able, key=lambda i, row=row: (-float(row[i]), i))[:k]  # type: ignore[misc]
        assert chosen.tolist() == ranked + [-1] * (k - len(ranked))


@top_k.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = draw(st.sampled_from(((), (0,), (1,), (4,), (2, 3))))
    n = draw(st.sampled_from((0, 1, 5, 16, 64, 257, 1500)))
    x = rng.standard_normal((*lead, n))
    if draw(st.booleans()):
        x = np.maximum(np.round(x), 0)  # as a ReLU leaves them: ties
    x[rng.random(x.shape) < draw(st.sampled_from((0.0, 0.3, 0.95)))] = -np.inf
    if draw(st.booleans()):
        x[rng.random(x.shape) < 0.1] = np.nan
        x[rng.random(x.shape) < 0.1] = np.inf
    return {"x": x.astype(a_type(draw))}, {"k": draw(st.sampled_from((1, 2, 7, 32, 300)))}


@top_k.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    """Experts of many tokens, and rows of a long context."""
    shapes = ((65536, 256), 8), ((256, 65536), 512)
    return [({"x": np.zeros(shape, np.float32)}, {"k": k}) for shape, k in shapes]
