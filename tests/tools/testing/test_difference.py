"""How far arrays are apart, against formulas written out; what an array is like."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Graph, constant, input
from tensorgraph.ops import get_rows, mul_mat, top_k
from tensorgraph.tools.testing import Limits, Statistics
from tensorgraph.tools.testing.definition import dithered
from tensorgraph.tools.testing.difference import FIXED_STEPS, difference, steps_of

Array = np.ndarray[Any, Any]

FLOATS = npst.arrays(np.float32, npst.array_shapes(max_dims=3, max_side=5), elements=st.floats(-8, 8, width=32))


@given(FLOATS, st.integers(0, 1000))
def test_nmse_is_squared_error_over_squared_size(wanted: Array, seed: int) -> None:
    got = wanted + np.random.default_rng(seed).standard_normal(wanted.shape).astype(np.float32)
    found = difference(got, wanted)
    error, size = (got.astype(np.float64) - wanted) ** 2, wanted.astype(np.float64) ** 2
    if size.sum() > 1e-6:
        assert found.nmse == pytest.approx(error.sum() / size.sum(), rel=1e-9)
        assert found.peak == pytest.approx(np.sqrt(error.max() / size.mean()), rel=1e-9)
    assert found.at == tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    assert (found.got, found.wanted) == (got[found.at], wanted[found.at])


@given(FLOATS)
def test_what_is_equal_does_not_differ(x: Array) -> None:
    x.reshape(-1)[:1] = np.nan
    x.reshape(-1)[1:2] = -np.inf
    for array in (x, x.astype(np.float16), x.astype(ml_dtypes.bfloat16), np.nan_to_num(x, neginf=-9).astype(np.int32), x > 0):
        found = difference(array, np.array(array))
        assert (found.nmse, found.peak) == (0, 0) and not found.beyond(0.0)


@pytest.mark.parametrize("other", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_elsewhere_differ_beyond_measure(other: float) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y = np.array(x)
    y[1, 1] = other
    for found in (difference(x, y), difference(y, x)):
        assert found.nmse == math.inf and found.at == (1, 1) and found.beyond(1e300)
    assert difference(y, -y).nmse == (math.inf if math.isinf(other) else pytest.approx(4.0))


def test_whole_numbers_differ_by_how_many_do() -> None:
    found = difference(np.array([1, 2, 9, 4]), np.array([1, 2, 3, 4]))
    assert (found.nmse, found.at, found.got, found.wanted) == (0.25, (2,), 9.0, 3.0) and found.beyond(0.9)


def test_one_element_does_not_hide_among_many() -> None:
    x = np.ones(10**6, np.float32)
    y = np.array(x)
    y[77] += 2e-3
    found = difference(y, x)
    assert found.nmse < 1e-10 and found.beyond(1e-10) and not found.beyond(1e-9)


def test_shapes_that_differ_and_nothing_at_all() -> None:
    assert difference(np.ones(3), np.ones((3, 1))).nmse == math.inf
    assert difference(np.ones((0, 4)), np.ones((0, 4))).nmse == 0
    assert difference(np.zeros(4), np.zeros(4)).nmse == 0 and difference(np.full(4, 1e-3), np.zeros(4)).beyond(1.0)


def test_limits_follow_the_op_the_type_and_the_mode() -> None:
    x, ids = input("x", (4, 64)), input("ids", (2,), "i32")
    q, w = constant("q", shape=(32, 64), dtype="q8_0"), constant("w", shape=(32, 64))
    exact, rounded = Limits(), Limits(exact=False)
    product = mul_mat(q, x)
    assert exact.of_node(product) == exact.of_node(mul_mat(w, x)) == rounded.of_node(mul_mat(w, x)) == 1e-10
    assert rounded.of_node(product) == 2e-4 and steps_of(product) == 127 and steps_of(get_rows(q, ids)) == 0
    for name in ("f16", "bf16"):
        h = constant("h", shape=(32, 64), dtype=name)
        assert exact.of_node(mul_mat(h, x)) == 1e-10 and rounded.of_node(mul_mat(h, x)) == pytest.approx(2e-4 * (127 / 8191) ** 2)
        assert steps_of(mul_mat(h, x)) == 8191 and steps_of(get_rows(h, ids)) == 0
    assert exact.of_node(x.cast("f16")) == 2.0**-20 and exact.of_node(x.cast("bf16")) == 2.0**-14
    assert exact.of_node(get_rows(w, ids)) == 2.0**-46 and exact.of_node(top_k(x, k=2)) == 0
    assert exact.of_region(product) == 1e-8 < exact.of_whole == 1e-5 and rounded.of_region(product) < rounded.of_whole
    chosen = Limits(node=1.0, region=2.0, whole=3.0)
    assert (chosen.of_node(product), chosen.of_region(product), chosen.of_whole) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_dither_is_as_large_as_the_rounding_of_the_cpu(outlier: float) -> None:
    """The error of a product on the CPU that rounds activations to 8 bits, against that of a product with dithered ones."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((16, 256)).astype(np.float32)
    x[:, 5] *= outlier
    blocks = rng.integers(0, 256, (64, 256 // 32 * 34)).astype(np.uint8)
    blocks.reshape(64, -1, 34)[..., :2] = np.array([0.01], np.float16).view(np.uint8)
    graph = Graph(y=mul_mat(constant("w", shape=(64, 256), dtype="q8_0"), input("x", (Dim("T", 16), 256))))
    weights = {"w": blocks}
    exact = compile(graph, "reference").bind(weights).run({"x": x})["y"]
    rounded = compile(graph, "cpu", CompileOptions()).bind(weights).run({"x": x})["y"]
    moved = compile(graph, "reference").bind(weights).run({"x": dithered(x, rng)})["y"]
    found, model = difference(rounded, exact).nmse, difference(moved, exact).nmse
    assert 1e-6 < found < 1e-2 and found / 2 < model < 2 * found


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_dither_is_as_large_as_what_floats_lose(outlier: float, name: str) -> None:
    """Of weights and activations that are rounded to 14 bits."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((16, 256)).astype(np.float32), rng.standard_normal((64, 256)).astype(as_dtype(name).numpy)
    x[:, 5] *= outlier
    graph = Graph(y=mul_mat(constant("w", shape=w.shape, dtype=name), input("x", (Dim("T", 16), 256))))
    exact = compile(graph, "reference").bind({"w": w}).run({"x": x})["y"]
    rounded = compile(graph, "cpu", CompileOptions()).bind({"w": w}).run({"x": x})["y"]
    moved = dithered(x, rng, FIXED_STEPS) @ dithered(w, rng, FIXED_STEPS).T
    found, model = difference(rounded, exact).nmse, difference(moved, exact).nmse
    assert 1e-10 < found < 1e-6 and found / 2 < model < 2 * found


def test_statistics_of_an_array() -> None:
    found = Statistics.of(np.array([[1, -3, 0], [np.nan, np.inf, 4]], np.float16))
    assert (found.dtype, found.shape, found.low, found.high, found.mean) == ("float16", (2, 3), -3, 4, 0.5)
    assert found.deviation == pytest.approx(np.std([1, -3, 0, 4])) and (found.nans, found.infinities, found.zeros) == (1, 1, 1)
    assert str(found) == "float16[2, 3] -3 to 4, mean 0.5, deviation 2.5, 1 NaN, 1 infinite, 1 zero"
    assert math.isnan(Statistics.of(np.zeros((0,))).low)
