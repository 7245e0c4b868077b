"""Products of every type against float64: weights, activations, and by how much results may be off."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

import tensorgraph.ops  # noqa: F401  (registers the block types)
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.gemm import many_dot, rows_kind, slice_length
from tensorgraph.backends.cpu.int8 import has_words
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.matvec import kind_of
from tensorgraph.backends.cpu.weights import ROWS, interleaved
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import Device
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.ops import mul_mat
from tensorgraph.ops.formats import FORMATS, block_format, decode, random_blocks
from tensorgraph.ops.products.mul_mat_cpu import FEW
from tensorgraph.plan import Executable
from tests.ops.formats.extreme_blocks import extreme_codes, special_scales, with_scales

Array = np.ndarray[Any, Any]
FLOATS = ("f32", "f16", "bf16")
TYPES = (*FLOATS, *FORMATS)
ROUNDED = ("f16", "bf16")
"""Multiplied as whole numbers of 14 bits with many rows."""
How = Literal["int8", "fixed", "f32"]
MOST = {"int8": 127, "fixed": 8191}
"""Codes."""
EXACT_TO = 2.0**-20
"""Of the sum of the magnitudes that are added: a few roundings of f32."""
T = Dim("T", max=600)
ROW_COUNTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 127, 128, 129, 132, 133, 136, 137, 255, 256, 257, 265, 600)
"""Around 4, up to which all rows are taken at once; tiles of 2, 4, 6 or 8; pieces of 128 or 132."""
HEIGHT = 37  # three tiles of 16, the last one not whole
_TINY = 2.0**-128


def is_int8(name: str, exact: bool) -> bool:
    return kind_of(as_dtype(name), exact) == "int8"


def weights(name: str, *shape: int, deviation: float = 1.0) -> tuple[Array, Array]:
    """Random weights of a type, as in a file and as float64."""
    rng, dtype = np.random.default_rng(len(name) + sum(shape)), as_dtype(name)
    if not dtype.is_block:
        array = (rng.standard_normal(shape) * deviation).astype(dtype.numpy)
        return array, array.astype(np.float64)
    size = int(np.prod(shape)) // dtype.block_size
    array = random_blocks(dtype, size, deviation, rng).reshape(*shape[:-1], shape[-1] // dtype.block_size * dtype.block_bytes)
    return array, decode(array, dtype).astype(np.float64)


def how(name: str, exact: bool, n_rows: int, width: int, backend: str = "cpu") -> How:
    """The arithmetic of a product of one matrix of a type with so many rows."""
    if is_int8(name, exact):
        return "int8"
    target = CpuDevice(backend).target
    fixed = n_rows > FEW and width % 32 == 0 and not exact and has_words(target, target.vector_bytes // 4)
    return "fixed" if fixed and name in ROUNDED else "f32"


def quantised(x: Array, most: int = MOST["int8"]) -> Array:
    """Numbers as products see them in codes, by 32: scale times code."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32).astype(np.float32)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(most)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > _TINY)
    return (np.rint(blocks * inverse).astype(np.float64) * d).reshape(x.shape)


def check(got: Array, w: Array, x: Array, how: How) -> None:
    """w [..., M, K] and x [..., K] against [..., M]."""
    seen = quantised(x, MOST[how]) if how != "f32" else x.astype(np.float64)
    given, w = w, quantised(w, MOST[how]) if how == "fixed" else w
    want = np.einsum("...mk,...k->...m", w, seen, optimize=True)
    most = np.einsum("...mk,...k->...m", np.abs(w), np.abs(seen), optimize=True)
    assert got.dtype == np.float32 and got.shape == want.shape
    worst = np.max(np.abs(got - want) - EXACT_TO * most, initial=0.0)
    assert worst <= 1e-30, f"off by {worst} more than {EXACT_TO} of the magnitudes"
    if how != "f32":  # that this is the arithmetic it should be, and not that of floats
        plain = np.einsum("...mk,...k->...m", given, x, optimize=True)
        assert got.size < 64 or np.sum((got - want) ** 2) * 100 < np.sum((plain - want) ** 2)


