"""mul_mat and mul_mat_id on every target: floats within rounding of float64, quantised types as the same arithmetic in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.target import TARGETS, can_run
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, constant, input
from tensorgraph.ops import add, mul_mat, mul_mat_id, reglu
from tests.backends.cpu.emulated import EMULATED, emulation
from tests.backends.cpu.products import (
    EXACT_TO,
    FLOATS,
    TYPES,
    activations,
    assert_rows_are_right,
    assert_same_bits,
    assert_type_is_right,
    bound,
    cases_of,
    check,
    how,
    is_int8,
    product,
    slice_width,
    weights,
    wide,
)

Array = np.ndarray[Any, Any]
OTHERS = [*(f"cpu:{name}" for name, target in TARGETS.items() if can_run(target)), *(f"cpu:{name}" for name in EMULATED)]
BACKENDS = ["cpu", *OTHERS]
FEW_TYPES = [*((name, False) for name in ("q4_1", "q8_0", "q6_k", "q2_k", "iq2_xs", "f16")), ("q4_0", True)]
"""One for each way in which codes, factors, minima and floats are multiplied."""
T = Dim("T", max=600)


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    with emulation():
        yield


def deep_but(fast: list[tuple[Any, ...]], every: list[tuple[Any, ...]]) -> list[Any]:
    """All cases, those that are not among the fast ones marked deep."""
    return [pytest.param(*case, marks=[] if case in fast else pytest.mark.deep) for case in every]


FAST = [("cpu", *case) for case in cases_of(TYPES)]  # and of the other targets each has some of the types
FAST += [(OTHERS[i % len(OTHERS)], name, False) for i, name in enumerate(TYPES)]


@pytest.mark.parametrize(("backend", "name", "exact"), deep_but(FAST, [(b, *case) for b in BACKENDS for case in cases_of(TYPES)]))
def test_every_type(backend: str, name: str, exact: bool) -> None:
    """In int8 to the last bit as on any other target that rounds as often."""
    found = assert_type_is_right(backend, name, exact)
    if backend != "cpu" and is_int8(name, exact) and "fma" in CpuDevice(backend).target.has & CpuDevice().target.has:
        here = assert_rows_are_right("cpu", name, exact, wide(backend, name, exact))
        assert_same_bits(found, here, f"{backend} and cpu")


@pytest.mark.parametrize("width", [1, 3, 50, 257, 1031])
@pytest.mark.parametrize(("backend", "name"), deep_but([("cpu", n) for n in FLOATS], [(b, n) for b in BACKENDS for n in FLOATS]))
def test_odd_widths(backend: str, name: str, width: int) -> None:
    array, w = weights(name, 17, width)
    step = product(backend, name, array, width)
    for n in (1, 3, 4, 5, 6, 7, 19, 130):
        x = activations(np.random.default_rng(n), n, width)
        check(step.run({"b": x})["y"], w, x, "f32")


@pytest.mark.parametrize("height", [1, 15, 16, 17, 31, 33, 80, 1016])
@pytest.mark.parametrize(
    ("name", "exact"),
    deep_but([("q4_k", False), ("f16", False)], [("q4_k", False), ("f16", False), ("q8_0", False), ("q3_k", True)]),
)
def test_heights(name: str, exact: bool, height: int) -> None:
    for backend in ("cpu", "cpu:as-vnni") if height in (16, 33, 80) else ("cpu",):
        width = as_dtype(name).block_size * 2
        array, w = weights(name, height, width)
        step = product(backend, name, array, width, exact=exact)
        for n in (1, 3, 7, 131):
            x = activations(np.random.default_rng(n), n, width)
            check(step.run({"b": x})["y"], w, x, how(name, exact, n, width, backend))


@pytest.mark.deep
@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=12)
@given(data=st.data())
def test_any_shape(name: str, data: st.DataObject) -> None:
    """Widths from one block to several slices, batches of several matrices, and any number of rows."""
    backend, exact = data.draw(st.sampled_from(BACKENDS)), data.draw(st.booleans())
    size, slice = as_dtype(name).block_size, slice_width(backend, name, exact)
    near = st.tuples(st.integers(1, 3), st.integers(-1, 1)).map(lambda n: max(1, n[0] * slice // size + n[1]))
    width = size * data.draw(st.one_of(near, st.integers(1, 4 * slice // size)))
    height = data.draw(st.one_of(st.sampled_from([1, 15, 16, 17, 31, 32, 33, 37, 63, 65]), st.integers(1, 70)))
    mine = data.draw(st.sampled_from([(), (1,), (2,), (2, 2)]))
    batch = [n * data.draw(st.integers(1, 2)) for n in mine]
    array, w = weights(name, *mine, height, width)
    node = mul_mat(constant("a", shape=(*mine, height, width), dtype=name), input("b", (*batch, T, width)))
    step = bound(node, backend, exact=exact, a=array)
    for i, n in enumerate(data.draw(st.lists(st.integers(0, 280), min_size=1, max_size=4))):
        x = activations(np.random.default_rng(i), *batch, n, width)
        each = [np.arange(many) * few // many for few, many in zip(mine, batch, strict=True)]
        chosen = w[np.ix_(*each)][..., None, :, :] if mine else w
        single = int(np.prod(mine)) == 1
        n_rows = n * int(np.prod(batch)) if single else 1
        check(step.run({"b": x})["y"], chosen, x, how(name, exact, n_rows, width, backend))


SHAPES = [(b, *case) for b in BACKENDS for case in FEW_TYPES]
FAST_SHAPES = [case for case in SHAPES if case[0] == "cpu" or case[:2] in (("cpu:as-vnni", "q6_k"), ("cpu:baseline", "q4_1"))]
SHAPE_CASES = deep_but(FAST_SHAPES, SHAPES)


@pytest.mark.parametrize(("backend", "name", "exact"), SHAPE_CASES)
def test_several_matrices_shared_by_neighbours(backend: str, name: str, exact: bool) -> None:
    width = 2 * as_dtype(name).block_size if as_dtype(name).is_block else 50
    array, w = weights(name, 2, 33, width)
    b = input("b", (3, 4, T, width))
    step = bound(mul_mat(constant("a", shape=(2, 33, width), dtype=name), b), backend, exact=exact, a=array)
    for n in (1, 3, 6, 133):
        x = activations(np.random.default_rng(n), 3, 4, n, width)
        check(step.run({"b": x})["y"], w[[0, 0, 1, 1]][:, None], x, how(name, exact, 1, width, backend))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_weights_without_rows(batch: tuple[int, ...]) -> None:
    a, b = constant("a", shape=(*batch, 0, 64)), input("b", (*batch, T, 64))
    step = bound(mul_mat(a, b), "cpu", a=np.zeros((*batch, 0, 64), np.float32))
    for n in (1, 3, 7):
        assert step.run({"b": np.ones((*batch, n, 64), np.float32)})["y"].shape == (*batch, n, 0)


def test_experts_without_rows() -> None:
    b, ids = input("b", (T, 1, 64)), input("ids", (T, 2), "i32")
    step = bound(mul_mat_id(constant("a", shape=(3, 0, 64)), b, ids), "cpu", a=np.zeros((3, 0, 64), np.float32))
    for n in (1, 3, 9):
        given = {"b": np.ones((n, 1, 64), np.float32), "ids": np.ones((n, 2), np.int32)}
        assert step.run(given)["y"].shape == (n, 2, 0)


@pytest.mark.parametrize(("backend", "name", "exact"), SHAPE_CASES)
@pytest.mark.parametrize("rows", [32, 24])
def test_a_matrix_seen_in_pieces(backend: str, name: str, exact: bool, rows: int) -> None:
    """Pieces of whole tiles are multiplied as they are, without a copy; of other pieces the matrix is decoded."""
    width = 2 * as_dtype(name).block_size if as_dtype(name).is_block else 50
    array, w = weights(name, 2 * rows, width)
    a = constant("a", shape=(2 * rows, width), dtype=name)
    step = bound(mul_mat(a.reshape(2, rows, width), input("b", (2, T, width))), backend, exact=exact, a=array)
    (held,) = step.plan.graph.constants.values()
    assert step.plan.devices[0].constant_layout(held, step.plan.graph) == ("r16" if rows % 16 == 0 else "dense")
    for n in (1, 3, 6, 133):
        x = activations(np.random.default_rng(n), 2, n, width)
        arithmetic = how(name, exact, 1, width, backend) if rows % 16 == 0 else "f32"
        check(step.run({"b": x})["y"], w.reshape(2, rows, width)[:, None], x, arithmetic)


@pytest.mark.parametrize(("backend", "name", "exact"), SHAPE_CASES)
def test_two_weights_side_by_side(backend: str, name: str, exact: bool) -> None:
    """A gated unit's: of codes each sum is to the last bit what it is alone."""
    width, height = wide(backend, name, exact), 41
    (gate, w), (up, v) = weights(name, height, width), weights(name, height, width, deviation=2.0)
    b = input("b", (T, width))
    both = [mul_mat(constant(n, shape=(height, width), dtype=name), b) for n in "wv"]
    step = bound(reglu(*both), backend, exact=exact, fuse=True, w=gate, v=up)
    assert [len(split) for split in step.plan.groups] == [1]
    alone = [product(backend, name, array, width, exact=exact) for array in (gate, up)]
    for n in (1, 2, 4, 5, 7, 9, 128, 137, 265):
        x = activations(np.random.default_rng(n), n, width)
        got = step.run({"b": x})["y"]
        g, u = (each.run({"b": x})["y"] for each in alone)
        if how(name, exact, n, width, backend) != "f32":
            assert_same_bits(got, np.maximum(g, 0) * u, f"{n} rows")
            continue
        for found, values in ((g, w), (u, v)):
            check(found, values, x, "f32")
        off = [np.abs(x) @ np.abs(values).T * EXACT_TO for values in (w, v)]
        assert np.all(np.abs(got - np.maximum(g, 0) * u) <= 2 * (off[0] * np.abs(u) + off[1] * np.abs(g) + off[0] * off[1]))


