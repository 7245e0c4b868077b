"""Layout r16: what is packed is read back as its type's own decoder reads it, to the last bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (registers the block types)
from tensorgraph.backends.cpu import weights
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.ir import I64, PTR
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.target import TARGETS, Target, can_run, host
from tensorgraph.backends.cpu.weights import interleaved, load_r16_row, n_tiles, pack, unpack
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import InputError
from tensorgraph.ops.formats import FORMATS, decode
from tests.backends.cpu.emulated import EMULATED, emulation
from tests.ops.formats.extreme_blocks import extreme_codes, special_scales
from tests.ops.formats.peer_values import WITHOUT_PEER, assert_same_bits, peer_values

Array = np.ndarray[Any, Any]
FLOATS = ("f32", "f16", "bf16")
RUNNABLE = [target for target in (host(), *TARGETS.values()) if can_run(target)] + [EMULATED["wide"]]


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    with emulation():
        yield


def random_rows(dtype: DType, *shape: int, seed: int = 0) -> Array:
    """Any bits: infinite and undefined numbers too."""
    rng = np.random.default_rng(seed)
    *lead, width = shape
    n_bytes = dtype.size_bytes(width)
    raw = rng.integers(0, 256, (*lead, n_bytes), np.uint8)
    return raw if dtype.is_block else raw.view(dtype.numpy)


def values(array: Array, dtype: DType) -> Array:
    return decode(array, dtype) if dtype.is_block else array.astype(np.float32)


def assert_same(got: Array, want: Array) -> None:
    assert_same_bits(np.ascontiguousarray(got, np.float32), np.ascontiguousarray(want, np.float32))


BACKENDS = ["cpu", *(f"cpu:{name}" for name, target in TARGETS.items() if can_run(target)), "cpu:wide"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*FLOATS, *FORMATS])
def test_every_type_comes_back_as_it_is_decoded(name: str, backend: str) -> None:
    """By the `gguf` package, to the last bit: of any bits, of the largest and smallest codes, and of all sorts of scales."""
    device, dtype = CpuDevice(backend), as_dtype(name)
    width = 2 * dtype.block_size if dtype.is_block else 37
    array = random_rows(dtype, 2, 37, width)
    if dtype.is_block:
        ends = [made(name, 37, width).reshape(37, -1) for made in (extreme_codes, special_scales)]
        array = np.stack([*array, *ends])
    held = pack(array, dtype, "r16", device)
    assert held.address % 64 == 0 and held.shape == (len(array), 37, width)
    peer = dtype.is_block and name not in WITHOUT_PEER
    assert_same(unpack(held, dtype, device), peer_values(array, name) if peer else values(array, dtype))


AS_F32 = ("q2_k", "q3_k", "q6_k", "nvfp4", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m")
"""Types without a form of their own."""


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in AS_F32])
def test_block_types_stay_small(name: str) -> None:
    """A code takes 4 bits or 8, and its share of the scale and the minimum 4 more at most."""
    form = interleaved(as_dtype(name))
    assert form.codes is not None and form.unit_bytes * 8 <= 16 * form.block * (form.codes.bits + 2)


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (17, 32), (5, 3, 96), (2, 2, 33, 32), (0, 32), (3, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    device, dtype = CpuDevice(), as_dtype("q4_1")
    array = random_rows(dtype, *shape)
    assert_same(unpack(pack(array, dtype, "r16", device), dtype, device), values(array, dtype))


@pytest.mark.parametrize("name", ["f32", "bf16", "q8_0", "q4_k"])
def test_views_are_packed_as_they_are_seen(name: str) -> None:
    device, dtype = CpuDevice(), as_dtype(name)
    array = random_rows(dtype, 3, 40, 2 * max(dtype.block_size, 32))
    view = array[::-1, 1::2] if dtype.is_block else array[1:, ::-3, 5::2]
    assert not view.flags.c_contiguous
    assert_same(unpack(pack(view, dtype, "r16", device), dtype, device), values(np.ascontiguousarray(view), dtype))


@pytest.mark.parametrize("shape", [(2, 1100, 1024), (37, 40, 256)])
@pytest.mark.parametrize("name", ["q5_0", "q4_k", "nvfp4"])
def test_more_than_is_packed_or_decoded_at_once(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BATCH_BYTES", 1 << 17)
    monkeypatch.setattr(weights, "_DECODED", 1 << 18)
    device, dtype = CpuDevice(), as_dtype(name)
    array = random_rows(dtype, *shape)
    assert_same(unpack(pack(array, dtype, "r16", device), dtype, device), values(array, dtype))


def test_rows_behind_the_last_are_copies_of_it() -> None:
    device, dtype = CpuDevice(), as_dtype("f32")
    array = random_rows(dtype, 3, 5)
    units = pack(array, dtype, "r16", device).data.view(np.float32).reshape(5, 16)
    device.settle()
    assert_same(units, array[[0, 1, *[2] * 14]].T)


def test_other_arrays_are_converted_or_refused() -> None:
    device = CpuDevice()
    array = np.arange(6.0).reshape(2, 3)
    assert_same(unpack(pack(array, as_dtype("bf16"), "r16", device), as_dtype("bf16"), device), array.astype(ml_dtypes.bfloat16))
    with pytest.raises(InputError, match="wanted the bytes of q4_0 as uint8; got float64"):
        pack(array, as_dtype("q4_0"), "r16", device)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target, name, marks=[] if i % len(RUNNABLE) == n or name in FLOATS else pytest.mark.deep)
        for n, target in enumerate(RUNNABLE)
        for i, name in enumerate((*FLOATS, *FORMATS))
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_parts_of_a_row(name: str, target: Target) -> None:
    """4, 8 or 16 consecutive elements from any place."""
    dtype = as_dtype(name)
    rows, width = 19, max(dtype.block_size, 32)
    array = random_rows(dtype, 2, rows, width)
    device = CpuDevice()
    held, want = pack(array, dtype, "r16", device), values(array, dtype)
    device.settle()
    counts = (4, 8, 16) if dtype.is_block else (1, 4, 8, 16)
    k = Function("kernel", {"units": PTR, "to": PTR, "row": I64}, target)
    units, to, row = k.parameters.values()
    operand = Operand(k, dtype, (2, rows, width), (), units, "r16")
    for i, lanes in enumerate(counts):
        with k.loop(0, width, lanes) as loop:
            loop.next()
            k.store(load_r16_row(operand, row, loop.i, lanes), to + (loop.i + i * width) * 4)
    jit = Jit(target, None)
    run = ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 3)(jit.compile([k.text()])[0])
    for matrix in range(2):
        for at in (0, 1, 15, 16, 18):
            got = np.zeros((len(counts), width), np.float32)
            run(held.address, got.ctypes.data, matrix * n_tiles(rows) * 16 + at)
            assert_same(got, np.broadcast_to(want[matrix, at], got.shape))
