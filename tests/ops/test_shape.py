"""concat, repeat and cont against index arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tensorgraph import ops
from tensorgraph.compiler import run_op
from tensorgraph.dims import Dim
from tensorgraph.errors import AttributeValueError, DTypeError, GraphError, ShapeError
from tensorgraph.graph import input


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_concat(axis: int) -> None:
    rng = np.random.default_rng(0)
    lengths = (2, 0, 3, 1)
    parts = []
    for n in lengths:
        shape = [4, 5, 6]
        shape[axis] = n
        parts.append(rng.integers(0, 99, shape).astype(np.int32))
    got = np.moveaxis(run_op("concat", *parts, axis=axis), axis, 0)
    entries = [entry for part in parts for entry in np.moveaxis(part, axis, 0)]
    assert len(got) == sum(lengths)
    for mine, entry in zip(got, entries, strict=True):
        np.testing.assert_array_equal(mine, entry)


def test_concat_with_runtime_extents() -> None:
    t, s = Dim("T", 8), Dim("S", 64)
    assert ops.concat(input("a", [t, 4]), input("b", [s, 4]), axis=0).shape == (t + s, 4)
    assert ops.concat(input("a", [t, 4]), input("b", [t, 3])).shape == (t, 7)
    with pytest.raises(ShapeError, match=r"\[concat\] x1 must be \[T, 4\], of any length on axis 1; got \[S, 3\]"):
        ops.concat(input("a", [t, 4]), input("b", [s, 3]), axis=1)


def test_concat_refusals() -> None:
    a = input("a", [2, 3])
    with pytest.raises(ShapeError, match=r"x2 must be \[2, 3\], of any length on axis 0; got \[2\]"):
        ops.concat(a, a, input("b", [2]), axis=0)
    with pytest.raises(DTypeError, match=r"\[concat\] x1 must be f32, as x0; got f16"):
        ops.concat(a, input("b", [2, 3], "f16"))
    with pytest.raises(ShapeError, match=r"\[concat\] axis must be one of \[2, 3\]; got 2"):
        ops.concat(a, a, axis=2)
    with pytest.raises(GraphError, match=r"at least one"):
        ops.concat()


@pytest.mark.parametrize("shape", [(2, 3), (4, 3), (2, 9), (6, 6), (5, 2, 3), (2, 4, 3), (0, 3), (2, 0)])
def test_repeat_tiles(shape: tuple[int, ...]) -> None:
    x = np.arange(6, dtype=np.int32).reshape(2, 3)
    got = run_op("repeat", x, shape=shape)
    assert got.shape == shape
    for i in np.ndindex(shape):
        assert got[i] == x[i[-2] % 2, i[-1] % 3]


def test_repeat_refusals_and_runtime_extents() -> None:
    t = Dim("T", 8)
    assert ops.repeat(input("x", [t, 1]), shape=(3 * t, 4)).shape == (3 * t, 4)
    for shape in ((3, 3), (2,), (2, 4)):
        with pytest.raises(ShapeError, match=r"\[repeat\] shape must be a multiple of \[2, 3\] on every axis; got"):
            ops.repeat(input("x", [2, 3]), shape=shape)
    with pytest.raises(ShapeError, match=r"\[repeat\]"):
        ops.repeat(input("x", [0, 3]), shape=(2, 3))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize(("before", "after"), [((0, 0, 0), (0, 0, 0)), ((1, 0, 2), (0, 2, 3)), ((1, 2, 3), (1, 2, 3))])
def test_pad(before: tuple[int, ...], after: tuple[int, ...], mode: str) -> None:
    x = np.arange(1, 25, dtype=np.int32).reshape(2, 3, 4)
    got = run_op("pad", x, before=before, after=after, mode=mode)
    assert got.shape == tuple(n + low + high for n, low, high in zip(x.shape, before, after, strict=True))
    ways: dict[str, Callable[[int, int], int]] = {
        "zeros": lambda j, n: j if 0 <= j < n else -1,
        "circular": lambda j, n: j % n,
        "reflect": lambda j, n: -j if j < 0 else j if j < n else 2 * (n - 1) - j,
    }
    for i in np.ndindex(got.shape):
        at = tuple(ways[mode](j - low, n) for j, low, n in zip(i, before, x.shape, strict=True))
        assert got[i] == (0 if min(at) < 0 else x[at])


def test_pad_of_the_last_axes_and_its_refusals() -> None:
    t = Dim("T", 8)
    x = input("x", [t, 4])
    assert ops.pad(x, before=(1,), after=(2,)).shape == (t, 7)
    assert ops.pad(x, after=(2, 0)).shape == (t + 2, 4)
    assert ops.pad(x, before=(4,), mode="circular").attrs["before"] == (0, 4)
    for wrong in ((-1,), (1, 1, 1), (1.5,), (True,)):
        with pytest.raises(AttributeValueError, match=r"\[pad\] before must be numbers that are not negative"):
            ops.pad(x, before=wrong)  # type: ignore[arg-type]
    with pytest.raises(AttributeValueError, match=r"\[pad\] after must be tuple; got 3"):
        ops.pad(x, after=3)  # type: ignore[arg-type]
    assert ops.pad(x, after=np.array([1, 2])).attrs["after"] == (1, 2)  # type: ignore[arg-type]
    for mode, most in (("circular", 4), ("reflect", 3)):
        assert ops.pad(x, after=(most,), mode=mode).shape == (t, 4 + most)
        for many in ((most + 1,), (1, 0)):
            with pytest.raises(ShapeError, match=rf"\[pad\] {mode} wanted an axis of x \[T, 4\] that has so many"):
                ops.pad(x, before=many, mode=mode)
    with pytest.raises(AttributeValueError, match=r"\[pad\] mode must be one of"):
        ops.pad(x, before=(1,), mode="edge")
    with pytest.raises(DTypeError, match=r"\[pad\] x must not be of a block type; got q8_0"):
        ops.pad(input("x", [32], "q8_0"), before=(1,))


@pytest.mark.parametrize("shifts", [(0, 0, 0), (1, -1, 2), (-7, 5, 0), (0, 0, 4)])
def test_roll(shifts: tuple[int, ...]) -> None:
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    got = run_op("roll", x, shifts=shifts)
    for i in np.ndindex(x.shape):
        assert got[tuple((j + by) % n for j, by, n in zip(i, shifts, x.shape, strict=True))] == x[i]


def test_roll_shapes_and_refusals() -> None:
    x = input("x", [Dim("T", 8), 4])
    assert ops.roll(x, shifts=(3,)).attrs["shifts"] == (0, 3)
    with pytest.raises(ShapeError, match=r"\[roll\] wanted a known length of every axis that is rolled; got shifts \(1, 0\)"):
        ops.roll(x, shifts=(1, 0))
    with pytest.raises(AttributeValueError, match=r"\[roll\] shifts must be whole numbers, at most one for each axis"):
        ops.roll(x, shifts=(1, 1, 1))
    for alone in (3, np.array(3)):
        with pytest.raises(AttributeValueError, match=r"\[roll\] shifts must be tuple; got"):
            ops.roll(x, shifts=alone)  # type: ignore[arg-type]
    assert ops.roll(x, shifts=np.array([3])).attrs["shifts"] == (0, 3)  # type: ignore[arg-type]


def test_diagonals_and_triangles() -> None:
    x = np.arange(1, 16, dtype=np.float32).reshape(3, 5)
    by_kind: dict[str, Callable[[int, int], bool]] = {
        "upper_diag": lambda r, c: c >= r,
        "upper": lambda r, c: c > r,
        "lower_diag": lambda r, c: c <= r,
        "lower": lambda r, c: c < r,
    }
    for kind, keeps in by_kind.items():
        want = [[x[r, c] if keeps(r, c) else 0 for c in range(5)] for r in range(3)]
        assert run_op("tri", x, kind=kind).tolist() == want
    for name, other in (("diag_mask_inf", -math.inf), ("diag_mask_zero", 0.0)):
        want = [[x[r, c] if c <= r + 1 else other for c in range(5)] for r in range(3)]
        assert run_op(name, x, n_past=1).tolist() == want
    assert run_op("diag", x[1:2]).tolist() == [[x[1, c] if c == r else 0 for c in range(5)] for r in range(5)]
    t = Dim("T", 8)
    assert ops.diag(input("x", [3, 1, t])).shape == (3, t, t)
    with pytest.raises(ShapeError, match=r"\[diag\] x must be \[1, 5\]; got \[3, 5\]"):
        ops.diag(input("x", [3, 5]))
    with pytest.raises(AttributeValueError, match=r"\[tri\] kind must be one of"):
        ops.tri(input("x", [3, 5]), kind="middle")


@pytest.mark.parametrize(("name", "of_a"), [("set", 0), ("acc", 1)])
def test_windows(name: str, of_a: int) -> None:
    a, b = np.arange(40, dtype=np.float32).reshape(2, 4, 5), np.full((1, 2, 3), 100, np.float32)
    got = run_op(name, a, b, offset=(1, 2, 0))
    for i in np.ndindex(a.shape):
        inside = i[0] == 1 and i[1] >= 2 and i[2] < 3
        assert got[i] == (100 + of_a * a[i] if inside else a[i])
    assert run_op(name, a, b, offset=(2, 2)).shape == a.shape


def test_windows_lie_within() -> None:
    t, s = Dim("T", 8), Dim("S", 8)
    a = input("a", [t, 4])
    assert ops.set(a, input("b", [t, 2]), offset=(1,)).shape == (t, 4)
    assert ops.acc(input("a", [t + 3, 4]), input("b", [t, 4]), offset=(2, 0)).shape == (t + 3, 4)
    for b, offset in (([t, 2], (0, 3)), ([t, 2], (1, 0)), ([s, 4], (0, 0)), ([4], ())):
        with pytest.raises(ShapeError, match=r"\[set\] b must lie within a \[T, 4\], from .* on; got"):
            ops.set(a, input("b", b), offset=offset)
    with pytest.raises(AttributeValueError, match=r"\[acc\] offset must be numbers that are not negative"):
        ops.acc(a, input("b", [t, 2]), offset=(-1,))
    with pytest.raises(DTypeError, match=r"\[set\] b must be f32, as a, and no block type; got f16"):
        ops.set(a, input("b", [t, 2], "f16"))


def test_cont_is_dense_and_its_own() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    got = run_op("cont", x.T)
    assert got.flags.c_contiguous
    assert got.tolist() == [[x[j, i] for j in range(3)] for i in range(4)]
    got[...] = -1
    assert x.tolist() == np.arange(12).reshape(3, 4).tolist()
