"""Element-wise ops against one formula a number, in plain Python, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tensorgraph import ops
from tensorgraph.compiler import run_op
from tensorgraph.dims import Dim
from tensorgraph.errors import AttributeValueError, DTypeError, ShapeError
from tensorgraph.graph import constant, input
from tensorgraph.ops.formats import FORMATS, decode, encode
from tests.ops.evaluate import evaluate

POINTS = np.array(
    [-80.0, -20.5, -3.5, -3.0, -2.5, -1.5, -1.0, -0.5, -0.25, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 0.25, 0.49999997, 0.5, 1.0]
    + [1.5, 2.5, 2.75, 3.0, 3.5, 10.0, 20.0, 20.5, 80.0],
    np.float32,
)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def phi(x: float) -> float:
    """The normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def tanh_gate(x: float) -> float:
    return logistic(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))  # (1 + tanh z) / 2 = logistic(2 z)


def away_from_zero(x: float) -> float:
    return math.copysign(math.floor(abs(x) + 0.5), x)


FORMULAS: dict[str, Callable[[float], float]] = {
    "abs": lambda x: x if x > 0 else -x,
    "neg": lambda x: 0 - x,
    "sgn": lambda x: (x > 0) - (x < 0),
    "step": lambda x: 1 if x > 0 else 0,
    "sqr": lambda x: x * x,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "exp": math.exp,
    "expm1": math.expm1,
    "log": lambda x: math.log(x) if x > 0 else -math.inf if x == 0 else math.nan,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": int,
    "round": away_from_zero,
    "relu": lambda x: x if x > 0 else 0,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "sigmoid": logistic,
    "silu": lambda x: x * logistic(x),
    "gelu": lambda x: x * tanh_gate(x),
    "gelu_quick": lambda x: x * logistic(1.702 * x),
    "gelu_erf": lambda x: x * phi(x),
    "hardsigmoid": lambda x: min(max(x / 6 + 0.5, 0), 1),
    "hardswish": lambda x: x * min(max(x / 6 + 0.5, 0), 1),
    "softplus": lambda x: x if x > 20 else max(x, 0) + math.log1p(math.exp(-abs(x))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    want = np.array([FORMULAS[name](float(x)) for x in POINTS])
    # 1 + tanh and 1 + erf leave nothing of the gate far to the left, where it is below 1e-15
    np.testing.assert_allclose(run_op(name, POINTS), want.astype(np.float32), rtol=2e-7, atol=1e-15 * 80)


@pytest.mark.parametrize("name", ["round", "floor", "ceil", "trunc"])
def test_rounding_is_exact_in_float64(name: str) -> None:
    x = np.array([0.49999999999999994, -0.49999999999999994, 4503599627370495.5, -2.5, 0.5, 1e300])
    by_hand = {"round": lambda v: math.copysign(math.floor(abs(v)) + (abs(v) % 1 >= 0.5), v)}
    want = [float(by_hand.get(name, getattr(math, name, None))(v)) for v in x.tolist()]
    np.testing.assert_array_equal(run_op(name, x), want)


def test_slope_bounds_and_scale() -> None:
    x = [-2.0, -0.5, 0.0, 0.25, 3.0]
    array = np.array(x, np.float32)
    np.testing.assert_array_equal(run_op("leaky_relu", array, negative_slope=0.25), [-0.5, -0.125, 0, 0.25, 3])
    np.testing.assert_array_equal(run_op("clamp", array, min=-1.0, max=0.5), [-1, -0.5, 0, 0.25, 0.5])
    np.testing.assert_array_equal(run_op("clamp", array, min=-math.inf, max=0.0), [-2, -0.5, 0, 0, 0])
    np.testing.assert_array_equal(run_op("scale", array, scale=2.0, bias=1.0), [2 * v + 1 for v in x])


def test_xielu() -> None:
    alpha_n, alpha_p, beta, eps = 0.75, -0.25, 0.5, -1e-6
    below, above = (math.log1p(math.exp(a)) for a in (alpha_n, alpha_p))
    x = POINTS[np.abs(POINTS) < 50]
    want = []
    for v in x.tolist():
        curved = above * v * v if v > 0 else (math.expm1(min(v, eps)) - v) * (beta + below)
        want.append(curved + beta * v)
    got = run_op("xielu", x, alpha_n=alpha_n, alpha_p=alpha_p, beta=beta, eps=eps)
    np.testing.assert_allclose(got, np.array(want, np.float32), rtol=2e-7)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_types_are_computed_wide_and_rounded_once(dtype: str) -> None:
    x = input("x", [3], dtype)
    assert ops.silu(x).dtype.name == dtype
    values = np.array([1.0, 2.0, -3.0], x.dtype.numpy)
    want = np.array([v * logistic(v) for v in (1.0, 2.0, -3.0)]).astype(x.dtype.numpy)
    np.testing.assert_array_equal(run_op("silu", values), want)


BINARY: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(
    "b_shape", [(2, 4, 6), (4, 6), (6,), (1, 6), (4, 1), (), (1, 1, 1), (2, 2, 3), (1, 4, 2), (3,), (2, 1, 2)]
)
def test_b_is_broadcast_or_tiled(name: str, b_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(1, 9, shape).astype(np.float32) for shape in ((2, 4, 6), b_shape))
    got = run_op(name, a, b)
    padded = b.reshape((1,) * (3 - b.ndim) + b.shape)
    for i in np.ndindex(a.shape):
        at = tuple(k % n for k, n in zip(i, padded.shape, strict=True))
        assert got[i] == np.float32(BINARY[name](float(a[i]), float(padded[at])))


def test_result_has_the_type_of_a() -> None:
    got = run_op("add", np.ones(3, np.float16), np.full(3, 2e-4, np.float32))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, np.ones(3, np.float16))


def test_b_with_runtime_extents() -> None:
    t = Dim("T", 8)
    a, b = input("a", [t, 4]), input("b", [t, 1])
    assert ops.mul(a, b).shape == (t, 4)
    assert ops.add(input("a", [2 * t, 4]), b).inputs[1].op == "repeat"
    with pytest.raises(ShapeError, match=r"\[mul\] b must be \[T, 4\].*to match a \[T, 4\]; got \[S, 4\] \(test_elementwise.py:"):
        ops.mul(a, input("weight", [Dim("S", 8), 4]))


def test_refusals_name_the_op_and_both_shapes() -> None:
    x = input("x", [2, 3])
    with pytest.raises(ShapeError, match=r"\[mul\] b must be \[3\].*to match a \[2, 3\]; got \[2\] .*\"w\""):
        ops.mul(x, input("w", [2]))
    with pytest.raises(ShapeError, match=r"\[add\] b must be"):
        ops.add(input("y", [3]), x)
    with pytest.raises(DTypeError, match=r"\[relu\] x must be real; got i32"):
        ops.relu(input("i", [2], "i32"))
    with pytest.raises(ShapeError, match=r"\[swiglu\] a must be \[..., 2 \* n\] without b; got \[2, 3\]"):
        ops.swiglu(x)
    with pytest.raises(ShapeError, match=r"\[reglu\] b must be \[2, 3\]; got \[2, 4\]"):
        ops.reglu(x, input("b", [2, 4]))
    with pytest.raises(AttributeValueError, match=r"\[clamp\] max is missing"):
        ops.clamp(x, min=0.0)


GATES: dict[str, Callable[[float], float]] = {
    "reglu": lambda x: max(x, 0),
    "geglu": FORMULAS["gelu"],
    "swiglu": FORMULAS["silu"],
    "geglu_erf": FORMULAS["gelu_erf"],
    "geglu_quick": FORMULAS["gelu_quick"],
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_gated_units(name: str, swapped: bool) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3, 5)).astype(np.float32)
    gate, up = (b, a) if swapped else (a, b)
    want = [[GATES[name](float(g)) * float(u) for g, u in zip(*rows, strict=True)] for rows in zip(gate, up, strict=True)]
    np.testing.assert_allclose(run_op(name, a, b, swapped=swapped), want, rtol=1e-6)
    np.testing.assert_array_equal(run_op(name, np.hstack([a, b]), swapped=swapped), run_op(name, a, b, swapped=swapped))


