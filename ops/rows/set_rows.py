"""Rows written by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Extent, Shape, divide_exact, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import DTypeError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import INTS, THOUSANDS, a_type, at_times_long
from tensorgraph.ops.formats import block_format, decode, encode
from tensorgraph.ops.rows.index import none_of
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]

_SIGNATURE = "a[*B, M, N]: any, b[*B, R, N]: any, ids[*C, R]: int -> y[*B, M, N]: a"
_BOUND = Signature.parse(_SIGNATURE)

set_rows = Op("set_rows", _SIGNATURE, attrs={"block": Attr(DType, None)}, inplace={"y": "a"}, source="ggml_set_rows")
"""A copy of a (the destination) in which `y[..., ids[..., r], :] = b[..., r, :]`; the row -1 is not written.

The rows of one batch are distinct. `block` is a's own type where that is a block type, and follows from a.

Shapes: a [*B, M, N], b [*B, R, N], ids [*C, R] (batch axes tiled to *B, matched from the right) -> a's.
Dtypes: a any that can be written -> a's; b any float, rounded to a's, or a's own where that is none.
Raises: DTypeError: a's block type is only read, or b is of another kind. InputError, when run, for an index below -1 or not
below M.
"""


@set_rows.prepare
def prepare(a: Node, b: Node, ids: Node) -> tuple[dict[str, Node | None], dict[str, Any]]:
    return {"a": a, "b": b, "ids": ids}, {"block": a.dtype if a.dtype.is_block else None}


@set_rows.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    found = _BOUND.infer("set_rows", slots, attrs)
    dtype = slots["a"].dtype
    if dtype.is_block and block_format(dtype).encode is None:
        raise DTypeError(f"[set_rows] a must be of a type that can be written; {dtype} is only read ({source_line()})")
    if not (dtype.is_float and slots["b"].dtype.is_float) and slots["b"].dtype != dtype:
        wanted = "float" if dtype.is_float else f"{dtype}, as a"
        raise DTypeError(f"[set_rows] b must be {wanted}; got {slots['b'].dtype} ({source_line()})")
    batch, mine = slots["a"].shape[:-2], slots["ids"].shape[:-1]
    fits = len(mine) <= len(batch)
    for few, many in zip(reversed(mine), reversed(batch), strict=False):
        fits = fits and divide_exact(many, few) is not None
    if not fits:
        given = f"ids {shape_text(slots['ids'].shape)} for a {shape_text(slots['a'].shape)}"
        raise ShapeError(f"[set_rows] a's batch axes must be multiples of ids'; got {given} ({source_line()})")
    return found


@set_rows.reference
def reference(a: Array, b: Array, ids: Array, *, block: DType | None) -> Array:
    none = none_of("set_rows", ids, a.shape[-2])
    if block is not None:
        b = decode(encode(b, block), block)
    y = a.copy()
    if a.ndim == 2 and none is None:
        y[ids] = b
        return y
    batch = a.shape[:-2]
    mine = (1,) * (len(batch) - ids.ndim + 1) + ids.shape[:-1]
    ids = np.tile(ids, [n // max(m, 1) for n, m in zip(batch, mine, strict=True)] + [1])
    at = np.nonzero(ids >= 0)
    y[(*at[:-1], ids[at])] = b[at]
    return y


@set_rows.flops
def flops(node: Node) -> Extent:
    return 0


@set_rows.law
def nothing_written(run: Callable[..., Array], a: Array, b: Array, ids: Array, **attrs: Any) -> None:
    """Rows of -1 leave everything as it was."""
    np.testing.assert_array_equal(run(a, b, np.full_like(ids, -1, np.int32)), a)


@set_rows.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mine = draw(st.sampled_from(((), (1,), (2,), (1, 2))))
    batch = [n * draw(st.sampled_from((1, 3))) for n in mine]
    m, n = at_times_long(draw, (draw(st.integers(1, 20)), draw(st.sampled_from((0, 1, 5, 32)))))
    r = m if m in THOUSANDS else draw(st.integers(0, m))
    ids = np.argsort(rng.random((*mine, m)), -1)[..., :r]
    a, b = (rng.standard_normal((*batch, rows, n)) * 100 for rows in (m, r))
    types = ((np.float32, np.float32), (np.float16, np.float32), (np.float16, np.float64), (np.float32, np.float16))
    kinds = draw(st.sampled_from((*types, *((t, t) for t in (np.float64, np.int32, np.int64, np.int8, np.bool_)))))
    ids = ids.astype(a_type(draw, [t for t in INTS if m <= np.iinfo(t).max]))
    return {"a": a.astype(kinds[0]), "b": b.astype(kinds[1]), "ids": ids}, {}


@set_rows.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    table, rows = np.zeros((8192, 2048), np.float32), np.zeros((2048, 2048), np.float32)
    return [({"a": table, "b": rows, "ids": rng.permutation(len(table))[: len(rows)].astype(np.int32)}, {})]
