"""Random graphs on the CPU, fused and not, against the reference: what is joined, kept and shared depends on who reads what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph import ops
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import ALWAYS, Dim
from tensorgraph.dtypes import i32
from tensorgraph.graph import Graph, Node, choose, constant, input

T = Dim("T", 9)
WIDTHS = (16, 32, 50)


def width(a: Node) -> int:
    n = a.shape[-1]
    assert isinstance(n, int)
    return n


class Values:
    """Those of a graph so far, all [T, ...]. None of the ways to make another one cancels: any order of summation will do."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.rng = draw, np.random.default_rng(draw(st.integers(0, 1000)))
        self.all: list[Node] = [input("x", (T, 32)), input("z", (T, 32))]
        self.positions = input("positions", (T,), i32)

    def one_of(self, *found: Any) -> Any:
        return self.draw(st.sampled_from(found))

    def recent(self, values: list[Node]) -> Node:
        found: Node = self.one_of(*values[-5:])
        return found

    def like(self, a: Node) -> Node:
        return self.recent([v for v in self.all if v.shape == a.shape])

    def weight(self, *shape: int) -> Node:
        values = self.rng.standard_normal(shape) / np.sqrt(shape[-1])
        return constant(f"w{self.rng.integers(1 << 60)}", values.astype(np.float32))

    def product(self, a: Node, n: int) -> Node:
        return ops.mul_mat(self.weight(n, width(a)), a)

    # Ways to make others.

    def combine(self, a: Node) -> list[Node]:
        return [self.one_of(ops.add, ops.mul)(a, self.like(a))]

    def apply(self, a: Node) -> list[Node]:
        return [self.one_of(ops.silu, ops.gelu, ops.tanh, ops.cont, ops.soft_max)(a)]

    def by_row(self, a: Node) -> list[Node]:
        return [ops.mul(a, self.one_of(ops.mean(a), ops.sum_rows(a), self.weight(width(a))))]

    def normalise(self, a: Node) -> list[Node]:
        return [ops.rms_norm(a, self.one_of(None, self.weight(width(a))), eps=1e-3)]

    def products(self, a: Node) -> list[Node]:
        """Several of one value, or of its norm, which others may read too."""
        source = ops.rms_norm(a, eps=1e-3) if self.one_of(True, False) else a
        n, count = self.one_of(*WIDTHS), self.one_of(1, 2, 3)
        return [*self.one_of([], [source]), *(self.product(source, n) for _ in range(count))]

    def residual(self, a: Node) -> list[Node]:
        y = self.product(a, width(a))
        return [ops.add(y, self.one_of(a, self.like(a), self.weight(width(a)), self.product(a, width(a))))]

    def gated(self, a: Node) -> list[Node]:
        n, b = self.one_of(*WIDTHS), self.one_of(a, self.like(a))
        gate, up = self.product(a, n), self.product(b, n)
        return [*self.one_of([], [up]), ops.swiglu(gate, up)]

    def part(self, a: Node) -> list[Node]:
        half = width(a) // 4 * 2
        start = self.one_of(0, half)
        return [a[..., start : start + half]] if half >= 8 else []

    def reshape(self, a: Node) -> list[Node]:
        if a.ndim == 2:
            return [a.reshape(T, 2, width(a) // 2)]
        flat = ops.cont(a)
        return [self.one_of(a.permute(0, 2, 1), ops.concat(a, a, axis=1), flat.reshape(T, flat.shape[1] * width(a)))]

    def either(self, a: Node) -> list[Node]:
        return [choose({"few": (a, T <= self.one_of(1, 4)), "many": (self.like(a), ALWAYS)})]

    def turned(self, a: Node) -> list[Node]:
        return [ops.rope(self.product(a, 32).reshape(T, 2, 16), self.positions)] if a.ndim == 2 else []


WAYS = (
    *(Values.combine, Values.apply, Values.by_row, Values.normalise, Values.products, Values.residual),
    *(Values.gated, Values.part, Values.reshape, Values.either, Values.turned),
)


@st.composite
def graphs(draw: Any) -> Graph:
    values = Values(draw)
    for way in draw(st.lists(st.sampled_from(WAYS), min_size=2, max_size=14)):
        values.all += way(values, values.recent(values.all))
    kept = draw(st.lists(st.sampled_from(values.all), max_size=3))
    return Graph(**{f"y{i}": value for i, value in enumerate([*kept, values.all[-1]])})


def agrees(graph: Graph) -> None:
    reference = compile(graph, "reference").bind()
    found = {fuse: compile(graph, "cpu", CompileOptions(fuse=fuse)).bind() for fuse in (True, False)}
    for n in (1, 5, 9, 0):
        rng = np.random.default_rng(n)
        arrays = {name: rng.standard_normal((n, 32)).astype(np.float32) for name in graph.inputs if name != "positions"}
        if "positions" in graph.inputs:
            arrays["positions"] = rng.integers(0, 100, n).astype(np.int32)
        wanted = reference.run(arrays)
        moved = reference.run({name: x * (1 + x.dtype.type(2**-23)) if x.dtype.kind == "f" else x for name, x in arrays.items()})
        for fuse, step in found.items():
            for name, y in step.run(arrays).items():
                want = wanted[name].astype(np.float64)
                assert y.shape == want.shape
                size = max(np.abs(want).max(initial=0.0), 1e-30)
                worst = np.abs(y - want).max(initial=0.0) / size
                rounding = np.abs(moved[name] - want).max(initial=0.0) / size  # of its inputs: some graphs cancel
                assert worst <= max(1e-4, 16 * rounding), f"{name} of {n} tokens, fuse={fuse}: {worst:.1e}"


@given(graphs())
@settings(max_examples=60)
def test_a_random_graph(graph: Graph) -> None:
    agrees(graph)


@pytest.mark.deep
@given(graphs())
@settings(max_examples=1500)
def test_many_random_graphs(graph: Graph) -> None:
    agrees(graph)


def weight(n: int, seed: int) -> Node:
    return constant(f"w{seed}", np.random.default_rng(seed).standard_normal((n, 32)).astype(np.float32))


def test_two_products_of_one_value_are_added() -> None:
    """Each might take the other for its residual."""
    x = input("x", (T, 32))
    a, b = ops.mul_mat(weight(50, 1), x), ops.mul_mat(weight(50, 2), x)
    agrees(Graph(y=ops.add(a, b)))
    agrees(Graph(y=ops.add(a, ops.silu(b))))


def test_a_product_is_the_residual_of_another_and_is_kept() -> None:
    """Both of one value: were they one call, it would read what it is writing."""
    x = input("x", (T, 32))
    a, b, c = (ops.mul_mat(weight(50, seed), x) for seed in (1, 2, 3))
    agrees(Graph(y=ops.add(a, b), b=b))
    agrees(Graph(y=ops.add(a, ops.add(b, c)), z=ops.scale(c, scale=0.5)))


def test_a_part_of_an_input_is_an_output() -> None:
    x = input("x", (T, 32))
    agrees(Graph(y=x[:, 8:24]))
    agrees(Graph(y=x.reshape(T, 4, 8).permute(0, 2, 1), z=input("z", (T, 32)), w=ops.silu(x)))