def assert_same_bits(got: Array, want: Array, what: str) -> None:
    """Of f32, the sign of zero included; every NaN equals every other."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    differs = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
    assert not differs.any(), f"{what}: {differs.sum()} of {differs.size} differ, the first at {np.argwhere(differs)[0]}"


def bound(node: Node, backend: str | Device, *, exact: bool = False, fuse: bool = False, **given: Array) -> Executable:
    """A graph with its weights."""
    return compile(Graph(y=node), backend, CompileOptions(exact=exact, fuse=fuse)).bind(given)


def product(backend: str | Device, name: str, array: Array, width: int, *, exact: bool = False) -> Executable:
    """One matrix [..., M, width] of a type times the rows of b [T, width]."""
    shape = (*array.shape[:-1], width)
    return bound(mul_mat(constant("a", shape=shape, dtype=name), input("b", (T, width))), backend, exact=exact, a=array)


@cache
def slice_width(backend: str, name: str, exact: bool) -> int:
    """Elements of a slice, which many rows pass over at once."""
    k, dtype = Kernel(CpuDevice(backend).target), as_dtype(name)
    kind = rows_kind(k.target, [dtype], kind_of(dtype, exact), 0 if exact else 32)
    return slice_length(*many_dot(k, interleaved(dtype), kind, min(k.lanes, ROWS)))


def wide(backend: str, name: str, exact: bool, slices: int = 1) -> int:
    """The least width with a part of one slice more; odd where the type and the arithmetic allow it."""
    size, fixed = as_dtype(name).block_size, how(name, exact, T.max, 32, backend) == "fixed"
    size = 32 if fixed else size
    return (slice_width(backend, name, exact) * slices // size + 1) * size + (2 if size == 1 else 0)


def activations(rng: np.random.Generator, *shape: int) -> Array:
    """Rows of sizes from 1e-3 to 1e3, in one of them a block of zeros."""
    x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, (*shape[:-1], 1))).astype(np.float32)
    x[shape[0] // 2 : shape[0] // 2 + 1, ..., :32] = 0
    return x


# Every number of rows.


def assert_rows_are_right(backend: str, name: str, exact: bool, width: int) -> Array:
    """Each of ROW_COUNTS; in int8 to the last bit as if all rows had come at once. The results for all of them."""
    array, w = weights(name, HEIGHT, width)
    step = product(backend, name, array, width, exact=exact)
    x = activations(np.random.default_rng(1), T.max, width)
    most: Array = step.run({"b": x})["y"]
    check(most, w, x, how(name, exact, T.max, width, backend))
    for n in ROW_COUNTS:
        got = step.run({"b": x[T.max - n :]})["y"]
        arithmetic = how(name, exact, n, width, backend)
        if arithmetic != "f32":
            assert_same_bits(got, most[T.max - n :], f"{n} rows")
        else:
            check(got, w, x[T.max - n :], "f32")
    return most


# The largest and smallest codes and factors.


def outermost(name: str, width: int) -> tuple[Array, Array, Array]:
    """Codes and factors at their ends, each with each; what they are worth as whole numbers, and no less than the magnitudes of
    what such a value is the sum of."""
    whole, fields = extreme_codes(name, HEIGHT, width), block_format(name).scales

    def worth(blocks: Array) -> Array:
        return decode(blocks.reshape(HEIGHT, -1), name).astype(np.float64)

    parts = worth(whole)
    most = np.abs(parts)
    if len(fields) == 2:  # a scale and a minimum
        most = np.abs(worth(with_scales(name, whole, 1.0, 0.0))) + np.abs(worth(with_scales(name, whole, 0.0, 1.0)))
    assert np.array_equal(parts, np.rint(parts))
    return whole.reshape(HEIGHT, -1), parts, most


def outermost_rows(width: int) -> Array:
    """Activations that are their own codes of 8 bits: the largest of all signs, in rows, halves of blocks and few blocks."""
    i = np.arange(width)
    signs = [np.ones(width), -np.ones(width)]
    signs += [np.where(i // n % 2, -1, 1) for n in (1, 2, 4, 16, 32)]
    signs += [np.random.default_rng(5).choice((-1, 1), width) for _ in range(2)]
    kept = [np.ones(width), i % 32 < 16, i % 32 >= 16, i < 32, (i >= width - 32) & (i % 32 >= 16), i % 32 == 31]
    rows = np.array([s * k for k in kept for s in signs]) * 127
    small = np.random.default_rng(6).integers(-127, 128, (3, width))
    small[:, ::32] = 127
    return np.concatenate([rows, small]).astype(np.float32)


def assert_nothing_overflows(backend: str, name: str, exact: bool) -> None:
    """Sums of whole numbers that f32 holds are exact, all others within rounding."""
    width = wide(backend, name, exact)
    array, w, parts = outermost(name, width)
    x = outermost_rows(width)
    step = product(backend, name, array, width, exact=exact)
    got: Array = step.run({"b": x})["y"]
    want, most = x.astype(np.float64) @ w.T, np.abs(x.astype(np.float64)) @ parts.T
    held = most < 2.0**24
    assert held.mean() > 0.3
    rounding = EXACT_TO if is_int8(name, exact) else width * 2.0**-24  # equal numbers added one by one
    differs = np.where(held, got != want, np.abs(got - want) > rounding * most)
    at = np.argwhere(differs)[:1]
    assert not differs.any(), f"{differs.sum()} of {differs.size} sums are wrong, the first of row {at}"
    for first in range(0, len(x), 4):
        assert_same_bits(step.run({"b": x[first : first + 4]})["y"] + 0, got[first : first + 4] + 0, "4 rows and many")


# Scales and activations that are very large or small, or no numbers.

MOST_TOTAL = 32 * 255 * 127 * 128
"""Of a block, to be multiplied by scales that may be subnormal."""
SMALL = {"nvfp4": 2.0**-6}
"""Deviations of types that have none of 2^-10."""


def assert_special_numbers_stay_in_their_rows(backend: str, name: str, exact: bool) -> None:
    """What is not finite gives what is not, of its own row of weights or activations; all else is as if it were not there."""
    width = wide(backend, name, exact)
    array, w = weights(name, HEIGHT, width, deviation=SMALL.get(name, 2.0**-10))
    if as_dtype(name).is_block:
        array = special_scales(name, HEIGHT, width).reshape(HEIGHT, -1)
        w = decode(array, name).astype(np.float64)
    else:
        array[3, -1], array[20, 0], array[36, width // 2], array[5] = np.inf, np.nan, -np.inf, 0
        w = array.astype(np.float64)
    step = product(backend, name, array, width, exact=exact)
    x = activations(np.random.default_rng(9), 12, width)
    good = np.isfinite(w).all(axis=1)
    assert 4 < good.sum() and (not good.all() or name in ("mxfp4", "nvfp4"))
    for rows in (x, x[:3], x[:1]):
        got = step.run({"b": rows})["y"]
        check(got[:, good], w[good], rows, how(name, exact, len(rows), width, backend))
        assert not np.isfinite(got[:, ~good]).any()
    fine = step.run({"b": x})["y"]
    for value in (np.nan, np.inf, -np.inf):
        odd = x.copy()
        odd[2, width - 1], odd[7, 0] = value, value
        got = step.run({"b": odd})["y"]
        assert not np.isfinite(got[[2, 7]]).any()
        others = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
        assert_same_bits(got[others], fine[others], "rows beside those that are not finite")


def assert_any_size_is_right(backend: str, name: str, exact: bool) -> None:
    """From subnormal activations, which count as zeros in int8, to those whose sums are just below the largest number."""
    width = wide(backend, name, exact)
    array, w = weights(name, HEIGHT, width, deviation=SMALL.get(name, 2.0**-10))
    step = product(backend, name, array, width, exact=exact)
    rng = np.random.default_rng(10)
    sizes = 10.0 ** np.array([-45, -42, -40, -38, -37.5, -37, -36.5, -36, -35, -30, -20, 20, 30, 34, 35])
    x = (rng.uniform(-1, 1, (len(sizes), width)) * sizes[:, None]).astype(np.float32)
    got = step.run({"b": x})["y"]
    assert np.isfinite(got).all()
    large = sizes > 1e-21
    arithmetic = how(name, exact, len(x), width, backend)
    check(got[large], w, x[large], arithmetic)
    seen, total = quantised(x, MOST[arithmetic]) if arithmetic != "f32" else x.astype(np.float64), MOST_TOTAL
    if arithmetic == "fixed":
        w, total = quantised(w, MOST["fixed"]), 32 * MOST["fixed"] ** 2
    for row, values in zip(got, seen, strict=True):  # by rounding, and by what underflows
        off = np.abs(row - w @ values)
        most = EXACT_TO * (np.abs(w) @ np.abs(values)) + width // 32 * 2.0**-150 * total
        assert np.all(off <= most), f"off by {np.max(off - most)} more than rounding and what underflows"


def assert_type_is_right(backend: str, name: str, exact: bool) -> Array:
    """All of the above."""
    if as_dtype(name).is_block:
        assert_nothing_overflows(backend, name, exact)
    assert_special_numbers_stay_in_their_rows(backend, name, exact)
    assert_any_size_is_right(backend, name, exact)
    return assert_rows_are_right(backend, name, exact, wide(backend, name, exact))


def cases_of(names: Sequence[str]) -> list[tuple[str, bool]]:
    """Each type as it is, and those that are rounded in f32 too."""
    return [(name, exact) for name in names for exact in (False, True) if not exact or is_int8(name, False) or name in ROUNDED]