@pytest.mark.parametrize("gate", [-9.0, -0.5, 0.75, 9.0])
@pytest.mark.parametrize("up", [-9.0, -0.5, 0.75, 9.0])
def test_clamped_gated_units(gate: float, up: float) -> None:
    """The gate is limited above only, the other operand on both sides."""
    g, u = min(gate, 7), min(max(up, -7), 7)
    a, b = np.array([gate], np.float32), np.array([up], np.float32)
    np.testing.assert_allclose(run_op("swiglu_oai", a, b), [g / (1 + math.exp(-1.702 * g)) * (u + 1)], rtol=1e-6)
    g, u = min(gate, 0.7), min(max(up, -0.7), 0.7)
    np.testing.assert_allclose(run_op("swiglu_clamp", a, b, limit=0.7), [g / (1 + math.exp(-g)) * u], rtol=1e-6)


def test_fill() -> None:
    got = run_op("fill", shape=(2, 3), value=2.5, dtype="f16")
    assert got.dtype == np.float16
    assert got.tolist() == [[2.5] * 3] * 2
    assert run_op("fill", shape=(2,), value=-1.0, dtype="i32").tolist() == [-1, -1]
    t = Dim("T", 4)
    assert ops.fill(shape=(t, 2), value=0.0).shape == (t, 2)
    with pytest.raises(DTypeError, match=r"\[fill\] dtype must be a scalar type; got q8_0"):
        ops.fill(shape=(32,), value=0.0, dtype="q8_0")


