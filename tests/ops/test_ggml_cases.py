"""Single ops as ggml's own CPU backend computed them: every case of an op that is here, strides and block types included.

Operands are views with ggml's strides over the bytes that were stored (what lies between is junk), so that a graph's views
are tested with the ops. A result must be within the bound that the index of the cases gives, and, where the index says how
far ggml itself is from the exact value, not farther than a few times that.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Node, constant, input
from tensorgraph.ops.formats import FORMATS
from tensorgraph.views import IndexMap
from tests.ops.evaluate import evaluate
from tests.ops.ggml_adapters import ADAPTERS
from tests.reference import reference_path

Array = np.ndarray[Any, Any]
Case = dict[str, Any]

CASES: list[Case] = json.loads(reference_path("ops/index.json").read_text())["cases"]

NOT_HERE = {
    "count_equal": "training: it counts right answers",
    "timestep_embedding": "images: the time of a step of diffusion",
    "upscale": "images",
    **dict.fromkeys(("im2col", "im2col_3d", "conv_2d", "conv_2d_dw", "conv_3d"), "images and sound: convolutions"),
    **dict.fromkeys(("conv_transpose_1d", "conv_transpose_2d", "col2im_1d"), "images and sound: convolutions"),
    **dict.fromkeys(("pool_1d", "pool_2d"), "images and sound: pooling"),
    **dict.fromkeys(("ssm_conv", "ssm_scan"), "recurrent models: Mamba"),
    **dict.fromkeys(("rwkv_wkv6", "rwkv_wkv7", "gated_linear_attn"), "recurrent models: RWKV"),
    **dict.fromkeys(("gated_delta_net", "solve_tri"), "recurrent models: delta nets"),
}
"""ggml's ops that are not ops here, and why; `tests/data` leaves out the cases of convolutions, images and recurrent models."""

ELSEWHERE = {"rope of images": "images: positions of more than one number"}
"""Why cases of ops that are here are outside."""


def why_not(case: Case) -> str | None:
    """The reason why a case is outside, None where it is covered."""
    if case["op"] in NOT_HERE:
        return "op"
    if case["params"].get("mode") in ("mrope", "imrope", "vision"):
        return "rope of images"
    return None


COVERED = [case for case in CASES if why_not(case) is None]


def test_nothing_is_dropped_silently() -> None:
    assert Counter(map(why_not, CASES)) == {None: 462, "op": 6, "rope of images": 10}
    assert {*filter(None, map(why_not, CASES))} == {"op", *ELSEWHERE}
    assert {case["op"] for case in COVERED} == set(ADAPTERS)
    assert {case["op"] for case in CASES} <= {*ADAPTERS, *NOT_HERE}
    assert not set(NOT_HERE) & {*ADAPTERS, *registry.ops}
    assert set(FORMATS) <= {s["dtype"].lower() for case in COVERED for s in case["srcs"]}


@cache
def _arrays(file: str) -> dict[str, Array]:
    with np.load(reference_path(f"ops/{file}")) as stored:
        return dict(stored)


def operand(source: dict[str, Any], raw: Array) -> tuple[Node, Array]:
    """One operand: a view with its strides of a flat input, or a block-typed constant; and the array to bind."""
    name, dtype, shape, strides = source["name"], as_dtype(source["dtype"]), source["numpy_shape"], source["numpy_strides_bytes"]
    if dtype.is_block:
        row_bytes = dtype.size_bytes(shape[-1])
        rows = np.lib.stride_tricks.as_strided(raw, (*shape[:-1], row_bytes), (*strides[:-1], 1), writeable=False)
        return constant(name, shape=shape, dtype=dtype), rows
    assert dtype.numpy is not None
    item = dtype.numpy.itemsize
    flat = input(name, [raw.size // item], dtype)
    index_map = IndexMap(tuple(shape), tuple(s // item for s in strides))
    return Node("view", (flat,), index_map.shape, dtype, {"map": index_map}, ("x",)), raw.view(dtype.numpy)


def nmse(got: Array, want: Array) -> float:
    """Squared error relative to the squared values; infinite values must be the same ones."""
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    got, want = got[finite].astype(np.float64), want[finite].astype(np.float64)
    return float(np.sum((got - want) ** 2) / max(float(np.sum(want**2)), 1e-30))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", COVERED, ids=lambda case: case["id"])
def test_case(case: Case, backend: str) -> None:
    stored = _arrays(case["file"])
    operands = {s["name"]: operand(s, stored[s["raw_key"]]) for s in case["srcs"]}
    result = ADAPTERS[case["op"]](case, {name: node for name, (node, _) in operands.items()})
    assert result.dtype == as_dtype(case["out"]["dtype"])
    arrays = {name: array for name, (_, array) in operands.items()}
    got = evaluate(result, arrays, backend)
    want, compare = stored[case["out"]["key"]], case["compare"]
    decoded = {s["name"]: stored[s["decoded_key"]] for s in case["srcs"]}
    assert got.shape == want.shape == tuple(case["out"]["numpy_shape"])
    if compare["kind"] == "exact":
        np.testing.assert_array_equal(got.astype(want.dtype), want)
    elif compare["kind"] == "set_per_row":
        assert_same_selection(got, want, decoded["x"])
    elif compare["kind"] == "quantised":
        assert nmse(got, unquantised(case, decoded)) <= compare["suggested_max_nmse_vs_unquantised"]
    else:
        rounding = float(ml_dtypes.finfo(result.dtype.numpy).eps) ** 2  # type: ignore[no-untyped-call]
        bound = min(compare["suggested_max_nmse"], 4 * case["nmse_ggml_vs_float64"] + rounding)
        assert nmse(got, want) <= bound


def assert_same_selection(got: Array, want: Array, x: Array) -> None:
    """The same values in every row, at distinct places."""
    assert all(len(set(row)) == len(row) for row in got.reshape(-1, got.shape[-1]).tolist())
    picked = (np.sort(np.take_along_axis(x, ids.astype(np.int64), axis=-1)) for ids in (got, want))
    np.testing.assert_array_equal(*picked)


def unquantised(case: Case, decoded: dict[str, Array]) -> Array:
    """What a result of a block type would be if nothing were rounded."""
    if case["op"] == "cpy":
        return decoded["src"].reshape(decoded["dst"].shape)
    result, rows = decoded["dst"].copy(), decoded["rows"][0]
    n3, n2, n_rows, _ = decoded["src"].shape
    for i3, i2, r in np.ndindex(n3, n2, n_rows):
        result[i3, i2, rows[i3 % rows.shape[0], i2 % rows.shape[1], r]] = decoded["src"][i3, i2, r]
    return result
