"""Order and selection against NumPy's stable sort, for rows of many tiles, on every target that runs here."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu.ir import F32, F64, I32, I64, Type, Value
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.kernel import HEADER, Kernel
from tensorgraph.backends.cpu.sorting import (
    AHEAD,
    TILE,
    Least,
    key_type,
    least_bytes,
    lowest_key,
    ordered_key,
    running,
    sort_bytes,
    sorted_positions,
)
from tensorgraph.backends.cpu.target import TARGETS, Target, can_run, host

Array = np.ndarray[Any, Any]
RUNNABLE = [target for target in (host(), *TARGETS.values()) if can_run(target)]
TYPES: dict[str, Type] = {"float32": F32, "float64": F64}
on_every_target = pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)
in_both_types = pytest.mark.parametrize("dtype", TYPES)

BEYOND = 64  # bytes after a kernel's memory, which it must leave alone


@cache
def jit(target: Target) -> Jit:
    return Jit(target, None)


def call(target: Target, text: str, *arrays: Array) -> None:
    """Run a kernel whose arguments are the addresses of arrays."""
    args = np.array([0] * len(HEADER) + [a.ctypes.data for a in arrays], np.int64)
    (address,) = jit(target).compile([text])
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_bool)(address)
    kernel(args.ctypes.data, 0, 0, 1, True)


def memory_of(n_bytes: int) -> Array:
    return np.full(n_bytes + BEYOND, 77, np.uint8)


def rows(seed: int, n: int, kind: str, dtype: str) -> Array:
    """Numbers in no order, rising, falling, few different ones, or with everything that is special."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    if kind == "rising":
        x = np.sort(x)
    elif kind == "falling":
        x = np.sort(x)[::-1]
    elif kind == "ties":
        x = np.maximum(np.round(x), 0)
    elif kind == "special":
        x = np.where(rng.random(n) < 0.5, rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-310, -1e-42, 1e38], n), x)
    return np.ascontiguousarray(x.astype(dtype))


cases = st.tuples(
    st.integers(0, 2**32 - 1),
    st.sampled_from((0, 1, 3, 16, 127, 128, 129, 256, TILE, TILE + 1, 5000, 20000)),
    st.sampled_from(("random", "rising", "falling", "ties", "special")),
)


@cache
def sort_text(target: Target, dtype: str, descending: bool, at_most: int | None) -> str:
    """x [n] in, its order out; `at_most` is n's bound where the code knows one."""
    k, type = Kernel(target), TYPES[dtype]
    x, length, keys, memory, y = (k.slot() for _ in range(5))
    n, key = k.load(length, I64), key_type(type)

    def write(i: Value, mask: Value | None, _: list[Value]) -> None:
        v = k.load(x + i * type.size_bytes, type.x(k.lanes), mask=mask)
        k.store(ordered_key(k, v, descending=descending), keys + i * key.size_bytes, mask=mask)

    k.sweep(n, write)
    order = sorted_positions(k, keys, key, n, n if at_most is None else at_most, memory)
    with k.loop(0, n) as loop:
        loop.next()
        k.store(k.load(order + loop.i * 4, I32), y + loop.i * 4)
    return k.text()


@on_every_target
@in_both_types
@given(case=cases, descending=st.booleans())
@settings(deadline=None, max_examples=15)
def test_order(target: Target, dtype: str, case: tuple[int, int, str], descending: bool) -> None:
    seed, n, kind = case
    x, y, keys = rows(seed, n, kind, dtype), np.full(n + 1, -7, np.int32), np.zeros(n + AHEAD, np.int64)
    needed = sort_bytes(max(n, 129))  # the code holds both ways of sorting
    memory = memory_of(needed)
    text = sort_text(target, dtype, descending, n if n in (3, 128) else None)
    call(target, text, x, np.array([n], np.int64), keys, memory, y)
    np.testing.assert_array_equal(y[:n], np.argsort(-x if descending else x, kind="stable"))
    assert y[n] == -7 and np.all(memory[needed:] == 77)


@cache
def select_text(target: Target, dtype: str, best: int) -> str:
    """x [n] in, offered by tiles; the numbers of the `best` largest out."""
    k, type = Kernel(target), TYPES[dtype]
    x, length, memory, y = (k.slot() for _ in range(4))
    n, least = k.load(length, I64), Least(k, memory, best, key_type(type))
    with k.loop(0, n, TILE, least.begin(lowest_key(least.type))) as loop:

        def key(i: Value, mask: Value | None) -> tuple[Value, Value]:
            at = loop.i + i
            v = k.load(x + at * type.size_bytes, type.x(least.lanes), mask=mask)
            return ordered_key(k, v, descending=True), k.lane_numbers(least.lanes) + k.narrow(at, I32)

        left = n - loop.i
        loop.next(*least.cut(least.offer(k.min(left, TILE), key, loop.values), left.le(TILE)))
    least.write(loop.results, lambda place, number: k.store(number, y + place * 4))
    return k.text()


@on_every_target
@in_both_types
@given(case=cases, best=st.sampled_from((1, 8, 200, 2048)))
@settings(deadline=None, max_examples=20)
def test_selection(target: Target, dtype: str, case: tuple[int, int, str], best: int) -> None:
    seed, n, kind = case
    x, y = rows(seed, n, kind, dtype), np.full(best + 1, -7, np.int32)
    needed = least_bytes(best, key_type(TYPES[dtype]))
    memory = memory_of(needed)
    call(target, select_text(target, dtype, best), x, np.array([n], np.int64), memory, y)
    able = np.flatnonzero(x > -np.inf)
    chosen = able[np.argsort(-x[able], kind="stable")][:best]
    np.testing.assert_array_equal(y[:best], np.pad(chosen, (0, best - len(chosen)), constant_values=-1))
    assert y[best] == -7 and np.all(memory[needed:] == 77)


@on_every_target
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_running_sums(target: Target, lanes: int) -> None:
    k = Kernel(target)
    x, y = k.slot(), k.slot()
    k.store(running(k, k.load(x, F64.x(lanes))), y)
    given, got = np.random.default_rng(lanes).integers(-99, 99, lanes).astype(np.float64), np.zeros(lanes)
    call(target, k.text(), given, got)
    np.testing.assert_array_equal(got, np.cumsum(given))