@pytest.mark.parametrize("height", [64, 41])
@pytest.mark.parametrize(("backend", "name", "exact"), SHAPE_CASES)
def test_what_follows_a_product(backend: str, name: str, exact: bool, height: int) -> None:
    """In one kernel, which takes two tiles of 16 rows at once where registers are wide and their number is even."""
    width = wide(backend, name, exact)
    array, w = weights(name, height, width)
    node = mul_mat(constant("a", shape=(height, width), dtype=name), input("b", (T, width)))
    step = bound(add(node, input("r", (T, height))), backend, exact=exact, fuse=True, a=array)
    assert [len(split) for split in step.plan.groups] == [1]
    alone = product(backend, name, array, width, exact=exact)
    for n in (1, 2, 4, 5, 131):
        rng = np.random.default_rng(n)
        x, r = activations(rng, n, width), rng.standard_normal((n, height)).astype(np.float32)
        got, y = step.run({"b": x, "r": r})["y"], alone.run({"b": x})["y"]
        if how(name, exact, n, width, backend) != "f32":
            assert_same_bits(got, y + r, f"{n} rows")
            continue
        most = np.abs(x.astype(np.float64)) @ np.abs(w).T + np.abs(r)
        assert np.all(np.abs(got - (x.astype(np.float64) @ w.T + r)) <= most * EXACT_TO)


