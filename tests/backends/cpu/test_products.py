"""mul_mat and mul_mat_id on every target: floats within rounding of float64, quantised types as the same arithmetic in NumPy."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (registers the block types)
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.int8 import byte_dot
from tensorgraph.backends.cpu.ir import I8, I32, PTR
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.matvec import kind_of
from tensorgraph.backends.cpu.target import TARGETS, Target, can_run, host
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, constant, input
from tensorgraph.ops import mul_mat, mul_mat_id
from tensorgraph.ops.formats import decode
from tensorgraph.plan import Executable

Array = np.ndarray[Any, Any]
BACKENDS = ["cpu", *(f"cpu:{name}" for name, target in TARGETS.items() if can_run(target))]
EXACT_TO = 2.0**-20
"""Of the sum of the magnitudes that are added: a few roundings of f32."""
T = Dim("T", max=64)


def weights(name: str, *shape: int) -> tuple[Array, Array]:
    """Random weights of a type of about one, as in a file and as float64."""
    rng, dtype = np.random.default_rng(len(name) + sum(shape)), as_dtype(name)
    if not dtype.is_block:
        array = rng.standard_normal(shape).astype(dtype.numpy)
        return array, array.astype(np.float64)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // dtype.block_size, dtype.block_bytes), np.uint8)
    halves = {"q4_0": (0,), "q4_1": (0, 2), "q8_0": (0,), "q5_1": (0, 2), "q4_k": (0, 2), "q6_k": (208,)}[name]
    for at in halves:
        scale = rng.uniform(-0.1, 0.1, raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    array = raw.reshape(*shape[:-1], -1)
    return array, decode(array, dtype).astype(np.float64)


def quantised(x: Array) -> Array:
    """Activations as products see them in int8, by 32: scale times code."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32).astype(np.float32)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    return (np.rint(blocks * inverse).astype(np.float64) * d).reshape(x.shape)


def check(got: Array, w: Array, x: Array, *, int8: bool) -> None:
    """w [..., M, K] and x [..., K] against [..., M]."""
    seen = quantised(x) if int8 else x.astype(np.float64)
    want = np.einsum("...mk,...k->...m", w, seen)
    most = np.einsum("...mk,...k->...m", np.abs(w), np.abs(seen))
    assert got.dtype == np.float32 and got.shape == want.shape
    worst = np.max(np.abs(got - want) - EXACT_TO * most, initial=0.0)
    assert worst <= 1e-30, f"off by {worst} more than {EXACT_TO} of the magnitudes"
    if int8:  # that this is the arithmetic it should be, and not that of floats
        assert got.size < 64 or np.sum((got - want) ** 2) * 100 < np.sum((np.einsum("...mk,...k->...m", w, x) - want) ** 2)


def bound(node: Any, backend: str, array: Array, *, exact: bool = False) -> Executable:
    return compile(Graph(y=node), backend, CompileOptions(exact=exact, fuse=False)).bind({"a": array})


def is_int8(name: str, exact: bool) -> bool:
    return kind_of(as_dtype(name), exact) == "int8"


TYPES = [("q4_1", False), ("q4_0", False), ("q8_0", False), ("q4_0", True), ("f16", False), ("f32", False)]
ON_HOST = [*TYPES, ("q5_1", False), ("q4_k", False), ("q4_k", True), ("q6_k", False), ("bf16", False)]
CASES = [(backend, *case) for backend in BACKENDS for case in (ON_HOST if backend == "cpu" else TYPES)]