def test_arange() -> None:
    assert run_op("arange", stop=4.0).tolist() == [0, 1, 2, 3]
    assert run_op("arange", start=5.0, stop=2.5, step=-1.0, dtype="i32").tolist() == [5, 4, 3]
    assert run_op("arange", stop=-1.0).shape == (0,)
    tenths = run_op("arange", start=1.0, stop=2.0, step=0.1, dtype="f64")
    np.testing.assert_array_equal(tenths, [1.0 + 0.1 * i for i in range(10)])
    for wrong in ({"stop": math.inf}, {"stop": 1.0, "step": 0.0}, {"stop": math.nan}):
        with pytest.raises(AttributeValueError, match=r"\[arange\] start, stop and step must be finite, and step not 0; got"):
            ops.arange(**wrong)
    for far in ({"start": -1e308, "stop": 1.7e308, "step": 1e-3}, {"stop": 1e308, "step": 1e-30}):
        with pytest.raises(AttributeValueError, match=r"\[arange\] \(stop - start\) / step must be finite; got start"):
            ops.arange(**far)
    with pytest.raises(DTypeError, match=r"\[arange\] dtype must be a real or int type; got bool"):
        ops.arange(stop=1.0, dtype="bool")


def test_cast() -> None:
    x = np.array([-2.75, -0.5, 0.5, 1.5, 2049.0, 3.9], np.float32)
    assert run_op("cast", x, dtype="i32").tolist() == [-2, 0, 0, 1, 2049, 3]
    assert run_op("cast", x, dtype="f16").tolist() == [-2.75, -0.5, 0.5, 1.5, 2048.0, np.float16(3.9)]
    assert run_op("cast", np.array([257.0, 259.0], np.float32), dtype="bf16").tolist() == [256.0, 260.0]  # ties to even
    assert run_op("cast", np.array([7, -7], np.int32), dtype="f32").tolist() == [7.0, -7.0]
    assert run_op("cast", np.array([True, False]), dtype="f32").tolist() == [1.0, 0.0]


