"""Products against loops, and the shapes and errors that a graph gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.dims import Dim
from tensorgraph.errors import DTypeError, InputError, ShapeError
from tensorgraph.graph import input
from tensorgraph.ops.products import fwht, mul_mat, mul_mat_id

Array = np.ndarray[Any, Any]


def dots(a: Array, b: Array) -> Array:
    """`b @ a.T` of two matrices, element by element."""
    y = np.zeros((len(b), len(a)))
    for n in range(len(b)):
        for m in range(len(a)):
            y[n, m] = sum(float(p) * float(q) for p, q in zip(a[m], b[n], strict=True))
    return y


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(0, 5)] * 3),
    batch=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=3),
    missing=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_mul_mat_repeats_a_blockwise(sizes: tuple[int, int, int], batch: list[tuple[int, int]], missing: int, seed: int) -> None:
    m, n, k = sizes
    mine = [few for few, _ in batch]
    many = [few * times for few, times in batch]
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*mine[missing:], m, k))
    b = rng.standard_normal((*many, n, k))
    want = np.zeros((*many, n, m))
    for at in np.ndindex(*many):
        source = tuple(i // times for i, (_, times) in zip(at, batch, strict=True))[missing:]
        want[at] = dots(a[source], b[at])
    got = mul_mat.compute({"a": a, "b": b}, {})
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_mul_mat_of_views_and_of_f32() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 6, 10)), rng.standard_normal((8, 3, 10))
    want = mul_mat.compute({"a": a, "b": b}, {})
    views = {"a": np.asfortranarray(a), "b": np.repeat(b, 2, -1)[..., ::2]}
    np.testing.assert_allclose(mul_mat.compute(views, {}), want, rtol=1e-13)
    heads_inside = b.transpose(1, 0, 2).copy().transpose(1, 0, 2)
    np.testing.assert_allclose(mul_mat.compute({"a": a[:, ::-1], "b": heads_inside}, {}), want[..., ::-1], rtol=1e-13)
    single = mul_mat.compute({"a": a[0].astype(np.float32), "b": b}, {})
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, mul_mat.compute({"a": a[0], "b": b}, {}), rtol=0, atol=1e-5)


def test_mul_mat_shapes() -> None:
    t, s = Dim("T", 64), Dim("S", 512)
    weight, x = input("w", (100, 32), "q8_0"), input("x", (t, 4, 32))
    y = mul_mat(weight, x)
    assert y.shape == (t, 4, 100) and y.dtype.name == "f32"
    keys = input("k", (2, s, 32), "f16")
    assert mul_mat(keys, input("q", (8, t, 32))).shape == (8, t, s)
    assert mul_mat(input("a", (t, 3, 32)), input("b", (2 * t, 5, 32))).shape == (2 * t, 5, 3)
    with pytest.raises(ShapeError, match=r"\[mul_mat\] b must be \[T, 4, 32\]; got \[T, 4, 31\] \(test_products.py"):
        mul_mat(weight, input("x", (t, 4, 31)))
    with pytest.raises(ShapeError, match="multiples"):
        mul_mat(input("k", (3, s, 32)), input("q", (8, t, 32)))
    with pytest.raises(ShapeError, match="multiples"):
        mul_mat(input("k", (1, 8, s, 32)), input("q", (8, t, 32)))
    with pytest.raises(DTypeError, match="b must be float; got i32"):
        mul_mat(weight, input("x", (t, 32), "i32"))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_mul_mat_id_uses_the_row_of_its_place(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n_experts, n_used, n_tokens, m, k = (data.draw(st.integers(low, 5)) for low in (1, 1, 0, 0, 0))
    a = rng.standard_normal((n_experts, m, k))
    b = rng.standard_normal((n_tokens, data.draw(st.sampled_from((1, n_used))), k))
    ids = rng.integers(-1, n_experts, (n_tokens, n_used))
    want = np.zeros((n_tokens, n_used, m))
    for t in range(n_tokens):
        for u in range(n_used):
            if ids[t, u] >= 0:
                want[t, u] = dots(a[ids[t, u]], b[t, u % b.shape[1]][None])[0]
    got = mul_mat_id.compute({"a": a, "b": b, "ids": ids.astype(np.int32)}, {})
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_mul_mat_id_reads_only_the_experts_that_are_used() -> None:
    a = np.full((5, 3, 2), np.nan)
    a[[1, 4]] = np.arange(12.0).reshape(2, 3, 2)
    y = mul_mat_id.compute({"a": a, "b": np.ones((3, 1, 2)), "ids": np.array([[1, 4], [4, -1], [1, 1]])}, {})
    one, four = [1.0, 5.0, 9.0], [13.0, 17.0, 21.0]
    assert y.tolist() == [[one, four], [four, [0.0] * 3], [one, one]]
    for bad in (5, -2):
        with pytest.raises(InputError, match=f"below 5, or -1 for none; got {bad}"):
            mul_mat_id.compute({"a": a, "b": np.ones((1, 1, 2)), "ids": np.array([[1, bad]])}, {})


def test_mul_mat_id_shapes() -> None:
    t = Dim("T", 64)
    experts, ids = input("w", (16, 48, 32), "q4_0"), input("ids", (t, 6), "i32")
    assert mul_mat_id(experts, input("x", (t, 1, 32)), ids).shape == (t, 6, 48)
    assert mul_mat_id(experts, input("x", (t, 6, 32)), ids).shape == (t, 6, 48)
    with pytest.raises(ShapeError, match=r"b must be \[T, 6 or 1, 32\].*got \[T, 2, 32\]"):
        mul_mat_id(experts, input("x", (t, 2, 32)), ids)
    with pytest.raises(ShapeError, match="ids must be"):
        mul_mat_id(experts, input("x", (t, 1, 32)), input("ids", (3, 6), "i32"))


@settings(deadline=None, max_examples=20)
@given(log_n=st.integers(0, 7), rows=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_fwht_is_the_sylvester_matrix(log_n: int, rows: int, seed: int) -> None:
    n = 2**log_n
    x = np.random.default_rng(seed).standard_normal((rows, n))
    signs = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])
    np.testing.assert_allclose(fwht.compute({"x": x}, {}), x @ signs / np.sqrt(n), rtol=0, atol=1e-13)


def test_fwht_keeps_dot_products_and_wants_a_power_of_two() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 5, 128))
    turned = (fwht.compute({"x": x}, {}) for x in (a, b))
    np.testing.assert_allclose(np.sum(np.multiply(*turned), -1), np.sum(a * b, -1), rtol=1e-12)
    assert fwht(input("x", (Dim("T", 9), 128), "f16")).dtype.name == "f16"
    for n in (0, 12, Dim("N", 16)):
        with pytest.raises(ShapeError, match="power of two"):
            fwht(input("x", (3, n)))