@pytest.mark.parametrize(("backend", "name", "exact"), CASES)
def test_one_matrix(backend: str, name: str, exact: bool) -> None:
    """From one row to tiles of many, with a last tile of rows that is alone and not whole."""
    block = as_dtype(name).block_size
    height, width = 37, 96 if block == 32 else block if block > 1 else 50
    array, w = weights(name, height, width)
    step = bound(mul_mat(constant("a", shape=(height, width), dtype=name), input("b", (T, width))), backend, array, exact=exact)
    rng = np.random.default_rng(1)
    for n in (1, 2, 4, 5, 9, 14, 0):
        x = rng.standard_normal((n, width)).astype(np.float32) * 10.0 ** rng.integers(-3, 4, (n, 1))
        x = x.astype(np.float32)
        x[n // 2 : n // 2 + 1, :32] = 0
        check(step.run({"b": x})["y"], w, x, int8=is_int8(name, exact))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_matrices_shared_by_neighbours(backend: str) -> None:
    array, w = weights("q4_1", 2, 33, 64)
    step = bound(mul_mat(constant("a", shape=(2, 33, 64), dtype="q4_1"), input("b", (3, 4, T, 64))), backend, array)
    for n in (1, 3, 6):
        x = np.random.default_rng(n).standard_normal((3, 4, n, 64)).astype(np.float32)
        check(step.run({"b": x})["y"], w[[0, 0, 1, 1]][:, None], x, int8=True)


def test_weights_of_several_blocks() -> None:
    """Too many for the cache, so that they are taken in parts."""
    for name in ("q8_0", "f16"):
        array, w = weights(name, 1016, 512)
        assert array.nbytes > 512 << 10
        step = bound(mul_mat(constant("a", shape=(1016, 512), dtype=name), input("b", (T, 512))), "cpu", array)
        x = np.random.default_rng(2).standard_normal((19, 512)).astype(np.float32)
        check(step.run({"b": x})["y"], w, x, int8=is_int8(name, False))


@cache
def outermost() -> tuple[Array, Array]:
    """q8_0 weights and activations whose codes are the largest that there are, of all signs."""
    signs = np.random.default_rng(4).choice((-1, 1), (37, 96))
    signs[:4] = np.array([[1], [-1], [1], [-1]])
    raw = np.zeros((37, 3, 34), np.uint8)
    raw[:, :, :2] = np.float16(0.5).tobytes()[0], np.float16(0.5).tobytes()[1]
    raw[:, :, 2:] = np.where(signs > 0, 127, -128).astype(np.int8).view(np.uint8).reshape(37, 3, 32)
    return raw.reshape(37, -1), np.concatenate([np.ones((1, 96)), -np.ones((1, 96)), signs[4:11]]).astype(np.float32) * 127


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_overflows(backend: str) -> None:
    """Sums of the largest codes are exact: no rounding at all, as everything is whole."""
    array, x = outermost()
    step = bound(mul_mat(constant("a", shape=(37, 96), dtype="q8_0"), input("b", (T, 96))), backend, array)
    want = x.astype(np.float64) @ decode(array, "q8_0").astype(np.float64).T
    np.testing.assert_array_equal(step.run({"b": x})["y"], want)
    np.testing.assert_array_equal(step.run({"b": x[:2]})["y"], want[:2])


@pytest.mark.parametrize("name", ["q4_1", "q8_0"])
def test_targets_that_fuse_multiplication_and_addition_agree_to_the_last_bit(name: str) -> None:
    array, _ = weights(name, 37, 96)
    x = np.random.default_rng(3).standard_normal((9, 96)).astype(np.float32)
    results = []
    for backend in BACKENDS:
        if "fma" in CpuDevice(backend).target.has:
            step = bound(mul_mat(constant("a", shape=(37, 96), dtype=name), input("b", (T, 96))), backend, array)
            results.append(np.concatenate([step.run({"b": x})["y"], step.run({"b": x[:3]})["y"]]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].view(np.uint32), other.view(np.uint32))
    for result in results:
        np.testing.assert_array_equal(result[:3], result[9:])


ID_TYPES = [("q4_1", False), ("q8_0", False), ("f32", False)]
ID_CASES = [(b, *case) for b in BACKENDS for case in (*ID_TYPES, *([("f16", False), ("q4_0", True)] if b == "cpu" else []))]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("backend", "name", "exact"), ID_CASES)
def test_experts(backend: str, name: str, exact: bool, shared: bool) -> None:
    """Few pairs, many, experts that nobody chose or all did, and none."""
    n_experts, n_used, height, width = 5, 3, 37, 96 if as_dtype(name).is_block else 50
    array, w = weights(name, n_experts, height, width)
    a = constant("a", shape=(n_experts, height, width), dtype=name)
    b, ids = input("b", (T, 1 if shared else n_used, width)), input("ids", (T, n_used), dtype="i32")
    step = bound(mul_mat_id(a, b, ids), backend, array, exact=exact)
    rng = np.random.default_rng(5)
    for n, low, high in ((1, 0, 5), (4, -1, 5), (6, -1, 5), (20, -1, 3), (9, 2, 3), (7, -1, 0), (0, 0, 1)):
        x = rng.standard_normal((n, 1 if shared else n_used, width)).astype(np.float32)
        chosen = rng.integers(low, high, (n, n_used)).astype(np.int32)
        got = step.run({"b": x, "ids": chosen})["y"]
        none = chosen < 0
        assert not got[none].any()
        rows = np.broadcast_to(x, (n, n_used, width))
        check(got[~none], w[chosen[~none]], rows[~none], int8=is_int8(name, exact))
    for n in (2, 20):
        for wrong in (-2, n_experts, 2**31 - 1):
            chosen = np.zeros((n, n_used), np.int32)
            chosen[n - 1, 1] = wrong
            with pytest.raises(InputError, match=rf"\[mul_mat_id\] ids must be below 5, or -1 for none; got {wrong}$"):
                step.run({"b": np.zeros((n, 1 if shared else n_used, width), np.float32), "ids": chosen})


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_are_computed(backend: str) -> None:
    """Matrices that are no constants, in either order of their axes."""
    rng = np.random.default_rng(6)
    x, chosen = rng.standard_normal((6, 2, 21)).astype(np.float32), rng.integers(-1, 3, (6, 2)).astype(np.int32)
    w = rng.standard_normal((3, 70, 21)).astype(np.float32)
    a, b, ids = input("a", (3, 70, 21)), input("b", (6, 2, 21)), input("ids", (6, 2), dtype="i32")
    turned = input("a", (3, 21, 70)).permute(0, 2, 1)
    for node, given in ((a, w), (turned, np.ascontiguousarray(w.transpose(0, 2, 1)))):
        step = compile(Graph(y=mul_mat_id(node, b, ids)), backend, CompileOptions(fuse=False)).bind()
        got = step.run({"a": given, "b": x, "ids": chosen})["y"]
        assert not got[chosen < 0].any()
        check(got[chosen >= 0], w[chosen[chosen >= 0]].astype(np.float64), x[chosen >= 0], int8=False)
        with pytest.raises(InputError, match="got 3$"):
            step.run({"a": given, "b": x, "ids": np.full((6, 2), 3, np.int32)})


