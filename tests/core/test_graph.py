"""Graphs: immutable, named by topology alone, and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import networkx as nx
import numpy as np
import pytest

from tensorgraph.compiler import compile
from tensorgraph.dims import ALWAYS, Dim
from tensorgraph.dtypes import f16, f32
from tensorgraph.errors import GraphError, ShapeError, TensorGraphError, UnknownNameError
from tensorgraph.graph import Graph, Node, append, choose, constant, input, read
from tensorgraph.ops import get_rows, mul_mat, relu, repeat, rms_norm, rope, scale, sigmoid, soft_max
from tensorgraph.verify import verify
from tensorgraph.views import IndexMap

T, S = Dim("T", 8), Dim("S", 32)


def network(**change: Any) -> Graph:
    """A graph with a bit of everything; `change` alters one part."""
    c: dict[str, Any] = {"dim": T, "rows": S, "name": "", "width": 6, "weight": "w", "dtype": "f32", "value": 1.0, "eps": 1e-5}
    c |= {"act": relu, "stream": "k", "kv": f16, "out": "y", "input": "x", "at": 0, "strided": False, "bound": 4, "scale": 1.0}
    assert set(change) <= set(c)
    c |= change
    n = c["width"]
    x = input(c["input"], (c["dim"], n))
    h = rms_norm(x, constant("literal", np.full((n,), c["value"], np.float32)), eps=c["eps"]).named(c["name"])
    h = c["act"](mul_mat(constant(c["weight"], shape=(n, n), dtype=c["dtype"]), h))
    k = append(c["stream"], h, c["rows"], c["kv"])
    half = h[:, ::2] if c["strided"] else h.reshape(c["dim"], 2, n // 2)[:, c["at"]]
    forms = {"a": (relu(h), Dim("G", 9) <= c["bound"]), "b": (sigmoid(h), ALWAYS)}
    return Graph({c["out"]: half * c["scale"], "c": choose(forms)}, effects=[k])


@pytest.mark.parametrize("change", [{}, {"value": 2.0}, {"name": "blk.0.norm"}])
def test_values_names_and_literals_are_not_topology(change: dict[str, Any]) -> None:
    assert network(**change).key == network().key


CHANGES: list[dict[str, Any]] = [
    {"dim": Dim("U", 8)},
    {"dim": Dim("T", 9)},
    {"dim": T * 2},
    {"dim": 4},
    {"rows": Dim("S", 33)},
    {"rows": Dim("R", 32)},
    {"width": 8},
    {"dtype": "f16"},
    {"eps": 1e-6},
    {"eps": 1.0000001e-5},
    {"act": sigmoid},
    {"stream": "v"},
    {"kv": f32},
    {"out": "z"},
    {"input": "tokens"},
    {"weight": "w2"},
    {"at": 1},
    {"strided": True},
    {"bound": 5},
    {"scale": 2.0},
]


def test_every_difference_of_topology_is_in_the_key() -> None:
    keys = {str(change): network(**change).key for change in ({}, *CHANGES)}
    assert len(set(keys.values())) == len(keys), keys


def test_a_dim_in_a_bound_an_offset_or_an_attribute_is_in_the_key() -> None:
    def keys(build: Callable[[Dim], Node]) -> set[str]:
        return {Graph(y=build(dim)).key for dim in (Dim("U", 3), Dim("U", 4), Dim("V", 3))}

    x = input("x", (9, 4))
    assert len(keys(lambda d: x.slice(0, d, d + 2))) == 3
    assert len(keys(lambda d: choose({"a": (relu(x), d <= 2), "b": (sigmoid(x), ALWAYS)}))) == 3
    assert len(keys(lambda d: repeat(x[:1], shape=(d, 4)))) == 3
    assert Graph(y=x.slice(0, Dim("U", 3), Dim("U", 3) + 2)).dims == {"U": Dim("U", 3)}


def test_wiring_and_the_order_of_outputs_are_topology() -> None:
    a, b = input("a", (4,)), input("b", (4,))
    assert Graph(y=a - b).key != Graph(y=b - a).key
    assert Graph(y=a, z=b).key != Graph(y=b, z=a).key
    k = append("k", input("x", (T, 4)), S, f16)
    assert Graph(y=k).key != Graph({"y": k}, effects=[k]).key
    assert Graph(y=relu(a) + relu(a)).key != Graph(y=(r := relu(a)) + r).key
    assert (
        Graph(y=rope(input("q", (T, 2, 4)), input("p", (T,), "i32"))).key
        != Graph(y=rope(input("q", (T, 2, 4)), input("p", (T,), "i32"), constant("f", shape=(2,)))).key
    )


def test_nothing_of_a_graph_can_be_changed() -> None:
    graph = network()
    node = next(n for n in graph if n.op == "rms_norm")
    with pytest.raises(FrozenInstanceError):
        node.op = "norm"  # type: ignore[misc]
    with pytest.raises(TypeError):
        node.attrs["eps"] = 1.0  # type: ignore[index]
    with pytest.raises(TypeError):
        graph.outputs["more"] = node  # type: ignore[index]
    for name in ("outputs", "effects", "nodes", "new"):
        with pytest.raises(AttributeError, match="a graph is immutable"):
            setattr(graph, name, ())


def test_a_literal_is_what_it_was_when_the_graph_was_built() -> None:
    values = np.ones(3, np.float32)
    node = constant("c", values)
    values[:] = 7
    assert node.data is not None and node.data.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        node.data[0] = 2


def test_numbers_in_arithmetic() -> None:
    x, given = input("x", (4,)), np.array([1, 2, 4, 8], np.float32)
    graph = Graph(a=x + 1, b=2.5 + x, c=x - 3, d=3 - x, e=x * np.float32(2), f=0.5 * x, g=x / 4, h=-x)
    results = compile(graph).run(x=given)
    expected = [given + 1, given + 2.5, given - 3, 3 - given, given * 2, given / 2, given / 4, -given]
    for result, wanted in zip(results.values(), expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("build", [lambda x: x + np.ones(4), lambda x: np.ones(4) * x, lambda x: x - "1", lambda x: x / 0])
def test_what_is_no_number_in_arithmetic(build: Callable[[Node], Node]) -> None:
    said = r"\[\w+\] wanted a value of a graph or a number .*; got .* \(test_graph.py:\d+\)"
    with pytest.raises(GraphError, match=said):
        build(input("x", (4,)))


def test_an_output_is_a_value_of_a_graph() -> None:
    with pytest.raises(GraphError, match=r"\[graph\] wanted at least one output, each a value; got \['y=3'\] \(test_graph.py:"):
        Graph({"y": 3})  # type: ignore[dict-item]


def test_a_graph_is_what_its_outputs_and_effects_reach() -> None:
    x = input("x", (T, 4))
    used, unused = relu(x), sigmoid(x)
    kept = append("k", scale(x, scale=2.0), S, f16)
    graph = Graph(y=used, effects=[kept])
    assert set(graph) == {x, used, kept, kept.inputs[0]} and unused not in graph.number
    assert graph.number[x] < graph.number[kept.inputs[0]] < graph.number[kept]
    assert graph.users[x] == (kept.inputs[0], used) and graph.users[used] == ()
    assert set(graph.streams) == {"k"} and set(graph.inputs) == {"x"} and graph.dims == {"T": T, "S": S}
    with pytest.raises(GraphError, match="wanted at least one output"):
        Graph()


def test_export_to_networkx() -> None:
    x = input("x", (T, 4))
    y = relu(x)
    graph = Graph(y=(y * y).named("square"))
    exported = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(exported) and list(exported.edges()) == [(0, 1), (1, 2), (1, 2)]
    assert exported.nodes[2] == {"op": "mul", "name": "square", "shape": "[T, 4]", "dtype": "f32"}


def test_finding_a_node_by_name() -> None:
    x = input("x", (T, 4))
    h = relu(x).named("blk.0.out")
    graph = Graph(y=sigmoid(h))
    assert graph.find("blk.0.out") is h and graph.find("y") is graph.outputs["y"] and graph.find("x") is x
    with pytest.raises(UnknownNameError, match=r"\[graph\] no node is named 'blk.1.out'. Named: blk.0.out"):
        graph.find("blk.1.out")
    assert graph.with_outputs({"h": h}).nodes == (x, h)


def test_a_node_knows_the_line_that_made_it() -> None:
    node = rms_norm(input("x", (4,)), eps=1e-5)
    assert node.where.startswith("test_graph.py:") and node.inputs[0].where == node.where
    assert str(Graph(y=node.named("n"))).splitlines()[1] == f'%1 f32[4] = rms_norm(x=%0) eps=1e-05  # "n" {node.where}'


def graph_of(*nodes: Node) -> Graph:
    """A graph whose order is taken as given."""
    graph = Graph(y=nodes[-1])
    graph.__dict__["nodes"] = nodes
    return graph


X = input("x", (T, 4))
Y = relu(X)
VIEW = X.permute(1, 0)

MALFORMED: dict[str, tuple[Callable[[], Graph], str]] = {
    "order": (lambda: graph_of(Y, X), "an input comes after its user"),
    "slots": (lambda: Graph(y=replace(Y, slots=("x", "w"))), "wanted one slot an input"),
    "unknown op": (lambda: Graph(y=replace(Y, op="reluu")), "there is no 'reluu'; did you mean 'relu'"),
    "shape": (lambda: Graph(y=replace(Y, shape=(T, 5))), r"the op infers f32\[T, 4\]"),
    "dtype": (lambda: Graph(y=replace(Y, dtype=f16)), r"the op infers f32\[T, 4\]"),
    "unknown attribute": (lambda: Graph(y=replace(Y, attrs={"eps": 1.0})), r"\[relu\] has no 'eps'"),
    "attribute": (lambda: Graph(y=replace(rms_norm(X, eps=1e-5), attrs={"eps": -1.0})), r"\[rms_norm\] eps must be within"),
    "role": (lambda: Graph(y=replace(Y, slots=("y",))), r"\[relu\] wanted the inputs x\[\*\]: real; got y"),
    "input's shape": (lambda: Graph(y=replace(Y + Y, inputs=(Y, input("z", (S, 4))))), r"\[add\] b must be"),
    "view of a view": (lambda: Graph(y=replace(VIEW, inputs=(VIEW,))), "wanted a view of a base"),
    "view's shape": (lambda: Graph(y=replace(VIEW, shape=(T, 4))), "of its map's shape"),
    "view's dtype": (lambda: Graph(y=replace(VIEW, dtype=f16)), "its base's dtype"),
    "view beyond": (lambda: Graph(y=view_of(IndexMap((2, 2), (3, 1), 4))), "reaches outside its base"),
    "view before": (lambda: Graph(y=view_of(IndexMap((2, 2), (2, 1), -1))), "reaches outside its base"),
    "forms": (lambda: Graph(y=replace(chosen(), inputs=(Y, VIEW))), "the forms differ in shape"),
    "appended twice": (
        lambda: Graph(y=Y, effects=[append("k", Y, S, f16), append("k", X, S, f16)]),
        "the stream 'k' is appended twice in a step",
    ),
    "read beside append": (
        lambda: Graph(y=relu(read("k", S, (4,), f32)), effects=[append("k", Y, S, f32)]),
        "the stream 'k' is read beside its append",
    ),
    "two maxima": (lambda: Graph(y=Y, z=relu(input("z", (Dim("T", 9),)))), "the dim T has two maxima: 8 and 9"),
    "two inputs": (lambda: Graph(y=Y + input("x", (T, 4))), "two nodes are the input 'x'"),
    "two constants": (
        lambda: Graph(y=constant("w", shape=(2,)) + constant("w", shape=(2,))),
        "two nodes are the constant 'w'",
    ),
    "read twice": (lambda: Graph(y=read("k", S, (4,), f32) - read("k", S, (4,), f32)), "two nodes are the stream 'k'"),
}


def view_of(index_map: IndexMap) -> Node:
    base = input("b", (2, 4))
    return replace(base.permute(1, 0), shape=index_map.shape, attrs={"map": index_map})


def chosen() -> Node:
    return choose({"a": (Y, T <= 2), "b": (sigmoid(X), ALWAYS)})


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_graph_is_caught(name: str) -> None:
    build, said = MALFORMED[name]
    with pytest.raises(TensorGraphError, match=said):
        verify(build())


def test_well_formed_graphs_pass() -> None:
    for graph in (
        network(),
        Graph(y=chosen()),
        Graph(y=VIEW),
        Graph(y=get_rows(constant("w", shape=(5, 4)), input("i", (T,), "i32"))),
    ):
        assert verify(graph) is graph


def test_choices_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"\[choose\] wanted .* from every form; 'b' gives"):
        choose({"a": (Y, T <= 2), "b": (VIEW, ALWAYS)})
    with pytest.raises(GraphError, match=r"\[choose\] the last form must be always possible; got: no form"):
        choose({})
    with pytest.raises(GraphError, match=r"\[choose\] the last form must be always possible; got: if T <= 3"):
        choose({"a": (Y, ALWAYS), "b": (soft_max(X), T <= 3)})
