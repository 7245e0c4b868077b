"""concat, repeat and cont against index arithmetic."""

from __future__ import annotations

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


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(("before", "after"), [((0, 0, 0), (0, 0, 0)), ((1, 0, 2), (0, 3, 4)), ((2, 3, 4), (2, 3, 4))])
def test_pad(before: tuple[int, ...], after: tuple[int, ...], circular: bool) -> None:
    x = np.arange(1, 25, dtype=np.int32).reshape(2, 3, 4)
    got = run_op("pad", x, before=before, after=after, circular=circular)
    assert got.shape == tuple(n + low + high for n, low, high in zip(x.shape, before, after, strict=True))
    for i in np.ndindex(got.shape):
        at = [j - low for j, low in zip(i, before, strict=True)]
        inside = all(0 <= j < n for j, n in zip(at, x.shape, strict=True))
        want = x[tuple(j % n for j, n in zip(at, x.shape, strict=True))] if circular or inside else 0
        assert got[i] == want


def test_pad_of_the_last_axes_and_its_refusals() -> None:
    t = Dim("T", 8)
    x = input("x", [t, 4])
    assert ops.pad(x, before=(1,), after=(2,)).shape == (t, 7)
    assert ops.pad(x, after=(2, 0)).shape == (t + 2, 4)
    assert ops.pad(x, before=(4,), circular=True).attrs["before"] == (0, 4)
    for wrong in ((-1,), (1, 1, 1), (1.5,), (True,)):
        with pytest.raises(AttributeValueError, match=r"\[pad\] before must be numbers that are not negative"):
            ops.pad(x, before=wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"\[pad\] circular padding must be at most as long as its axis, for x \[T, 4\]; got"):
        ops.pad(x, before=(5,), circular=True)
    with pytest.raises(ShapeError, match=r"\[pad\] circular"):
        ops.pad(x, before=(1, 0), circular=True)
    with pytest.raises(DTypeError, match=r"\[pad\] x must not be of a block type; got q8_0"):
        ops.pad(input("x", [32], "q8_0"), before=(1,))


def test_cont_is_dense_and_its_own() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    got = run_op("cont", x.T)
    assert got.flags.c_contiguous
    assert got.tolist() == [[x[j, i] for j in range(3)] for i in range(4)]
    got[...] = -1
    assert x.tolist() == np.arange(12).reshape(3, 4).tolist()
