"""A row of a table added to each row: the biases of the experts that tokens chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tensorgraph.dims import Bindings, evaluate
from tensorgraph.graph import Node
from tensorgraph.op import Op, node_bytes
from tensorgraph.ops.cases import REALS, indices, numbers
from tensorgraph.ops.elementwise.binary import add
from tensorgraph.ops.rows.get_rows import get_rows
from tensorgraph.ops.rows.index import none_of

Array = np.ndarray[Any, Any]

add_id = Op("add_id", "a[*R, N]: real, b[M, N]: real, ids[*R]: int -> y[*R, N]: a", inplace={"y": "a"}, source="ggml_add_id")
"""`y[r, :] = a[r, :] + b[ids[r], :]`; the row -1 adds nothing.

Shapes: a [*R, N], b [M, N], ids [*R] -> [*R, N].
Dtypes: a, b real -> a's; the sum in f32, in f64 where either is.
Raises: InputError, when run, for an index below -1 or not below M.
"""


@add_id.reference
def reference(a: Array, b: Array, ids: Array) -> Array:
    none = none_of("add_id", ids, len(b))
    rows = b[ids] if none is None else np.where(none[..., None], 0.0, b[np.where(none, 0, ids)] if len(b) else 0.0)
    y: Array = a + rows
    return y


@add_id.expand
def expansion(a: Node, b: Node, ids: Node) -> Node:
    flat = get_rows(b, ids.reshape(-1))
    return add(a, flat.reshape(*a.shape))


@add_id.bytes_moved
def bytes_moved(node: Node, dims: Bindings) -> int:
    """The rows taken, not the table."""
    a, b, ids = node.inputs
    taken = evaluate(node.size, dims) * b.dtype.block_bytes
    return taken + node_bytes(a, dims) + node_bytes(ids, dims) + node_bytes(node, dims)


@add_id.law
def nothing_is_added(run: Callable[..., Array], a: Array, b: Array, ids: Array) -> None:
    """By rows of zeros, and by the row -1."""
    np.testing.assert_array_equal(run(a, np.zeros_like(b), ids), a)
    np.testing.assert_array_equal(run(a, b, np.full_like(ids, -1, np.int32)), a)


TABLES = tuple(t for t in REALS if t is not np.float64)
"""Of f64 the expansion is not the op: `get_rows` gives f32."""


@add_id.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rows = draw(st.sampled_from(((), (0,), (1,), (5,), (3, 2), (7, 4))))
    m, n = draw(st.integers(1, 40)), draw(st.sampled_from((0, 1, 3, 8, 33, 130)))
    slots = {"a": numbers(draw, (*rows, n)), "b": numbers(draw, (m, n), TABLES)}
    return slots | {"ids": indices(draw, draw(st.sampled_from((-1, 0))), m, rows)}, {}


@add_id.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    a, b = np.zeros((512, 8, 2048), np.float32), np.zeros((128, 2048), np.float32)
    return [({"a": a, "b": b, "ids": rng.integers(0, len(b), a.shape[:2]).astype(np.int32)}, {})]
