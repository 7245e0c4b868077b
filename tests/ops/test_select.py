"""Selection against Python's own sort, with ties, and with k far below the row's length."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.dims import Dim
from tensorgraph.errors import AttributeValueError, DTypeError
from tensorgraph.graph import input
from tensorgraph.ops.select import argmax, argsort, top_k

Array = np.ndarray[Any, Any]


def best(row: Array, k: int) -> list[int]:
    able = [i for i, v in enumerate(row.tolist()) if not math.isnan(v) and v != -math.inf]
    chosen = sorted(able, key=lambda i: (-row[i], i))[:k]
    return chosen + [-1] * (k - len(chosen))


VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -3.0, 1e-300, math.inf, -math.inf, -math.inf, math.nan])


@settings(deadline=None, max_examples=100)
@given(row=st.lists(VALUES, max_size=40), k=st.integers(1, 45))
def test_top_k_of_ties_and_of_what_is_never_selected(row: list[float], k: int) -> None:
    x = np.array([row, row[::-1]])
    got = top_k.compute({"x": x}, {"k": k})
    assert got.dtype == np.int32
    assert got.tolist() == [best(x[0], k), best(x[1], k)]


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1025, 4000),
    k=st.sampled_from([1, 8, 500, 2048]),
    levels=st.sampled_from([0, 1, 2, 30]),
    hidden=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_k_of_long_rows(n: int, k: int, levels: int, hidden: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, (3, n)).astype(float) if levels else rng.standard_normal((3, n))
    x[rng.random(x.shape) < hidden] = -np.inf
    x[:, :2] = np.nan
    x[:, -1] = 40
    assert top_k.compute({"x": x}, {"k": k}).tolist() == [best(row, k) for row in x]


def test_top_k_shapes() -> None:
    t, s = Dim("T", 64), Dim("S", 4096)
    y = top_k(input("x", (t, s)), k=2048)
    assert y.shape == (t, 2048) and y.dtype.name == "i32"
    assert top_k.compute({"x": np.ones((0, 5))}, {"k": 3}).shape == (0, 3)
    assert top_k.compute({"x": np.ones((2, 0))}, {"k": 3}).tolist() == [[-1] * 3] * 2
    assert top_k.compute({"x": np.array([2.0, 9, 9])}, {"k": 2}).tolist() == [1, 2]
    with pytest.raises(AttributeValueError, match="k must be within"):
        top_k(input("x", (t, s)), k=0)
    with pytest.raises(DTypeError, match="x must be float; got i32"):
        top_k(input("x", (t, s), "i32"), k=2)


@settings(deadline=None, max_examples=60)
@given(row=st.lists(VALUES, max_size=40), descending=st.booleans())
def test_argsort(row: list[float], descending: bool) -> None:
    x = np.array([row, row[::-1]])
    sign = -1 if descending else 1
    want = [sorted(range(len(r)), key=lambda i, r=r: (math.isnan(r[i]), sign * r[i] if r[i] == r[i] else 0)) for r in x]
    got = argsort.compute({"x": x}, {"descending": descending})
    assert got.dtype == np.int32 and got.tolist() == want


def test_argsort_shapes() -> None:
    y = argsort(input("x", (Dim("T", 64), 7), "f16"), descending=True)
    assert str(y.shape) == "(T, 7)" and y.dtype.name == "i32"


@settings(deadline=None, max_examples=100)
@given(row=st.lists(VALUES, max_size=40))
def test_argmax_takes_the_last_of_equals_and_no_nan(row: list[float]) -> None:
    x = np.array([row, row[::-1]])
    want = []
    for values in x.tolist():
        best = -1
        for i, v in enumerate(values):
            if not math.isnan(v) and (best < 0 or v >= values[best]):
                best = i
        want.append(best)
    got = argmax.compute({"x": x}, {})
    assert got.dtype == np.int32 and got.tolist() == want


def test_argmax_shapes() -> None:
    y = argmax(input("x", (Dim("T", 64), 7), "f16"))
    assert str(y.shape) == "(T,)" and y.dtype.name == "i32"
    assert argmax.compute({"x": np.array([2.0, 9, 9, -np.inf])}, {}).tolist() == 2
    assert argmax.cost(argmax(input("x", (3, 7))), {}).flops == 21
    with pytest.raises(DTypeError, match="x must be float; got i32"):
        argmax(input("x", (3, 7), "i32"))
