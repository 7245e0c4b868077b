"""Dot products of bytes to the last bit, and that the code of targets which do not run here can be made."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu import weights as packing
from tensorgraph.backends.cpu.constants import Held
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.int8 import byte_dot
from tensorgraph.backends.cpu.ir import I8, I32, PTR
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.program import OperandKey, Recipe, write_kernel
from tensorgraph.backends.cpu.target import TARGETS, Target, can_run, host
from tensorgraph.backends.cpu.weights import write_units
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.graph import constant, input
from tensorgraph.ops import mul_mat, reglu
from tensorgraph.ops.formats import FORMATS
from tests.backends.cpu.emulated import EMULATED, emulation
from tests.backends.cpu.products import TYPES, T, bound, cases_of, is_int8

AVX2, X86 = TARGETS["avx2"], TARGETS["avx512"]
AVX_VNNI = replace(AVX2, name="avxvnni", features=f"{AVX2.features},+avxvnni", has=AVX2.has | {"avxvnni"})
VNNI = replace(X86, name="vnni", features=f"{X86.features},+avx512vnni", has=X86.has | {"vnni"})
ALL = [t for t in (host(), *TARGETS.values(), AVX_VNNI) if can_run(t)] + [*EMULATED.values()]
FORMS = [(t, t.vector_bytes // 4) for t in ALL] + [(host(), 2)]


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    with emulation():
        yield


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


class Writer(CpuDevice):
    """Takes down which kernels are wanted for a target, and makes none."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target, self.wanted = target, list[Recipe]()

    def kernels(self, recipes: Sequence[Recipe]) -> list[int]:
        self.wanted += recipes
        raise InterruptedError

    def upload(self, array: np.ndarray, dtype: DType, *, constant: bool = False, layout: str = "dense") -> Any:
        return Held(np.zeros(64, np.uint8), layout, (37, 512)) if constant else array


def texts_of(target: Target, name: str, exact: bool) -> list[str]:
    """Kernels of one type of weights: what packs it, products with one row, few and many, and of two weights side by side."""
    width = as_dtype(name).block_size * 2 if as_dtype(name).is_block else 50
    device, b = Writer(target), input("b", (T, width))
    of = [mul_mat(constant(n, shape=(37, width), dtype=name), b) for n in "wv"]
    raw = np.zeros((37, as_dtype(name).size_bytes(width)), np.uint8)
    raw = raw if as_dtype(name).is_block else raw.view(as_dtype(name).numpy)
    for node in (of[0], reglu(*of)):
        step = bound(node, device, exact=exact, fuse=True, w=raw, v=raw)
        for n in (1, 3, 9):
            with pytest.raises(InterruptedError):
                step.run({"b": np.zeros((n, width), np.float32)})
    source = as_dtype(name) if name in packing.FORMS else as_dtype("f32")
    keys = (
        OperandKey("source", "u8" if source.is_block else source.name, "dense", (None,) * 3, (None, None, 1), False),
        OperandKey("to", "u8", "dense", (1,), (1,), False),
    )
    recipes = dict.fromkeys([*device.wanted, Recipe(write_units, ("source", "to"), keys, (("dtype", source.name),))])
    assert len(recipes) >= 8
    return [write_kernel(Kernel(target), recipe) for recipe in recipes]


FOREIGN = [VNNI, X86, AVX_VNNI, TARGETS["aarch64"]]
OF_BYTES = {
    "vnni": (r"vpdpbusd\b.*zmm", "pmaddubs"),
    "avx512": (r"vpmadd(ubsw|wd)\b.*zmm", "pdpb"),
    "avxvnni": (r"vpdpbusd\b.*ymm", "pmaddubs"),
}
"""What assembly of products with int8 has in it, and what it has not."""
FAST = [(VNNI, name, False) for name in FORMATS] + [(t, n, False) for t in (X86, AVX_VNNI) for n in ("q8_0", "q6_k", "iq4_xs")]
EVERY = [(t, *case) for t in FOREIGN for case in cases_of(TYPES)]


@pytest.mark.parametrize(
    ("target", "name", "exact"),
    [pytest.param(*c, marks=[] if c in FAST else pytest.mark.deep) for c in EVERY],
    ids=lambda v: getattr(v, "name", v),
)
def test_code_for_other_machines(target: Target, name: str, exact: bool) -> None:
    """An instruction that the target lacks would end the compiler."""
    texts, jit = texts_of(target, name, exact), Jit(target, None)
    products = [text for text in texts if re.search(r"llvm\.x86\.avx512\.(vpdp|pmadd)", text)]
    has, has_not = OF_BYTES.get(target.name, ("", "none"))
    assert all(jit.objects([text for text in texts if text not in products[::4]]))
    assert len(products) == (5 if has and is_int8(name, exact) else 0)
    for text in products[::4]:
        code = jit.assembly(text)
        assert re.search(has, code) and not re.search(has_not, code)