def test_rows_that_are_not_finite_give_results_that_are_not() -> None:
    array, _ = weights("q4_1", 16, 64)
    step = bound(mul_mat(constant("a", shape=(16, 64), dtype="q4_1"), input("b", (T, 64))), "cpu", array)
    x = np.ones((8, 64), np.float32)
    x[1, 3], x[2, 40], x[5, 0] = np.nan, np.inf, -np.inf
    finite = np.isfinite(step.run({"b": x})["y"])
    np.testing.assert_array_equal(finite.all(axis=1), [True, False, False, True, True, False, True, True])
    assert not finite[[1, 2, 5]].any()


AVX2 = TARGETS["avx2"]
AVX_VNNI = replace(AVX2, name="avxvnni", features=f"{AVX2.features},+avxvnni", has=AVX2.has | {"avxvnni"})
FORMS = [(t, t.vector_bytes // 4) for t in (host(), *TARGETS.values(), AVX_VNNI) if can_run(t)] + [(host(), 2)]


@pytest.mark.parametrize("most", [1, 3, 15, 24, 31, 63, 86, 127, 128, 255])
@pytest.mark.parametrize(("target", "lanes"), FORMS, ids=lambda v: getattr(v, "name", v))
def test_dot_products_of_bytes(target: Target, lanes: int, most: int) -> None:
    """Halves of a block of 32 in each lane with factors of their own, and a whole one without, to the last bit.

    Two lanes take the form that needs nothing of the target.
    """
    k = Function("kernel", {"codes": PTR, "four": PTR, "factors": PTR, "y": PTR}, target)
    at, x, f, y = k.parameters.values()
    dot = byte_dot(k, most, lanes)
    whole = I32.x(lanes)
    for n, count in enumerate((2, 1)):
        total, sums = k.const(-70_000, whole), ()
        for g in range(8):
            sums = dot.add(sums, dot.of_codes(k.load(at + 4 * lanes * g, I8.x(4 * lanes))), dot.of_row(x, g))
            if (g + 1) % min(dot.run, 8 // count) == 0:
                factor = dot.of_factor(k.load(f + g // 4 * 4 * lanes, whole)) if count == 2 else None
                total, sums = dot.close(sums, factor, total), ()
        k.store(total, y + 4 * lanes * n)
    jit = Jit(target, None)
    run = ctypes.CFUNCTYPE(None, *(ctypes.c_void_p,) * 4)(jit.compile([k.text()])[0])
    rng = np.random.default_rng(7)
    for codes in (rng.integers(0, most + 1, (8, lanes, 4), np.uint8), np.full((8, lanes, 4), most, np.uint8)):
        for row in (rng.integers(-127, 128, (8, 4), np.int8), *(np.full((8, 4), v, np.int8) for v in (127, -127))):
            for factors in (rng.integers(-128, 128, (2, lanes), np.int32), np.full((2, lanes), -128, np.int32)):
                got = np.zeros((2, lanes), np.int32)
                run(codes.ctypes.data, row.ctypes.data, factors.ctypes.data, got.ctypes.data)
                halves = codes.astype(np.int64).reshape(2, 4, lanes, 4), row.astype(np.int64).reshape(2, 4, 4)
                each = np.einsum("hglb,hgb->hl", *halves)
                np.testing.assert_array_equal(got, [np.sum(each * factors, 0) - 70_000, np.sum(each, 0) - 70_000])


def test_the_instruction_for_four_bytes_is_used_where_there_is_one() -> None:
    k = Function("kernel", {"at": PTR}, AVX_VNNI)
    (at,) = k.parameters.values()
    dot = byte_dot(k, 255, 8)
    sums = dot.add((), dot.of_codes(k.load(at, I8.x(32))), dot.of_row(at, 0))
    k.store(dot.close(sums, None, k.load(at, I32.x(8))), at)
    assert "{vex}" in (text := Jit(AVX_VNNI, None).assembly(k.text())) and "vpdpbusd" in text


def test_which_types_are_multiplied_in_int8() -> None:
    assert {name for name, exact in ON_HOST if is_int8(name, exact)} == {"q4_0", "q4_1", "q8_0", "q5_1", "q4_k", "q6_k"}
