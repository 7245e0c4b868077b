"""Rows chosen early: the graph that is left, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import i32
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.models.early_rows import choose_early
from tensorgraph.ops import add, cast, cumsum, get_rows, mul, mul_mat, rms_norm, scale, silu, soft_max, sum_rows, swiglu

Array = np.ndarray[Any, Any]
WIDTH, MOST = 4, 6
RNG = np.random.default_rng(5)
WEIGHTS = {"w": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32), "norm": RNG.normal(size=WIDTH).astype(np.float32)}
T, WANTED = Dim("T", MOST), Dim("O", MOST)


X, IDS, MASK = input("x", (T, WIDTH)), input("out_ids", (WANTED,), i32), input("mask", (T, WIDTH))
W, NORM = constant("w", shape=(WIDTH, WIDTH)), constant("norm", shape=(WIDTH,))


def product(value: Node) -> Node:
    return mul_mat(W, value)


def normed(value: Node) -> Node:
    return rms_norm(value, NORM, eps=1e-5)


def turned(value: Node) -> Node:
    """An op over all rows."""
    return cumsum(value.permute(1, 0)).permute(1, 0).reshape(T, WIDTH)


def values(graph: Graph, rows: int, chosen: list[int]) -> Mapping[str, Array]:
    bound = compile(graph, "reference", CompileOptions(verify_passes=True)).bind(WEIGHTS)
    x = np.random.default_rng(rows).normal(size=(rows, WIDTH)).astype(np.float32)
    inputs = {"x": x, "out_ids": np.array(chosen, np.int32)}
    return bound.run({name: inputs[name] for name in graph.inputs})


def chosen_from(graph: Graph) -> list[Node]:
    """What rows are chosen of."""
    return [node.inputs[0] for node in graph.nodes if node.op == "get_rows"]


MOVED: dict[str, tuple[Callable[[Node], Node], str]] = {
    "one op": (silu, "input"),
    "a layer after attention": (lambda h: (h := turned(h)) + product(swiglu(product(normed(h)), silu(h))), "view"),
    "a residual": (lambda h: (h := turned(h)) + silu(h), "view"),
    "up to an op over all rows": (lambda h: product(normed(turned(silu(h)))), "view"),
    "through broadcasts": (lambda h: mul(add(h, NORM), sum_rows(h)), "input"),
    "a value as rows and as weights": (lambda h: mul_mat(h, silu(h)), "input"),
    "the same value twice": (lambda h: mul(normed(h), normed(h)), "input"),
}


@pytest.mark.parametrize("name", MOVED)
def test_rows_are_chosen_first(name: str) -> None:
    build, op = MOVED[name]
    graph = Graph(y=get_rows(build(X), IDS))
    early = choose_early(graph)
    assert [node.op for node in chosen_from(early)] == [op]
    assert all(node.shape[0] == WANTED for node in early.nodes if node.op == "mul_mat")
    assert early.outputs["y"].shape == graph.outputs["y"].shape
    for rows, chosen in ((5, [4]), (5, [3, 0, 3]), (1, [0]), (MOST, [])):
        np.testing.assert_allclose(values(early, rows, chosen)["y"], values(graph, rows, chosen)["y"], rtol=1e-6)


def test_what_else_is_read_stays() -> None:
    """Values that are outputs, or that something else takes, are computed for all rows."""
    h = silu(turned(X))
    kept = normed(h)
    graph = Graph(y=get_rows(scale(kept, scale=2.0), IDS), kept=kept)
    early = choose_early(graph)
    assert chosen_from(early) == [early.outputs["kept"]] and early.outputs["kept"].shape == (T, WIDTH)
    graph = Graph(y=get_rows(scale(kept, scale=2.0), IDS), sums=turned(kept))
    assert [node.op for node in chosen_from(choose_early(graph))] == ["rms_norm"]


@pytest.mark.parametrize(
    "build",
    [
        lambda h: turned(h),
        lambda h: soft_max(h, MASK),
        lambda h: silu(cast(h, dtype="f16")),
        lambda h: cast(h, dtype="f16"),
        lambda h: (g := silu(h)) + turned(mul_mat(g, g)[:, :1].broadcast(T, WIDTH)),
    ],
    ids=["over all rows", "a mask", "rows of another type", "chosen as another type", "whole too"],
)
def test_what_is_not_known_to_go_by_rows_stays(build: Callable[[Node], Node]) -> None:
    graph = Graph(y=get_rows(build(X), IDS))
    assert choose_early(graph) is graph


def test_only_rows_by_that_input_are_chosen_early() -> None:
    """Another may hold -1, whose row is zeros."""
    graph = Graph(y=get_rows(silu(X), input("others", (WANTED,), i32)))
    assert choose_early(graph) is graph


def test_names_and_source_lines_stay() -> None:
    h = turned(X).named("h")
    graph = Graph(y=get_rows(normed(h).named("normed"), IDS).named("rows"))
    early = choose_early(graph)
    assert early.outputs["y"].name == "rows" and early.outputs["y"].op == "rms_norm"
    assert {node.where for node in early.nodes} == {node.where for node in graph.nodes}


OPS: tuple[Callable[[Node, Node], Node], ...] = (
    lambda a, b: a + b,
    lambda a, b: mul(a, sum_rows(b)),
    lambda a, b: normed(a),
    lambda a, b: product(a),
    lambda a, b: silu(a),
    lambda a, b: turned(a),
    lambda a, b: a + sum_rows(mul_mat(b, a)),
)


@st.composite
def networks(draw: Any) -> Graph:
    """Random graphs of ops by rows and over them, with a choice of rows and other outputs."""
    pool = [X]
    for _ in range(draw(st.integers(1, 8))):
        a, b = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        pool.append(draw(st.sampled_from(OPS))(a, b))
    more = {f"z{i}": node for i, node in enumerate(draw(st.lists(st.sampled_from(pool), max_size=2)))}
    chosen = [get_rows(node, IDS) for node in draw(st.lists(st.sampled_from(pool), min_size=1, max_size=2))]
    return Graph({f"y{i}": normed(rows) for i, rows in enumerate(chosen)} | more)


@settings(max_examples=60, deadline=None)
@given(graph=networks(), rows=st.integers(0, MOST), data=st.data())
def test_any_graph_computes_the_same(graph: Graph, rows: int, data: Any) -> None:
    chosen = data.draw(st.lists(st.integers(0, rows - 1), max_size=MOST)) if rows else []
    early = choose_early(graph)
    assert len(chosen_from(early)) <= len(chosen_from(graph))
    got, wanted = values(early, rows, chosen), values(graph, rows, chosen)
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5)
