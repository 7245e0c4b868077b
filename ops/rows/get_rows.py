"""Rows by number: embeddings, and anything else that is looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Bindings, Extent, Shape, evaluate
from tensorgraph.dtypes import DType, f32, i32, i64
from tensorgraph.errors import DTypeError
from tensorgraph.graph import Node
from tensorgraph.op import Op, node_bytes
from tensorgraph.ops.cases import INTS, REALS, at_times_long, indices, numbers
from tensorgraph.ops.rows.index import none_of
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]

_SIGNATURE = "a[*B, M, N]: any, ids[*B, R]: int -> y[*B, R, N]: f32"
_BOUND = Signature.parse(_SIGNATURE)

get_rows = Op("get_rows", _SIGNATURE, tolerance=0.0, source="ggml_get_rows")
"""`y[..., r, :] = a[..., ids[..., r], :]`; the row -1 is zeros.

Shapes: a [*B, M, N], ids [*B, R] -> [*B, R, N].
Dtypes: a any float -> f32, exactly but for f64; i64 -> i64, other ints -> i32.
Raises: InputError, when run, for an index below -1 or not below M.
"""


@get_rows.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    found, _ = _BOUND.infer("get_rows", slots, attrs)
    dtype = slots["a"].dtype
    if not (dtype.is_float or dtype.kind == "int"):
        raise DTypeError(f"[get_rows] a must be float or int; got {dtype} ({source_line()})")
    return found, f32 if dtype.is_float else i64 if dtype == i64 else i32


@get_rows.reference
def reference(a: Array, ids: Array) -> Array:
    none = none_of("get_rows", ids, a.shape[-2])
    if none is None:
        return a[ids] if a.ndim == 2 else np.take_along_axis(a, ids[..., None], -2)
    y = np.zeros((*ids.shape, a.shape[-1]), a.dtype)
    at = np.nonzero(~none)
    y[at] = a[(*at[:-1], ids[at])]
    return y


@get_rows.flops
def flops(node: Node) -> Extent:
    return 0


@get_rows.bytes_moved
def bytes_moved(node: Node, dims: Bindings) -> int:
    """The rows taken, not the table."""
    table, ids = node.inputs
    taken = evaluate(node.size, dims) * table.dtype.block_bytes // table.dtype.block_size
    return taken + node_bytes(ids, dims) + node_bytes(node, dims)


@get_rows.law
def repeats(run: Callable[..., Array], a: Array, ids: Array) -> None:
    """Asking twice gives the same rows twice."""
    np.testing.assert_array_equal(run(a, np.concatenate([ids, ids], -1)), np.concatenate([run(a, ids)] * 2, -2))


@get_rows.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    batch = draw(st.sampled_from(((), (1,), (2,), (2, 3))))
    m, n, r = draw(st.integers(1, 40)), draw(st.sampled_from((0, 1, 3, 8, 33, 64, 256))), draw(st.integers(0, 9))
    *batch, r, n = at_times_long(draw, (*batch, r, n))
    a = numbers(draw, (*batch, m, n), (*REALS, *INTS), 100.0)
    return {"a": a, "ids": indices(draw, draw(st.sampled_from((-1, 0))), m, (*batch, r))}, {}


@get_rows.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    table = np.zeros((16384, 2048), np.float32)
    return [({"a": table, "ids": rng.integers(0, len(table), 8192).astype(np.int32)}, {})]
