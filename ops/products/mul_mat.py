"""Matrix product with the weights first, as ggml's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Extent, Shape, divide_exact, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Op
from tensorgraph.ops.cases import a_type
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]

_SIGNATURE = "a[*A, M, K]: float, b[*B, N, K]: float -> y[*B, N, M]: f32"
_BOUND = Signature.parse(_SIGNATURE)

mul_mat = Op("mul_mat", _SIGNATURE, rows=("b",), source="ggml_mul_mat")
"""`b @ a.T`, with a the weights.

Shapes: a [*A, M, K], b [*B, N, K] -> [*B, N, M]. Batch axes are matched from the right; each of b's is a multiple of
a's, and a repeats blockwise: neighbouring batches of b share one a (grouped heads).
Dtypes: any float -> f32; sums in f32.
"""


@mul_mat.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    found = _BOUND.infer("mul_mat", slots, attrs)
    mine, batch = slots["a"].shape[:-2], slots["b"].shape[:-2]
    fits = len(mine) <= len(batch)
    for few, many in zip(reversed(mine), reversed(batch), strict=False):
        fits = fits and divide_exact(many, few) is not None
    if not fits:
        given = f"b {shape_text(slots['b'].shape)} for a {shape_text(slots['a'].shape)}"
        raise ShapeError(f"[mul_mat] b's batch axes must be multiples of a's; got {given} ({source_line()})")
    return found


@mul_mat.reference
def reference(a: Array, b: Array) -> Array:
    if a.dtype != b.dtype:
        b = b.astype(a.dtype)  # a weight kept in f32 is never copied
    a, b = blas_ready(a), blas_ready(b)
    if a.ndim == 2:
        if b.ndim == 2:
            return b @ a.T
        rows = math.prod(b.shape[:-1])
        return (b.reshape(rows, b.shape[-1]) @ a.T).reshape(*b.shape[:-1], a.shape[0])
    batch = b.shape[:-2]
    mine = (1,) * (b.ndim - a.ndim) + a.shape[:-2]
    if mine != batch:  # batch axis n of b is split into [m, n / m]: a has m of them
        b = b.reshape(*(e for m, n in zip(mine, batch, strict=True) for e in (m, n // max(m, 1))), *b.shape[-2:])
        a = a.reshape(*(e for m in mine for e in (m, 1)), *a.shape[-2:])
    y = b @ a.swapaxes(-1, -2)
    return y.reshape(*batch, *y.shape[-2:])


def blas_ready(x: Array) -> Array:
    """Matrices whose rows or columns are adjacent in memory, as BLAS reads them; NumPy's loop for others is slow."""
    row, column, item = x.strides[-2], x.strides[-1], x.itemsize
    by_rows = column == item and row >= x.shape[-1] * item
    by_columns = row == item and column >= x.shape[-2] * item
    return x if by_rows or by_columns else np.ascontiguousarray(x)


@mul_mat.flops
def flops(node: Node) -> Extent:
    return node.size * node.inputs[0].shape[-1] * 2


@mul_mat.law
def linear(run: Callable[..., Array], a: Array, b: Array) -> None:
    """Doubling b doubles the product, exactly: a power of two rounds nothing."""
    np.testing.assert_array_equal(run(a, b + b), 2 * run(a, b))


@mul_mat.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n = draw(st.sampled_from((0, 1, 2, 7, 16, 17, 33, 64))), draw(st.sampled_from((0, 1, 2, 7, 8, 9, 17, 65)))
    k = draw(st.sampled_from((0, 1, 2, 7, 17, 32, 64, 96, 256, 512)))  # whole blocks among them
    mine = draw(st.sampled_from(((), (1,), (2,), (3, 2))))
    batch = [e * draw(st.sampled_from((1, 2, 3))) for e in mine]
    batch = draw(st.sampled_from(((), (2,)))) + tuple(batch)
    size = draw(st.sampled_from((1e-12, 1.0, 1e12)))
    a = (rng.standard_normal((*mine, m, k)) * size).astype(a_type(draw) if size == 1 else np.float32)
    return {
        "a": a,
        "b": rng.standard_normal((*batch, n, k)).astype(a_type(draw)),
    }, {}


@mul_mat.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    """One new token, and many."""
    a = np.zeros((4096, 4096), np.float32)
    return [({"a": a, "b": np.zeros((n, 4096), np.float32)}, {}) for n in (1, 512)]
