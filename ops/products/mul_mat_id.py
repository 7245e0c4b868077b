"""Matrix product with a matrix chosen per row: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Bindings, Extent, Shape, evaluate, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import InputError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Op, node_bytes
from tensorgraph.ops.cases import a_type, indices
from tensorgraph.ops.products.mul_mat import blas_ready
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]

_SIGNATURE = "a[E, M, K]: float, b[T, B, K]: float, ids[T, U]: int -> y[T, U, M]: f32"
_BOUND = Signature.parse(_SIGNATURE)

mul_mat_id = Op("mul_mat_id", _SIGNATURE, source="ggml_mul_mat_id")
"""`y[t, u] = a[ids[t, u]] @ b[t, u]`, with a the weights of all experts; the expert -1 gives zeros.

Shapes: a [E, M, K], b [T, U, K] or [T, 1, K] (one row for all experts of a token), ids [T, U] -> [T, U, M].
Dtypes: any float -> f32; sums in f32.
Raises: InputError, when run, for an id below -1 or not below E.
"""


@mul_mat_id.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    found = _BOUND.infer("mul_mat_id", slots, attrs)
    b, ids = slots["b"].shape, slots["ids"].shape
    if b[1] != 1 and b[1] != ids[1]:
        wanted = f"[{b[0]}, {ids[1]} or 1, {b[2]}], as ids is {shape_text(ids)}"
        raise ShapeError(f"[mul_mat_id] b must be {wanted}; got {shape_text(b)} ({source_line()})")
    return found


@mul_mat_id.reference
def reference(a: Array, b: Array, ids: Array) -> Array:
    if a.dtype != b.dtype:
        b = b.astype(a.dtype)  # as mul_mat
    n_tokens, n_used = ids.shape
    y = np.zeros((n_tokens * n_used, a.shape[1]), a.dtype)
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    experts, starts = np.unique(flat[order], return_index=True)
    if experts.size and (experts[0] < -1 or experts[-1] >= len(a)):
        given = experts[0] if experts[0] < -1 else experts[-1]
        raise InputError(f"[mul_mat_id] ids must be below {len(a)}, or -1 for none; got {given}")
    for expert, rows in zip(experts.tolist(), np.split(order, starts)[1:], strict=True):
        if expert >= 0:
            tokens, used = np.divmod(rows, n_used)
            y[rows] = b[tokens, used if b.shape[1] != 1 else 0] @ blas_ready(a[expert]).T
    return y.reshape(n_tokens, n_used, a.shape[1])


@mul_mat_id.flops
def flops(node: Node) -> Extent:
    return node.size * node.inputs[0].shape[2] * 2


@mul_mat_id.bytes_moved
def bytes_moved(node: Node, dims: Bindings) -> int:
    """Each expert once, as many as can be chosen at most."""
    experts, rows, ids = node.inputs
    n_experts = evaluate(experts.shape[0], dims)
    chosen = min(evaluate(ids.size, dims), n_experts)
    weights = node_bytes(experts, dims) * chosen // max(n_experts, 1)
    return weights + sum(node_bytes(n, dims) for n in (rows, ids, node))


@mul_mat_id.law
def tokens_are_independent(run: Callable[..., Array], a: Array, b: Array, ids: Array) -> None:
    """A token that has no expert gives zeros and changes no other token."""
    if len(ids):
        none = ids.astype(np.int32)
        none[0] = -1
        full, rest = run(a, b, ids), run(a, b, none)
        np.testing.assert_array_equal(rest[0], np.zeros_like(rest[0]))
        np.testing.assert_allclose(rest[1:], full[1:], rtol=1e-4, atol=1e-5 * np.abs(full).max(initial=0.0))


@mul_mat_id.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_experts, n_used, n_tokens = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(0, 6))
    m, k = draw(st.sampled_from((1, 7, 16, 33))), draw(st.sampled_from((1, 8, 31, 32, 64, 256)))
    ids = indices(draw, draw(st.sampled_from((-1, 0))), n_experts, (n_tokens, n_used))
    a = rng.standard_normal((n_experts, m, k)).astype(a_type(draw))
    b = rng.standard_normal((n_tokens, draw(st.sampled_from((1, n_used))), k)).astype(a_type(draw))
    return {"a": a, "b": b, "ids": ids}, {}


@mul_mat_id.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    """Eight of 32 experts, of one new token and of many."""
    a = np.zeros((32, 1024, 2048), np.float32)

    def chosen(n_tokens: int) -> Array:
        return np.argsort(rng.random((n_tokens, 32)), axis=1)[:, :8].astype(np.int32)

    return [({"a": a, "b": np.zeros((n, 1, 2048), np.float32), "ids": chosen(n)}, {}) for n in (1, 256)]
