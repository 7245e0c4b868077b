"""Views: any chain of them is what the same NumPy chain gives, with extents known only at run time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim, Extent, Shape, evaluate_shape
from tensorgraph.errors import InputError, ShapeError
from tensorgraph.graph import Graph, Node, input
from tensorgraph.views import IndexMap, infer_reshape

Array = np.ndarray[Any, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]
T, S = Dim("T", 6), Dim("S", 9)


def run(node: Node, **arrays: Array) -> Array:
    return compile(Graph(y=node), options=CompileOptions(verify_passes=True)).run(**arrays)["y"]


def permuted(draw: Draw, node: Node, array: Array) -> tuple[Node, Array]:
    axes = draw(st.permutations(range(node.ndim)))
    signed = [a - node.ndim if draw(st.booleans()) else a for a in axes]
    return node.permute(*signed), array.transpose(axes)


def sliced(draw: Draw, node: Node, array: Array) -> tuple[Node, Array]:
    axis = draw(st.integers(0, node.ndim - 1))
    n, extent = array.shape[axis], node.shape[axis]
    start = draw(st.integers(0, n))
    stop = draw(st.integers(start, n))
    step = draw(st.integers(1, 3))
    from_end = draw(st.booleans())  # bounds counted from an end that is known only at run time
    bounds = (extent - (n - start), extent - (n - stop)) if from_end else (start, stop)
    if not isinstance(extent, int) and not from_end and stop == n:
        bounds = (start, extent)
    key = (slice(None),) * axis
    return node.slice(axis, *bounds, step), array[(*key, slice(start, stop, step))]


def indexed(draw: Draw, node: Node, array: Array) -> tuple[Node, Array]:
    """Basic indexing with static numbers, from both ends."""
    keys: list[Any] = []
    for n, extent in zip(array.shape, node.shape, strict=True):
        kind = draw(st.integers(0, 4))
        if kind == 0 and n and isinstance(extent, int):
            keys.append(draw(st.integers(-n, n - 1)))
        elif kind == 1 and isinstance(extent, int):
            start = draw(st.integers(0, n))
            keys.append(slice(start, draw(st.integers(start, n + 2)), draw(st.integers(1, 2))))
        elif kind == 2:
            keys += [None, slice(None)]
        else:
            keys.append(slice(None, None, draw(st.sampled_from((None, 1, 2)))))
    if draw(st.booleans()) and keys and keys[-1] == slice(None):
        keys = [*keys[:-1], ...]
    key = tuple(keys)
    return node[key], array[key]


def broadcasted(draw: Draw, node: Node, array: Array, dims: dict[Dim, int]) -> tuple[Node, Array]:
    lead = draw(st.sampled_from(((), (2,), *((d,) for d in dims))))
    shape = [draw(st.sampled_from((1, 3, *dims))) if e == 1 else e for e in node.shape]
    wanted = node.broadcast(*lead, *shape)
    return wanted, np.broadcast_to(array, numbers_of(wanted.shape, dims))


def numbers_of(shape: Shape, dims: dict[Dim, int]) -> tuple[int, ...]:
    return evaluate_shape(shape, {d.name: n for d, n in dims.items()})


def reshaped(draw: Draw, node: Node, array: Array) -> tuple[Node, Array]:
    """Axes merged, split and inserted."""
    shape, numbers = list(node.shape), list(array.shape)
    if len(shape) > 1 and draw(st.booleans()):
        at = draw(st.integers(0, len(shape) - 2))
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
        numbers[at : at + 2] = [numbers[at] * numbers[at + 1]]
    for at in reversed(range(len(shape))):
        divisors = [d for d in (2, 3, 4) if isinstance(shape[at], int) and shape[at] and shape[at] % d == 0]  # type: ignore[operator]
        if divisors and draw(st.booleans()):
            d = draw(st.sampled_from(divisors))
            shape[at : at + 1] = [d, shape[at] // d]
            numbers[at : at + 1] = [d, numbers[at] // d]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(shape)))
        shape.insert(at, 1)
        numbers.insert(at, 1)
    free = draw(st.integers(-1, len(shape) - 1))
    wanted = [-1 if i == free and 0 not in numbers else e for i, e in enumerate(shape)]
    return node.reshape(*wanted), array.reshape(numbers)


@st.composite
def chains(draw: Draw, dims: dict[Dim, int]) -> tuple[Node, Array, Array]:
    """A node made of views of the input x, x's array, and the same chain's array."""
    shape: list[Extent] = draw(st.lists(st.sampled_from((*dims, 1, 2, 3, 4, 6)), max_size=3))
    numbers = [dims[e] if isinstance(e, Dim) else e for e in shape]
    x = np.arange(math.prod(numbers), dtype=np.float32).reshape(numbers)
    node, array = input("x", shape), x
    for _ in range(draw(st.integers(1, 6))):
        steps: list[Any] = [indexed, reshaped, partial(broadcasted, dims=dims)]
        if node.ndim:
            steps += [permuted, sliced, sliced]
        step = draw(st.sampled_from(steps))
        if node.ndim > 5 or array.size > 4000:
            break
        node, array = step(draw, node, array)
    return node, x, array


@given(st.data(), st.integers(0, 6), st.integers(1, 9))
@settings(max_examples=300)
def test_a_chain_of_views_is_numpys(data: st.DataObject, t: int, s: int) -> None:
    dims = {T: t, S: s}
    node, x, wanted = data.draw(chains(dims))
    given_dims = {d.name: n for d, n in dims.items()}
    plan = compile(Graph(y=node), options=CompileOptions(verify_passes=True))
    got = plan.bind().run({"x": x}, dims=given_dims)["y"]
    assert numbers_of(node.shape, dims) == wanted.shape
    np.testing.assert_array_equal(got, wanted)


@given(st.data())
@settings(max_examples=300)
def test_reshape_copies_exactly_when_numpy_must(data: st.DataObject) -> None:
    node, _, array = data.draw(chains({}))
    if array.size == 0 or node.base.op == "cont":
        return
    index_map = node.index_map
    shape = data.draw(st.sampled_from(factorings(array.size)))
    strides = tuple(int(s) * 4 for s in index_map.strides)  # type: ignore[arg-type]
    buffer = np.zeros(100_000, np.float32)
    mine = np.lib.stride_tricks.as_strided(buffer, array.shape, strides)
    try:
        mine.reshape(shape, copy=False)
        copies = False
    except ValueError:
        copies = True
    assert (index_map.reshape(shape) is None) == copies
    assert (node.reshape(*shape).base.op == "cont") == copies


def factorings(size: int) -> list[tuple[int, ...]]:
    """Shapes of up to three axes with `size` elements, with an axis of 1 in some."""
    pairs = [(d, size // d) for d in range(1, size + 1) if size % d == 0]
    triples = [(a, d, b // d) for a, b in pairs for d in range(2, b) if b % d == 0]
    return [(size,), *pairs, *triples, *((a, 1, b) for a, b in pairs)]


@given(st.lists(st.sampled_from((1, 2, 3, T, S, T * 2, S // 4)), max_size=4))
def test_dense_maps_are_dense(shape: list[Extent]) -> None:
    index_map = IndexMap.dense(tuple(shape))
    assert index_map.is_dense
    assert index_map.reshape((1, *shape)) == IndexMap.dense((1, *shape))


def test_a_view_of_a_view_is_a_view_of_the_base() -> None:
    x = input("x", (T, 4, 6))
    y = x.permute(1, 0, 2)[1:3].reshape(2, T, 2, 3).permute(0, 2, 1, 3)
    assert y.op == "view" and y.base is x
    assert y.shape == (2, 2, T, 3) and y.index_map.strides == (6, 3, 24, 1) and y.index_map.offset == 6
    assert str(y.index_map) == "[2, 2, T, 3] strides [6, 3, 24, 1] + 6"


def test_views_that_change_nothing_are_the_node_itself() -> None:
    x = input("x", (T, 4))
    assert x.reshape(T, 4) is x and x.permute(0, 1) is x and x[:] is x and x.broadcast(T, 4) is x
    assert x.reshape(T * 4).reshape(-1, 4) is x and x.permute(1, 0).permute(1, 0) is x


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda x: x.reshape(T, 5), r"\[reshape\] wanted as many elements as \[T, 4, 6\]; got \[T, 5\]"),
        (lambda x: x.reshape(-1, -1), r"\[reshape\]"),
        (lambda x: x.reshape(-1, 7), r"\[reshape\] -1 is not determined in \[-1, 7\] for \[T, 4, 6\]"),
        (lambda x: x.reshape(T, -4, -6), r"\[shape\] wanted an axis >= 0; got -4"),
        (lambda x: x.permute(0, 1), r"\[permute\] wanted each axis of \[T, 4, 6\] once"),
        (lambda x: x.permute(0, 1, 5), r"\[permute\] wanted each axis of \[T, 4, 6\] once"),
        (lambda x: x.permute(0, 0, 1), r"\[permute\] wanted each axis of \[T, 4, 6\] once"),
        (lambda x: x.slice(3, 0, 1), r"\[slice\] \[T, 4, 6\] has no axis 3"),
        (lambda x: x.slice(1, 2, 5), r"\[slice\] wanted 0 <= start <= stop <= length .* got 2:5:1 on axis 1 of \[T, 4, 6\]"),
        (lambda x: x[:, ::-1], r"\[slice\] .* step >= 1"),
        (lambda x: x[:, ::0], r"\[slice\] .* step >= 1"),
        (lambda x: x[:, 4], r"\[slice\] wanted .* got 4:5:1"),
        (lambda x: x[:, -5], r"\[slice\] wanted"),
        (lambda x: x[0, 0, 0, 0], r"\[slice\] too many indices for \[T, 4, 6\]"),
        (lambda x: x[..., 0, ...], r"\[slice\] wanted one ... at most"),
        (lambda x: x[:, :T], r"\[slice\] wanted .* got 0:T:1 on axis 1 of"),  # T may be 5, and would read the next row
        (lambda x: x[:, [0, 1]], r"\[slice\] wanted ints, Dims, slices, ... or None as indices; got \[0, 1\]"),
        (lambda x: x.broadcast(T, 4, 7), r"\[broadcast\] \[T, 4, 6\] does not broadcast to \[T, 4, 7\]"),
        (lambda x: x.broadcast(4, 6), r"\[broadcast\] \[T, 4, 6\] does not broadcast to \[4, 6\]"),
        (lambda x: x.broadcast(S, 4, 6), r"\[broadcast\]"),
    ],
)
def test_a_wrong_view_says_what_was_wanted_and_where(build: Callable[[Node], Node], said: str) -> None:
    with pytest.raises(ShapeError, match=said) as caught:
        build(input("x", (T, 4, 6)))
    assert "test_views.py:" in str(caught.value) or said.startswith(r"\[shape")


def test_numbers_of_numpy_are_numbers() -> None:
    y = input("x", (6,))
    two: Any = np.int64(2)
    minus: Any = np.int64(-1)
    assert y.reshape(two, minus).shape == (2, 3)
    assert all(type(e) is int for e in y.reshape(two, 3 * two // two).shape)
    np.testing.assert_array_equal(run(y[minus], x=np.arange(6, dtype=np.float32)), 5)


@pytest.mark.parametrize("build", [lambda x: x.slice(0, 0, 5), lambda x: x[T - 5 :], lambda x: x[2:T], lambda x: x[T]])
def test_a_view_beyond_what_a_step_has_is_refused(build: Callable[[Node], Node]) -> None:
    """Not read from whatever lies behind the array."""
    x = input("x", (T, 4))
    with pytest.raises(InputError, match=r"\[view\] wanted .* within its base; .*which has 4 in this step \(test_views.py:"):
        run(build(x), x=np.zeros((1, 4), np.float32))


@pytest.mark.parametrize(
    "build",
    [
        lambda x: x[0, :S],
        lambda x: x[:1, :S],
        lambda x: x[1:, T - 4 :],
        lambda x: x.permute(1, 0)[:S].reshape(-1),
        lambda x: x[:, T - 4 :].broadcast(2, 2, 4),
    ],
)
def test_a_slice_beyond_its_axis_is_refused(build: Callable[[Node], Node]) -> None:
    """Not read from the row before or behind, which lies within the array."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with pytest.raises(InputError, match=r"\[view\] wanted .* within its base; .*which has 6 in this step \(test_views.py:"):
        compile(Graph(y=build(input("x", (2, T))))).bind().run({"x": values}, dims={"S": 4})


@pytest.mark.parametrize(
    ("shape", "wanted", "result"),
    [
        ((T, 12), (T, 3, -1), (T, 3, 4)),
        ((T, 12), (-1,), (T * 12,)),
        ((T, S * 2), (S, -1), (S, T * 2)),
        ((T * 4 + 8, 3), (4, -1), (4, (T + 2) * 3)),
        ((2, 3), (6, 1), (6, 1)),
        ((T + 1, 2, 3), (T + 1, -1), (T + 1, 6)),
    ],
)
def test_minus_one_is_worked_out(shape: Shape, wanted: Shape, result: Shape) -> None:
    assert infer_reshape(shape, wanted) == result
