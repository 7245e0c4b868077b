"""Chains of element-wise nodes: the same bits as node by node, whatever is joined, read, stored, rounded and repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.backends.cpu.chains import MOST_STEPS, chain_group, find_chains
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.fusion import conditions, in_order
from tensorgraph.backends.cpu.group import CpuGroup
from tensorgraph.backends.cpu.grouping import single
from tensorgraph.backends.cpu.kernel import Context
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.graph import Graph, Node, choose, input
from tensorgraph.ops import cast, mul_mat, rms_norm, scale, sigmoid, silu, softplus, sqrt, swiglu

Array = np.ndarray[Any, Any]
T = Dim("T", 70)
OPTIONS = CompileOptions(fuse=False)


class Chaining(CpuDevice):
    """The CPU with chains and no other fusion."""

    def groups(self, nodes: Sequence[Node], graph: Graph, options: Any) -> Sequence[CpuGroup]:
        context = Context(self.target, False, lambda node: "dense")
        chains = [chain_group(chain, graph) for chain in find_chains(nodes, graph, conditions(graph))]
        joined = {node: group for group in chains for node in group.nodes}
        groups = dict.fromkeys(joined.get(node) or single(node, context) for node in nodes)
        ordered = in_order(list(groups), graph)
        assert ordered is not None
        return ordered  # type: ignore[return-value]


def chains_of(graph: Graph) -> list[list[str]]:
    """The ops of each chain, views left out."""
    return [[n.op for n in chain if n.op != "view"] for chain in find_chains(graph.nodes, graph, conditions(graph))]


def run(graph: Graph, arrays: Mapping[str, Array], device: Any) -> dict[str, Array]:
    return compile(graph, device, OPTIONS).bind().run({k: v for k, v in arrays.items() if k in graph.inputs})


def numbers(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def assert_same(graph: Graph, arrays: Mapping[str, Array]) -> None:
    """The bits of node by node, and the reference's values."""
    got, alone, exact = (run(graph, arrays, device) for device in (Chaining(), "cpu", "reference"))
    for name, value in got.items():
        np.testing.assert_array_equal(value, alone[name])
        coarse = graph.outputs[name].dtype.name != "f32" or any(n.dtype.name == "f16" for n in graph.nodes)
        rtol, atol = (2e-2, 2e-2) if coarse else (2e-5, 2e-6)
        np.testing.assert_allclose(value.astype(np.float64), exact[name].astype(np.float64), rtol=rtol, atol=atol)


def test_inner_values_are_not_stored() -> None:
    x, b = input("x", (T, 24)), input("b", (24,))
    graph = Graph(y=sigmoid(x * b + b) * 2.0)
    (chain,) = find_chains(graph.nodes, graph, conditions(graph))
    group = chain_group(chain, graph)
    assert [n.op for n in chain] == ["mul", "add", "sigmoid", "scale"]
    assert group.stored == (graph.outputs["y"],)
    assert set(group.calls[0].operands) == {"y0", "x0", "x1"}  # b is read once
    for n in (0, 1, 5, 70):
        assert_same(graph, {"x": numbers((n, 24)), "b": numbers((24,))})


def test_outputs_and_what_others_read_are_stored() -> None:
    x = input("x", (T, 16))
    first = silu(x)
    second = first * x
    third = second + first
    graph = Graph(y=third, tapped=first, other=rms_norm(second.reshape(-1, 4), eps=1e-6))
    (chain,) = find_chains(graph.nodes, graph, conditions(graph))
    assert set(chain_group(chain, graph).stored) == {first, second, third}
    assert_same(graph, {"x": numbers((9, 16))})


def test_views_in_the_same_order_of_elements_are_passed() -> None:
    x, b = input("x", (T, 16)), input("b", (4, 1))
    graph = Graph(y=(silu(x).reshape(T, 4, 4) * b).reshape(T * 16) * 3.0)
    assert chains_of(graph) == [["silu", "mul", "scale"]]
    assert_same(graph, {"x": numbers((5, 16)), "b": numbers((4, 1))})


def test_permuted_and_cut_values_are_not_joined() -> None:
    x = input("x", (4, 4))
    assert chains_of(Graph(y=silu(x) + silu(x * 2.0).permute(1, 0))) == [["silu", "add"], ["scale", "silu"]]
    half = silu(x)
    assert chains_of(Graph(y=swiglu(half))) == []
    assert chains_of(Graph(y=half * half[:, :1])) == []  # the whole and a column of one value


def test_rounding_between_is_kept() -> None:
    x = input("x", (33,), "f16")
    y = sqrt(softplus(scale(x, scale=0.1)))
    narrow = cast(cast(y, dtype="f32") * 1.001, dtype="bf16")
    graph = Graph(y=narrow, whole=cast(cast(narrow, dtype="f32") * 100.0, dtype="i32"))
    assert chains_of(graph) == [["scale", "softplus", "sqrt", "cast", "scale", "cast", "cast", "scale", "cast"]]
    x16 = numbers((33,), np.float16)
    got, alone = run(graph, {"x": x16}, Chaining()), run(graph, {"x": x16}, "cpu")
    for name in got:
        np.testing.assert_array_equal(got[name], alone[name])


def test_rounding_to_blocks_ends_a_chain() -> None:
    x = input("x", (2, 64))
    graph = Graph(y=cast(cast(silu(x) * 2.0, dtype="q8_0"), dtype="f32") * 3.0)
    assert chains_of(graph) == [["silu", "scale"], ["cast", "scale"]]
    assert_same(graph, {"x": numbers((2, 64))})


