"""Rows and elements by number against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import run_op
from tensorgraph.dims import Dim
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import AttributeValueError, DTypeError, InputError, ShapeError
from tensorgraph.graph import constant, input
from tensorgraph.op import Op
from tensorgraph.ops.elementwise.cast import SCALARS
from tensorgraph.ops.formats import FORMATS, decode, encode
from tensorgraph.ops.rows import gather, get_rows, scatter, set_rows
from tests.ops.evaluate import evaluate

Array = np.ndarray[Any, Any]
few = settings(deadline=None, max_examples=40)


@few
@given(data=st.data())
def test_get_rows(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch = data.draw(st.sampled_from([(), (2,), (1, 3), (0,), (2, 2)]))
    m, n, r = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    a, ids = rng.standard_normal((*batch, m, n)), rng.integers(-1, m, (*batch, r))
    want = np.zeros((*batch, r, n))
    for at in np.ndindex(*batch, r):
        if ids[at] >= 0:
            want[at] = a[(*at[:-1], ids[at])]
    got = get_rows.compute({"a": a, "ids": ids}, {})
    assert got.shape == want.shape and np.array_equal(got, want)


def test_get_rows_shapes_types_and_bounds() -> None:
    t = Dim("T", 64)
    ids = input("ids", (t,), "i32")
    assert get_rows(input("w", (1000, 32), "q4_0"), ids).shape == (t, 32)
    assert get_rows(input("w", (1000, 32), "q4_0"), ids).dtype.name == "f32"
    assert get_rows(input("w", (1000, 32), "bf16"), ids).dtype.name == "f32"
    assert get_rows(input("tid2eid", (1000, 6), "i32"), ids).dtype.name == "i32"
    assert get_rows(input("w", (t, 8, 5)), input("ids", (t, 2), "i64")).shape == (t, 2, 5)
    with pytest.raises(DTypeError, match="ids must be int; got f32"):
        get_rows(input("w", (1000, 32)), input("ids", (t,)))
    with pytest.raises(DTypeError, match="a must be float or int; got bool"):
        get_rows(input("w", (1000, 32), "bool"), ids)
    with pytest.raises(ShapeError, match=r"ids must be \[7, 2\]; got \[T, 2\]"):
        get_rows(input("w", (7, 8, 5)), input("ids", (t, 2), "i64"))
    for bad in (4, -2):
        with pytest.raises(InputError, match=f"below 4, or -1 for none; got {bad}"):
            get_rows.compute({"a": np.ones((4, 2)), "ids": np.array([0, bad, 1])}, {})


@few
@given(data=st.data())
def test_set_rows_tiles_the_numbers(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mine = data.draw(st.sampled_from([(), (1,), (2,), (3, 2)]))
    batch = (*data.draw(st.sampled_from([(), (2,)])), *(n * data.draw(st.sampled_from([1, 2])) for n in mine))
    m, n = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
    r = data.draw(st.integers(0, m))
    ids = np.argsort(rng.random((*mine, m)), -1)[..., :r]
    ids[rng.random(ids.shape) < 0.2] = -1
    a, b = rng.standard_normal((*batch, m, n)), rng.standard_normal((*batch, r, n))
    want = a.copy()
    for at in np.ndindex(*batch):
        source = tuple(i % k for i, k in zip(at[len(at) - len(mine) :], mine, strict=True))
        for j in range(r):
            if ids[(*source, j)] >= 0:
                want[(*at, ids[(*source, j)])] = b[(*at, j)]
    before = a.copy()
    got = set_rows.compute({"a": a, "b": b, "ids": ids}, {"block": None})
    assert np.array_equal(got, want) and np.array_equal(a, before)


def test_set_rows_rounds_what_it_writes_to_a_block_type() -> None:
    rng = np.random.default_rng(3)
    old, new = (rng.standard_normal((n, 64)).astype(np.float32) for n in (5, 2))
    stored = decode(encode(old, "q8_0"), "q8_0").astype(np.float64)
    node = set_rows(input("a", (5, 64), "q8_0"), input("b", (2, 64)), input("ids", (2,), "i32"))
    assert node.dtype.name == "q8_0"
    got = set_rows.compute({"a": stored, "b": new.astype(np.float64), "ids": np.array([3, 0])}, node.attrs)
    rounded = decode(encode(new, "q8_0"), "q8_0")
    assert np.array_equal(got[[3, 0]], rounded) and not np.array_equal(rounded, new)
    assert np.array_equal(got[[1, 2, 4]], stored[[1, 2, 4]])
    with pytest.raises(ShapeError, match="multiples of ids'"):
        set_rows(input("a", (3, 5, 64)), input("b", (3, 2, 64)), input("ids", (2, 2), "i32"))
    with pytest.raises(InputError, match="below 5"):
        set_rows.compute({"a": stored, "b": new, "ids": np.array([5, 0])}, {"block": None})


WRITABLE = [*(dtype for dtype in SCALARS if dtype.kind != "bool"), *(form.dtype for form in FORMATS.values())]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_rows_of_every_type_are_written_and_read(dtype: DType, backend: str) -> None:
    """What was written is read as `cast` rounds it, everything else as it was; row numbers of both widths."""
    rng, width = np.random.default_rng(8), 2 * dtype.block_size
    old, new = ((rng.standard_normal((2, n, width)) * 9).astype(np.float32) for n in (7, 3))
    ids = np.argsort(rng.random((2, 7)), -1)[:, :3]
    ids[0, 1] = -1
    wanted, rounded = (run_op("cast", x, dtype=dtype) for x in (old, new))
    for at in np.ndindex(2, 3):
        if ids[at] >= 0:
            wanted[at[0], ids[at]] = rounded[at]
    if dtype.is_block:
        a, stored = constant("a", shape=old.shape, dtype=dtype), encode(old, dtype)
    else:
        a, stored = input("a", old.shape, dtype), run_op("cast", old, dtype=dtype)
    if dtype.kind == "int":
        new = rounded
    for width_of_ids in ("i32", "i64"):
        numbers, places = input("ids", ids.shape, width_of_ids), input("places", (2, 7), width_of_ids)
        written = set_rows(a, input("b", new.shape, as_dtype(new.dtype)), numbers)
        assert written.dtype == dtype
        given = {"a": stored, "b": new, "ids": ids.astype(width_of_ids.replace("i", "int"))}
        order = np.stack([np.arange(7)[::-1]] * 2).astype(given["ids"].dtype)
        np.testing.assert_array_equal(evaluate(written, given, backend), wanted)
        read = evaluate(get_rows(written, places), {**given, "places": order}, backend)
        np.testing.assert_array_equal(read, wanted[:, ::-1].astype(read.dtype))


def test_set_rows_takes_numbers_of_one_kind() -> None:
    ids = input("ids", (2,), "i32")
    with pytest.raises(DTypeError, match=r"\[set_rows\] b must be i32, as a; got f32"):
        set_rows(input("a", (5, 8), "i32"), input("b", (2, 8)), ids)
    with pytest.raises(DTypeError, match=r"\[set_rows\] b must be float; got i32"):
        set_rows(input("a", (5, 8)), input("b", (2, 8), "i32"), ids)
    assert get_rows(input("a", (5, 8), "i64"), ids).dtype.name == "i64"
    assert get_rows(input("a", (5, 8), "u8"), ids).dtype.name == "i32"


@few
@given(data=st.data())
def test_gather_and_scatter(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    part = tuple(slice(data.draw(st.integers(0, n))) for n in shape)
    x = rng.standard_normal(shape)
    ids = np.argsort(rng.random(shape), axis)[part]
    ids[rng.random(ids.shape) < data.draw(st.sampled_from([0, 0.4]))] = -1
    src = rng.standard_normal(ids.shape)
    gathered, scattered = np.zeros(ids.shape), x.copy()
    for at in np.ndindex(*ids.shape):
        place = list(at)
        place[axis] = int(ids[at])
        if ids[at] >= 0:
            gathered[at] = x[tuple(place)]
            scattered[tuple(place)] = src[at]
    assert np.array_equal(gather.compute({"x": x, "ids": ids}, {"axis": axis}), gathered)
    before = x.copy()
    assert np.array_equal(scatter.compute({"x": x, "ids": ids, "src": src}, {"axis": axis}), scattered)
    assert np.array_equal(x, before)


def test_gather_may_repeat_and_outgrow_its_axis() -> None:
    x = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    ids = np.array([[2, 2, 0, 0], [1, 0, 1, 2]])
    assert gather.compute({"x": x, "ids": ids}, {"axis": -1}).tolist() == [[3, 3, 1, 1], [5, 4, 5, 6]]
    assert gather.compute({"x": x, "ids": ids[:1, :2]}, {"axis": 1}).tolist() == [[3, 3]]
    assert gather.compute({"x": x, "ids": np.array([[1, 0, 1]])}, {"axis": 0}).tolist() == [[4, 2, 6]]


@pytest.mark.parametrize("op", [gather, scatter])
def test_gather_and_scatter_errors(op: Op) -> None:
    t = Dim("T", 64)

    def build(x: tuple[Any, ...], ids: tuple[Any, ...], axis: int = -1, dtype: str = "f32") -> Any:
        more = () if op is gather else (input("src", ids, dtype),)
        return op(input("x", x, dtype), input("ids", ids, "i32"), *more, axis=axis)

    assert build((t, 8), (t, 3)).shape == ((t, 3) if op is gather else (t, 8))
    assert build((t, 8), (2, 8), axis=0, dtype="i32").dtype.name == "i32"
    with pytest.raises(ShapeError, match="but for axis -1"):
        build((t, 8), (t + 1, 3))
    with pytest.raises(ShapeError, match="but for axis 1"):
        build((4, 8), (5, 3), axis=1)
    with pytest.raises(ShapeError, match="but for axis 0"):
        build((4, 8), (4,), axis=0)
    with pytest.raises(AttributeValueError, match="axis must be one of"):
        build((4, 8), (4, 3), axis=2)
    with pytest.raises(DTypeError, match="block type"):
        build((4, 32), (4, 3), dtype="q8_0")
    for bad in (8, -2):
        ids = np.array([[0, bad]])
        with pytest.raises(InputError, match=f"below 8, or -1 for none; got {bad}"):
            op.compute({"x": np.ones((1, 8)), "ids": ids, "src": np.ones((1, 2))}, {"axis": -1})
