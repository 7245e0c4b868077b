"""Rotary embeddings against rotation of complex numbers, one pair at a time."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import AttributeValueError, DTypeError, ShapeError
from tensorgraph.graph import input
from tensorgraph.ops.position import llama3_freq_factors, rope
from tensorgraph.tools.conformance.evaluate import Meaning

Array = np.ndarray[Any, Any]


def yarn_share(i: int, n_dims: int, base: float, fast: float, slow: float, original: int) -> float:
    """How much of pair i keeps its own frequency: 1 where it turns more than `fast` times in the original context."""
    low = math.floor(n_dims * math.log(original / (fast * 2 * math.pi)) / (2 * math.log(base)))
    high = math.ceil(n_dims * math.log(original / (slow * 2 * math.pi)) / (2 * math.log(base)))
    low, high = max(low, 0), min(high, n_dims - 1)
    if i <= low:
        return 1.0
    return 0.0 if i >= high else 1 - (i - low) / (high - low)


def rotated(x: Array, pos: Array, factors: Array | None, **given: Any) -> Array:
    """One pair of one head of one token at a time."""
    y = np.array(x)
    offset, n_dims = given.get("offset", 0), given.get("n_dims", 0)
    n_dims = n_dims or x.shape[-1] - offset
    base, scale, mix = given.get("base", 1e4), given.get("freq_scale", 1.0), given.get("ext_factor", 0.0)
    for t in range(len(x)):
        for i in range(n_dims // 2):
            angle = float(pos[t]) / base ** (2 * i / n_dims) / (1.0 if factors is None else float(factors[i]))
            share = 0.0
            if mix:
                fast, slow = given.get("beta_fast", 32.0), given.get("beta_slow", 1.0)
                share = mix * yarn_share(i, n_dims, base, fast, slow, given["original_context"])
            angle = angle * scale * (1 - share) + angle * share
            turn = cmath.rect(given.get("magnitude", 1.0), -angle if given.get("inverse") else angle)
            a, b = (2 * i, 2 * i + 1) if given.get("layout", "interleaved") == "interleaved" else (i, i + n_dims // 2)
            for row in np.ndindex(*x.shape[1:-1]):
                z = turn * complex(x[(t, *row, offset + a)], x[(t, *row, offset + b)])
                y[(t, *row, offset + a)], y[(t, *row, offset + b)] = z.real, z.imag
    return y


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_every_variant(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_dims, before, after = 2 * draw(st.integers(1, 16)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    rows = draw(st.sampled_from([(), (2,), (2, 3)]))
    x = rng.standard_normal((draw(st.integers(0, 4)), *rows, before + n_dims + after))
    pos = rng.integers(0, 3000, len(x))
    factors = rng.uniform(0.5, 9, n_dims // 2) if draw(st.booleans()) else None
    attrs: dict[str, Any] = {
        "n_dims": 0 if after == 0 and draw(st.booleans()) else n_dims,
        "offset": before,
        "base": draw(st.sampled_from([1e4, 5e5, 160000.0])),
        "layout": draw(st.sampled_from(["interleaved", "half_split"])),
        "inverse": draw(st.booleans()),
        "freq_scale": draw(st.sampled_from([1.0, 1 / 40])),
        "ext_factor": draw(st.sampled_from([0.0, 1.0, 0.3])),
        "original_context": draw(st.sampled_from([4096, 65536])),
        "magnitude": draw(st.sampled_from([1.0, 1.19])),
    }
    before_x = x.copy()
    got = rope.compute({"x": x, "pos": pos, "freq_factors": factors}, rope.check_attrs(attrs))
    np.testing.assert_allclose(got, rotated(x, pos, factors, **attrs), rtol=0, atol=1e-11)
    assert np.array_equal(x, before_x)


def test_values_by_hand() -> None:
    x = np.array([[1.0, 0.0, 0.0, 1.0]])
    pos = np.array([1])
    c, s, far_c, far_s = math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)
    interleaved = rope.compute({"x": x, "pos": pos}, rope.check_attrs({}))
    np.testing.assert_allclose(interleaved, [[c, s, -far_s, far_c]], rtol=1e-14)
    half_split = rope.compute({"x": x, "pos": pos}, rope.check_attrs({"layout": "half_split"}))
    np.testing.assert_allclose(half_split, [[c, -far_s, s, far_c]], rtol=1e-14)
    back = rope.compute({"x": interleaved, "pos": pos}, rope.check_attrs({"inverse": True}))
    np.testing.assert_allclose(back, x, atol=1e-15)


def test_distance_alone_counts() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 32))

    def product(at_q: int, at_k: int, layout: str) -> float:
        attrs = rope.check_attrs({"layout": layout, "base": 5e5})
        turned = (rope.compute({"x": x, "pos": np.array([p])}, attrs) for x, p in ((q, at_q), (k, at_k)))
        return float(np.sum(np.multiply(*turned)))

    for layout in ("interleaved", "half_split"):
        assert product(100, 93, layout) == pytest.approx(product(7, 0, layout), rel=1e-12)
        assert product(100, 92, layout) != pytest.approx(product(7, 0, layout), rel=1e-3)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    """DeepSeek's constants: of 32 pairs, those up to 10 keep their frequency, those from 23 on are slowed 40 times."""
    x = np.tile([1.0, 0.0], 32)[None]
    attrs = {"freq_scale": 1 / 40, "ext_factor": 1.0, "original_context": 4096}
    y = rope.compute({"x": x, "pos": np.array([1])}, rope.check_attrs(attrs))
    angle = np.arctan2(y[0, 1::2], y[0, ::2])
    plain = 1e4 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(angle[:11], plain[:11], rtol=1e-12)
    np.testing.assert_allclose(angle[23:], plain[23:] / 40, rtol=1e-12)
    assert np.all((angle[11:23] < plain[11:23]) & (angle[11:23] > plain[11:23] / 40))
    np.testing.assert_allclose(np.hypot(y[0, ::2], y[0, 1::2]), 1, rtol=1e-14)