def test_a_way_round_through_other_nodes_keeps_two_chains_apart() -> None:
    x, w = input("x", (T, 8)), input("w", (8, 8))
    first = silu(x)
    graph = Graph(y=first + mul_mat(w, first) * 2.0)
    assert chains_of(graph) == [["scale", "add"]]
    assert_same(graph, {"x": numbers((3, 8)), "w": numbers((8, 8))})


def test_two_chains_that_would_need_each_other() -> None:
    x, w = input("x", (T, 8)), input("w", (8, 8))
    a, b = silu(x), silu(x * 0.5)
    graph = Graph(y=sigmoid(a) + mul_mat(w, b * 3.0), z=sigmoid(b) + mul_mat(w, a * 3.0))
    found = find_chains(graph.nodes, graph, conditions(graph))
    groups = [chain_group(chain, graph) for chain in found]
    joined = {n for g in groups for n in g.nodes}
    assert in_order([*groups, *(CpuGroup((n,), ()) for n in graph.nodes if n not in joined)], graph) is not None
    assert_same(graph, {"x": numbers((3, 8)), "w": numbers((8, 8))})


def test_only_nodes_of_one_condition_and_of_no_other_group() -> None:
    x = input("x", (T, 8))
    first = silu(x)
    few, many = sigmoid(first * 2.0), sigmoid(first * 3.0)
    graph = Graph(y=choose({"few": (few, T <= 4), "many": (many, True)}) * 2.0)
    assert chains_of(graph) == [["scale", "sigmoid"], ["scale", "sigmoid"]]
    free = {n: frozenset() for n in graph.nodes}
    assert len(find_chains(graph.nodes, graph, free)[0]) == 5  # one condition: all but what reads the choice
    taken = {n for n in graph.nodes if n.op == "sigmoid"}
    assert find_chains(graph.nodes, graph, conditions(graph), taken) == []
    for n in (3, 9):
        assert_same(graph, {"x": numbers((n, 8))})


def test_a_chain_has_a_greatest_length() -> None:
    y = input("x", (17,))
    for i in range(2 * MOST_STEPS + 3):
        y = scale(y, scale=1.0 + 1 / (i + 2), bias=-0.125)
    graph = Graph(y=y)
    assert [len(c) for c in chains_of(graph)] == [MOST_STEPS, MOST_STEPS, 3]
    got, alone = run(graph, {"x": numbers((17,))}, Chaining()), run(graph, {"x": numbers((17,))}, "cpu")
    np.testing.assert_array_equal(got["y"], alone["y"])


SHAPES: dict[str, tuple[Any, ...]] = {
    "x": (T, 3, 8),
    "flat": (T, 24),
    "one": (1,),
    "row": (8,),
    "column": (3, 1),
    "token": (T, 1, 1),
    "turned": (8, T, 3),
}


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_graph_of_them(data: st.DataObject) -> None:
    """Random element-wise graphs over operands of many strides, some values of which are outputs or go through a norm."""
    dtype = data.draw(st.sampled_from(("f32", "f32", "f16")))
    inputs = {name: input(name, shape, dtype) for name, shape in SHAPES.items()}
    full = [inputs["x"], inputs["flat"].reshape(T, 3, 8), inputs["turned"].permute(1, 2, 0)]
    others = [inputs[name] for name in ("one", "row", "column", "token")]
    for _ in range(data.draw(st.integers(2, 10))):
        a = data.draw(st.sampled_from(full))
        kind = data.draw(st.sampled_from(("unary", "scale", "binary", "broadcast", "norm", "reshape")))
        if kind == "unary":
            full.append(data.draw(st.sampled_from((silu, sigmoid)))(a))
        elif kind == "scale":
            full.append(a * data.draw(st.sampled_from((0.5, -1.25))) + 0.25)
        elif kind == "norm":
            full.append(rms_norm(a, eps=1e-3))
        elif kind == "reshape":
            full.append((sigmoid(a).reshape(T, 24) * inputs["flat"]).reshape(T, 3, 8))
        else:
            b = data.draw(st.sampled_from(full if kind == "binary" else others))
            full.append(data.draw(st.sampled_from((lambda a, b: a + b, lambda a, b: sigmoid(a) * b)))(a, b))
    tapped = data.draw(st.sampled_from(full[3:]))
    graph = Graph(y=full[-1], tapped=tapped + 0.0)
    n = data.draw(st.sampled_from((0, 1, 2, 33, 70)))
    arrays = {name: numbers([n if e is T else e for e in shape]) for name, shape in SHAPES.items()}
    arrays = {name: array.astype(np.float16 if dtype == "f16" else np.float32) for name, array in arrays.items()}
    used = {name: array for name, array in arrays.items() if name in graph.inputs}
    if not any(T in graph.inputs[name].shape for name in used):
        return
    assert_same(graph, used)


@pytest.mark.parametrize("target", ["avx2", "baseline"])
def test_other_targets(target: str) -> None:
    x, b = input("x", (T, 5, 3)), input("b", (5, 1))
    graph = Graph(y=sigmoid(x * b + x) * 2.0)
    arrays = {"x": numbers((41, 5, 3)), "b": numbers((5, 1))}
    got, alone = run(graph, arrays, Chaining(f"cpu:{target}")), run(graph, arrays, f"cpu:{target}")
    np.testing.assert_array_equal(got["y"], alone["y"])
    np.testing.assert_allclose(got["y"], run(graph, arrays, "reference")["y"], rtol=1e-6)