@pytest.mark.parametrize(("height", "counts"), [(1061, (6, 131)), (2083, (19,))])
@pytest.mark.parametrize(("backend", "name", "exact"), SHAPE_CASES)
def test_panels_that_take_turns(backend: str, name: str, exact: bool, height: int, counts: tuple[int, ...]) -> None:
    """Two and four in a group, whose last one has fewer; and more than one slice of each."""
    width = wide(backend, name, exact)
    array, w = weights(name, height, width)
    node = mul_mat(constant("a", shape=(height, width), dtype=name), input("b", (T, width)))
    step = bound(add(node, input("r", (T, height))), backend, exact=exact, fuse=True, a=array)
    for n in counts:
        x, r = activations(np.random.default_rng(n), n, width), np.zeros((n, height), np.float32)
        check(step.run({"b": x, "r": r})["y"], w, x, how(name, exact, n, width, backend))


@pytest.mark.parametrize("name", ["q4_k", "iq3_xxs", "f16"])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    array, w = weights(name, 1016, 512)
    x, found = activations(np.random.default_rng(2), 600, 512), []
    for threads in (1, 2, 3):
        device = CpuDevice()
        device.set_threads(threads)
        step = product(device, name, array, 512)
        found.append([step.run({"b": x[:n]})["y"] for n in (1, 4, 131, 600)])
    check(found[0][-1], w, x, how(name, False, 600, 512))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_same_bits(got, want, f"{len(want)} rows")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("backend", "name", "exact"), SHAPE_CASES)
def test_experts(backend: str, name: str, exact: bool, shared: bool) -> None:
    """Few pairs, many, several pieces of one expert, experts that nobody chose or all did, and none."""
    n_experts, n_used, height, width = 5, 3, 37, 3 * as_dtype(name).block_size if as_dtype(name).is_block else 50
    array, w = weights(name, n_experts, height, width)
    a = constant("a", shape=(n_experts, height, width), dtype=name)
    b, ids = input("b", (T, 1 if shared else n_used, width)), input("ids", (T, n_used), dtype="i32")
    step = bound(mul_mat_id(a, b, ids), backend, exact=exact, a=array)
    rng = np.random.default_rng(5)
    few, many = ((1, 0, 5), (4, -1, 5), (6, -1, 5), (20, -1, 3), (9, 2, 3), (7, -1, 0), (0, 0, 1)), ((89, 3, 4), (211, -1, 4))
    for n, low, high in (*few, *many):
        x = activations(rng, n, 1 if shared else n_used, width)
        chosen = rng.integers(low, high, (n, n_used)).astype(np.int32)
        got = step.run({"b": x, "ids": chosen})["y"]
        none = chosen < 0
        assert not got[none].any()
        rows = np.broadcast_to(x, (n, n_used, width))
        for expert in range(n_experts):
            mine = chosen == expert
            check(got[mine], w[expert], rows[mine], "int8" if is_int8(name, exact) else "f32")
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
    for node, given_ in ((a, w), (turned, np.ascontiguousarray(w.transpose(0, 2, 1)))):
        step = compile(Graph(y=mul_mat_id(node, b, ids)), backend, CompileOptions(fuse=False)).bind()
        got = step.run({"a": given_, "b": x, "ids": chosen})["y"]
        assert not got[chosen < 0].any()
        check(got[chosen >= 0], w[chosen[chosen >= 0]].astype(np.float64), x[chosen >= 0], "f32")
        with pytest.raises(InputError, match="got 3$"):
            step.run({"a": given_, "b": x, "ids": np.full((6, 2), 3, np.int32)})


def test_which_types_are_multiplied_in_int8() -> None:
    assert [name for name in TYPES if not is_int8(name, False)] == [*FLOATS, "nvfp4"]
    assert not any(is_int8(name, True) for name in TYPES)