def test_llama3_factors() -> None:
    """Llama 3.1 (factor 8, 1 and 4, 8192) and 3.2 (factor 32), one frequency at a time."""
    for n_dims, base, factor in ((128, 5e5, 8.0), (64, 5e5, 32.0), (16, 1e4, 4.0)):
        got = llama3_freq_factors(n_dims, base, factor, 1.0, 4.0, 8192)
        assert got.dtype == np.float32 and got.shape == (n_dims // 2,)
        for i in range(n_dims // 2):
            frequency = base ** (-2 * i / n_dims)
            wavelength = 2 * math.pi / frequency
            if wavelength < 8192 / 4:
                want = frequency
            elif wavelength > 8192 / 1:
                want = frequency / factor
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                want = (1 - smooth) * frequency / factor + smooth * frequency
            assert frequency / got[i] == pytest.approx(want, rel=1e-6)
    assert 1 < np.unique(got).size


def test_shapes_and_errors() -> None:
    t = Dim("T", 64)
    pos = input("pos", (t,), "i32")
    x = input("x", (t, 8, 64), "f16")
    y = rope(x, pos, input("factors", (16,)), n_dims=32, offset=32)
    assert y.shape == (t, 8, 64) and y.dtype.name == "f16" and y.slots == ("x", "pos", "freq_factors")
    assert rope(input("x", (t, 64)), pos).shape == (t, 64)
    with pytest.raises(ShapeError, match="got 34 from channel 32"):
        rope(x, pos, n_dims=34, offset=32)
    with pytest.raises(ShapeError, match="even number of channels within 64; got 33"):
        rope(x, pos, offset=31)
    with pytest.raises(ShapeError, match=r"freq_factors must be \[32\]; got \[16\]"):
        rope(x, pos, input("factors", (16,)))
    with pytest.raises(ShapeError, match=r"pos must be \[T\]; got \[3\]"):
        rope(x, input("pos", (3,), "i32"))
    with pytest.raises(ShapeError, match="D a number"):
        rope(input("x", (t, Dim("D", 4))), pos)
    with pytest.raises(DTypeError, match="pos must be int"):
        rope(x, input("pos", (t,)))
    with pytest.raises(AttributeValueError, match="original_context"):
        rope(x, pos, ext_factor=1.0, freq_scale=0.1)
    with pytest.raises(AttributeValueError, match="layout must be one of"):
        rope(x, pos, layout="neox")


def test_what_an_expansion_is_has_not_been_rounded() -> None:
    """A result in f16 is compared with numbers that are not rounded to f16, also where the op's f32 table keeps f64 out."""
    rng = np.random.default_rng(5)
    slots = {
        "x": rng.standard_normal((3, 64)).astype(np.float16),
        "pos": np.arange(3, dtype=np.int32),
        "freq_factors": rng.uniform(1, 2, 32).astype(np.float32),
    }
    meaning = Meaning(rope, {"n_dims": 64}, {slot: as_dtype(x.dtype) for slot, x in slots.items()}, expanded=True)
    exact, rounded = meaning(slots), replace(meaning, rounds=True)(slots, np.float32)
    np.testing.assert_allclose(exact, rotated(np.float64(slots["x"]), slots["pos"], slots["freq_factors"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rounded, rounded.astype(np.float16))
    assert np.any(exact != exact.astype(np.float16))
