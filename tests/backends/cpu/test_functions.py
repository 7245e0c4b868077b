"""Functions of real numbers: error in units in the last place against float64 over all of f32, and what is exact."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu import functions
from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.ir import F32, F64, I64, PTR, Type
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.target import TARGETS, Target, can_run, host

Array = np.ndarray[Any, Any]
RUNNABLE = [target for target in (host(), *TARGETS.values()) if can_run(target)]
INF, NAN = math.inf, math.nan

_erf, _erfc = (np.frompyfunc(f, 1, 1) for f in (math.erf, math.erfc))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def erf(x: Array) -> Array:
    return np.asarray(_erf(x), np.float64)


def gelu(x: Array) -> Array:
    return x * np.asarray(_erfc(x * -math.sqrt(0.5)), np.float64) / 2


REFERENCES: dict[str, tuple[Callable[[Array], Array], float]] = {
    "exp": (np.exp, 2),
    "expm1": (np.expm1, 2),
    "log": (np.log, 1),
    "softplus": (softplus, 2),
    "tanh": (np.tanh, 2),
    "sigmoid": (sigmoid, 2),
    "silu": (lambda x: x * sigmoid(x), 3.5),
    "erf": (erf, 2),
    "gelu": (gelu, 8),
    "sin": (np.sin, 0.51),
    "cos": (np.cos, 0.51),
}
"""Each function in float64 and the most units that it may be off; 8 are reached only where gelu is below 1e-6."""

SPECIAL: dict[str, tuple[tuple[float, float], ...]] = {
    "exp": ((INF, INF), (-INF, 0), (0.0, 1), (-0.0, 1), (88.8, INF), (-104.0, 0), (-103.9, 2.0**-149), (3e38, INF), (-3e38, 0)),
    "exp2_nonpositive": ((-INF, 0), (0.0, 1), (-0.0, 1), (-1.0, 0.5), (-126.0, 2.0**-126), (-126.1, 0), (-1e10, 0), (-3e38, 0)),
    "expm1": ((INF, INF), (-INF, -1), (0.0, 0), (-0.0, -0.0), (88.8, INF), (-30.0, -1), (-3e38, -1), (2.0**-149, 2.0**-149)),
    "log": ((INF, INF), (-INF, NAN), (0.0, -INF), (-0.0, -INF), (-1.0, NAN), (1.0, 0), (-(2.0**-149), NAN)),
    "softplus": ((INF, INF), (-INF, 0), (3e38, 3e38), (-3e38, 0), (30.0, 30)),
    "tanh": ((INF, 1), (-INF, -1), (0.0, 0), (-0.0, -0.0), (3e38, 1), (2.0**-149, 2.0**-149)),
    "sigmoid": ((INF, 1), (-INF, 0), (0.0, 0.5), (-0.0, 0.5), (3e38, 1), (-3e38, 0)),
    "silu": ((INF, INF), (-INF, NAN), (0.0, 0), (-0.0, -0.0), (3.4e38, 3.4e38), (-3.4e38, -0.0)),
    "erf": ((INF, 1), (-INF, -1), (0.0, 0), (-0.0, -0.0), (3e38, 1), (-3e38, -1)),
    "gelu": ((INF, INF), (-INF, NAN), (0.0, 0), (-0.0, -0.0), (3.4e38, 3.4e38), (-3.4e38, -0.0)),
    "sin": ((INF, NAN), (-INF, NAN), (0.0, 0), (-0.0, -0.0)),
    "cos": ((INF, NAN), (-INF, NAN), (0.0, 1)),
}


@cache
def compiled(name: str, target: Target, type: Type, lanes: int) -> tuple[Jit, Any]:
    """A function of an array of whole vectors; the JIT owns its code."""
    k = Function("kernel", {"x": PTR, "y": PTR, "n": I64}, target)
    x, y, n = k.parameters.values()
    with k.loop(0, n, max(lanes, 1)) as loop:
        at = loop.i * type.size_bytes
        k.store(getattr(functions, name)(k, k.load(x + at, type.x(lanes))), y + at)
        loop.next()
    jit = Jit(target, None)
    (address,) = jit.compile([k.text()])
    return jit, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)


def run(name: str, target: Target, x: Array, lanes: int | None = None) -> Array:
    type = F32 if x.dtype == np.float32 else F64
    y = np.empty_like(x)
    assert x.flags.c_contiguous and x.size % 16 == 0
    compiled(name, target, type, target.vector_bytes // 4 if lanes is None else lanes)[1](x.ctypes.data, y.ctypes.data, x.size)
    return y


def units_off(got: Array, want: Array) -> Array:
    """Distance in units in the last place of f32 at `want` (float64); infinite where only one is NaN or infinite."""
    rounded = want.astype(np.float32)
    _, exponent = np.frexp(want)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, -126) - 23)
    same = (got == rounded) | (np.isnan(got) & np.isnan(want))
    finite = np.isfinite(got) & np.isfinite(rounded)
    return np.where(same, 0.0, np.where(finite, np.abs(got - want) / unit, np.inf))


@cache
def points() -> Array:
    """Bit patterns all over f32, evenly, and many where functions bend."""
    rng = np.random.default_rng(7)
    every = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32).view(np.float32)
    wide, near = rng.uniform(-110, 110, 1 << 16), rng.standard_normal(1 << 16) * 2
    x = np.concatenate([every, wide.astype(np.float32), near.astype(np.float32)])
    return x[: x.size // 64 * 64].copy()


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)
@pytest.mark.parametrize("name", REFERENCES)
def test_error(name: str, target: Target) -> None:
    reference, most = REFERENCES[name]
    x = points()
    with np.errstate(all="ignore"):
        off = units_off(run(name, target, x), reference(x.astype(np.float64)))
    worst = int(np.argmax(off))
    assert off[worst] <= most, f"{name}({x[worst]!r}) is {off[worst]} units off"


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name: str, target: Target) -> None:
    given = (*SPECIAL[name], (NAN, NAN))
    x = np.zeros(16, np.float32)
    x[: len(given)] = [at for at, _ in given]
    want = np.array([value for _, value in given], np.float32)
    got = run(name, target, x)[: len(given)]
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(want[numbers]))


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)
def test_weights_of_a_soft_max(target: Target) -> None:
    """Of numbers from -126 to 0, to 2 units in the last place."""
    x = -points()[(points() >= 0) & (points() <= 126)]
    x = np.ascontiguousarray(x[: len(x) // 16 * 16])
    assert len(x) > 10_000
    assert units_off(run("exp2_nonpositive", target, x), np.exp2(x.astype(np.float64))).max() <= 2


@pytest.mark.parametrize("name", REFERENCES)
def test_a_scalar_gives_the_bits_of_a_vector(name: str) -> None:
    """But for those of NaN, whose sign and payload are the processor's affair."""
    x = points()[::97][:1024].copy()
    scalar, vector = run(name, host(), x, lanes=0), run(name, host(), x)
    nan = np.isnan(vector)
    np.testing.assert_array_equal(np.isnan(scalar), nan)
    np.testing.assert_array_equal(scalar[~nan].view(np.uint32), vector[~nan].view(np.uint32))


@pytest.mark.parametrize("name", REFERENCES)
def test_f64_is_computed_in_f64(name: str) -> None:
    x = np.random.default_rng(3).uniform(-30, 30, 1024)
    x = np.abs(x) if name == "log" else x
    np.testing.assert_allclose(run(name, host(), x), REFERENCES[name][0](x), rtol=1e-14)


def test_numbers_too_large_for_f32_are_infinite() -> None:
    k = Function("kernel", {}, host())
    assert functions.number(k, 1e300, F32).ref == k.const(INF, F32).ref
    assert functions.number(k, -1e300, F32).ref == k.const(-INF, F32).ref
    assert functions.number(k, 1e300, F64).ref == k.const(1e300, F64).ref
    assert functions.number(k, 0.1, F32).ref == k.const(0.1, F32).ref