def test_cast_of_what_an_integer_type_does_not_hold() -> None:
    x = np.array([math.nan, math.inf, -math.inf, 1e30, -1e30, 127.9, -128.9, 255.5, -0.9, 2.0**31, -(2.0**31)])
    for name, low, high in (("i8", -128, 127), ("u8", 0, 255), ("i16", -(2**15), 2**15 - 1), ("i32", -(2**31), 2**31 - 1)):
        held = [0 if v != v else int(min(max(v, low), high)) for v in x.tolist()]
        for dtype in (np.float64, np.float32):
            assert run_op("cast", x.astype(dtype), dtype=name).tolist() == held
    wide = np.array([1e30, -1e30, 2.0**63, 2.0**62, math.nan])
    assert run_op("cast", wide, dtype="i64").tolist() == [2**63 - 1, -(2**63), 2**63 - 1, 2**62, 0]
    assert run_op("cast", np.array([300, -1, 128], np.int32), dtype="u8").tolist() == [44, 255, 128]
    assert run_op("cast", np.array([300, -1, 128], np.int32), dtype="i8").tolist() == [44, -1, -128]
    assert run_op("cast", np.array([0.0, -0.0, math.nan, 1e-40], np.float32), dtype="bool").tolist() == [False, False, True, True]


@pytest.mark.parametrize("backend", ["reference", "cpu", "cpu:baseline"])
@pytest.mark.parametrize("name", FORMATS)
def test_cast_to_and_from_blocks_to_the_bit(name: str, backend: str) -> None:
    """Of numbers of all sizes, with ties, zeros and numbers too small for a scale, in rows that lie apart."""
    rng, size = np.random.default_rng(5), FORMATS[name].dtype.block_size
    x = (rng.standard_normal((64, 2 * size)) * 10 ** rng.uniform(-6, 4, (64, 1))).astype(np.float32)
    x[:8] = rng.integers(-4, 5, (8, 2 * size)) / 2
    x[8:12], x[12:14], x[14:16, 1:] = np.abs(x[8:12]), 0, 0
    x[16:18] *= np.float32(1e-36)
    want = decode(encode(x, name), name)
    given = {"x": np.repeat(x, 2, axis=1)}
    got = evaluate(ops.cast(input("x", [64, 4 * size])[:, ::2], dtype=name), given, backend)
    np.testing.assert_array_equal(got, want)
    raw = {"x": encode(x, name)}
    for dtype in ("f32", "f16", "bf16", "f64", "i32"):
        read = evaluate(ops.cast(constant("x", shape=x.shape, dtype=name), dtype=dtype), raw, backend)
        np.testing.assert_array_equal(read, run_op("cast", want, dtype=dtype))


def test_cast_to_blocks() -> None:
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    got = run_op("cast", x, dtype="q8_0")
    for block in (slice(0, 32), slice(32, 64)):
        unit = np.float32(np.float16(np.abs(x[block]).max() / 127))
        assert np.all(np.abs(got[block] - x[block]) <= 0.51 * unit)
        np.testing.assert_allclose(got[block] / unit, np.round(got[block] / unit), atol=1e-4)
    with pytest.raises(ShapeError, match=r"\[cast\] x must be \[..., a multiple of 32\] for q8_0; got \[33\]"):
        ops.cast(input("x", [33]), dtype="q8_0")
    with pytest.raises(DTypeError, match=r"\[cast\] there is no conversion from i32 to q8_0"):
        ops.cast(input("x", [32], "i32"), dtype="q8_0")
    with pytest.raises(DTypeError, match=r"\[cast\] x is q8_0 already"):
        ops.cast(ops.cast(input("x", [32]), dtype="q8_0"), dtype="q8_0")
