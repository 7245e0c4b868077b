"""Passes: each changes what it says, keeps every result, and leaves a graph that the verifier accepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph import registry
from tensorgraph.compiler import PASSES, CompileOptions, compile
from tensorgraph.dims import ALWAYS, Dim
from tensorgraph.dtypes import f16
from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import STRUCTURAL, Graph, Node, append, choose, constant, input, topological
from tensorgraph.op import Attr, Op
from tensorgraph.ops import cast, cont, mul, mul_mat, relu, repeat, scale, sigmoid, silu, soft_max, sum_rows
from tensorgraph.passes import EliminateCommon, ExpandFused, FoldConstants, LowerGuarded
from tensorgraph.verify import verify

Array = np.ndarray[Any, Any]
T = Dim("T", 8)


def run(node: Node, weights: dict[str, Array] | None = None, options: CompileOptions | None = None, **arrays: Array) -> Array:
    plan = compile(Graph(y=node), options=options or CompileOptions(verify_passes=True))
    return plan.bind(weights).run(arrays)["y"]


def ops_of(graph: Graph) -> list[str]:
    return [n.op for n in graph if n.op not in ("input", "constant")]


@st.composite
def networks(draw: Any) -> Graph:
    """Random element-wise graphs over a [T, 4] input and weights, with views and much repetition."""
    nodes = [input("x", (T, 4)), constant("w", shape=(4,)), constant("v", shape=(4,)), constant("c", np.ones(4, np.float32) * 3)]
    for _ in range(draw(st.integers(1, 12))):
        a, b = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            nodes.append(relu(a))
        elif kind == 1:
            nodes.append(scale(a, scale=draw(st.sampled_from((0.5, 2.0)))))
        elif kind == 2 and a.ndim >= b.ndim:
            nodes.append(a + b)
        elif kind == 3:
            swapped = a.reshape(*a.shape[:-1], 2, 2).permute(*range(a.ndim - 1), a.ndim, a.ndim - 1)
            nodes.append(cont(swapped).reshape(*a.shape))
        else:
            nodes.append(a * 1.5)
    wanted = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))
    return Graph({f"y{i}": n for i, n in enumerate(wanted)})


WEIGHTS = {"w": np.array([1, -2, 3, -4], np.float32), "v": np.array([-1, 0, 0.5, 2], np.float32)}
X = np.array([[1, 2, -3, 4], [0.5, -0.25, 0, 9], [7, -8, 9, 1]], np.float32)


def by_hand(node: Node, known: dict[Node, Array]) -> Array:
    """A node's value by walking the graph as it was written."""
    for n in topological([node]):
        if n not in known and n.op == "view":
            shape, strides, offset = n.index_map.resolve({"T": 3})
            flat = np.ascontiguousarray(known[n.base]).reshape(-1)
            known[n] = np.lib.stride_tricks.as_strided(flat[offset:], shape, [4 * s for s in strides])
        elif n not in known:
            arrays = {slot: known[i].astype(np.float64) for slot, i in zip(n.slots, n.inputs, strict=True)}
            known[n] = registry.ops.get(n.op).compute(arrays, n.attrs).astype(np.float32)
    return known[node]


@given(networks())
@settings(max_examples=100)
def test_compiling_changes_no_result(graph: Graph) -> None:
    known = {n: X if n.op == "input" else n.data if n.data is not None else WEIGHTS[n.name] for n in graph if not n.inputs}
    plan = compile(graph, options=CompileOptions(verify_passes=True))
    arrays = {"x": X} if "x" in plan.graph.inputs else {}
    results = plan.bind(WEIGHTS).run(arrays, dims={"T": 3})
    for name, node in graph.outputs.items():
        np.testing.assert_array_equal(results[name], by_hand(node, dict(known)))


@given(networks())
@settings(max_examples=100)
def test_nothing_is_computed_twice(graph: Graph) -> None:
    def value(node: Node) -> str:
        made = f"{node.op}{sorted(node.attrs.items(), key=str)}{node.shape}"
        return f"({made} {' '.join(map(value, node.inputs))})"

    merged = verify(EliminateCommon()(graph))
    assert len({value(n) for n in merged}) == len(merged) == len({value(n) for n in graph})
    assert EliminateCommon()(merged).key == merged.key


def test_common_parts_are_merged_unless_something_differs() -> None:
    x = input("x", (T, 4))
    assert ops_of(EliminateCommon()(Graph(y=relu(x) + relu(x)))) == ["relu", "add"]
    assert ops_of(EliminateCommon()(Graph(y=x.permute(1, 0), z=x.permute(1, 0)))) == ["view"]
    for other in (sigmoid(x), relu(x.permute(1, 0)), relu(constant("x", shape=(4,))), relu(x[:, :2])):
        assert len(EliminateCommon()(Graph(y=relu(x), z=other))) == len(Graph(y=relu(x), z=other))
    assert len(EliminateCommon()(Graph(y=scale(x, scale=1.0), z=scale(x, scale=1.0 + 2**-50)))) == 3


def test_appends_are_never_merged() -> None:
    x = relu(input("x", (T, 4)))
    graph = Graph(y=append("a", x, T, f16), z=append("a", x, T, f16))
    assert ops_of(EliminateCommon()(graph)).count("append") == 2


# Folding.


def test_what_comes_from_weights_alone_is_folded() -> None:
    x, w = input("x", (T, 4)), constant("w", shape=(4, 4))
    doubled = scale(w, scale=2.0)
    folded = FoldConstants()(Graph(y=mul_mat(cont(doubled.permute(1, 0)), x), z=doubled))
    assert folded.prologue is not None
    assert ops_of(verify(folded.graph)) == ["mul_mat"]
    assert sorted(folded.graph.constants) == ["fold:0", "fold:1"] and set(folded.prologue.constants) == {"w"}
    weights = {"w": np.arange(16, dtype=np.float32).reshape(4, 4)}
    plan = compile(Graph(y=mul_mat(cont(doubled.permute(1, 0)), x), z=doubled))
    results = plan.bind(weights).run({"x": X})
    np.testing.assert_array_equal(results["y"], X @ (2 * weights["w"]))
    np.testing.assert_array_equal(results["z"], 2 * weights["w"])


def test_views_of_weights_are_not_folded_and_literals_are() -> None:
    w, c = constant("w", shape=(4, 4)), constant("c", np.array([1, 2], np.float32))
    x = input("x", (T, 4))
    folded = FoldConstants()(Graph(y=mul_mat(w.permute(1, 0), x)))
    assert folded.prologue is None and ops_of(folded.graph) == ["view", "mul_mat"]
    assert FoldConstants()(Graph(y=scale(c, scale=3.0))).graph.constants.keys() == {"fold:0"}
    np.testing.assert_array_equal(run(scale(c, scale=3.0)), [3, 6])


def test_what_has_a_runtime_extent_is_not_folded() -> None:
    w = constant("w", shape=(1, 4))
    graph = Graph(y=relu(repeat(scale(w, scale=2.0), shape=(T, 4))) + input("x", (T, 4)))
    folded = FoldConstants()(graph)
    assert ops_of(verify(folded.graph)) == ["repeat", "relu", "add"]
    np.testing.assert_array_equal(run(graph.outputs["y"], {"w": X[:1]}, x=X), X + 2 * np.maximum(X[:1], 0))


def test_a_folded_block_type_becomes_f32() -> None:
    """Quantised once by the op that says so, never again: the products are those of the decoded blocks."""
    w, x = constant("w", shape=(2, 32)), input("x", (T, 32))
    quantised = cast(w, dtype="q4_0")
    folded = FoldConstants()(Graph(y=mul_mat(quantised, x)))
    assert folded.graph.constants["fold:0"].dtype.name == "f32"
    rng = np.random.default_rng(3)
    weights = {"w": rng.standard_normal((2, 32)).astype(np.float32)}
    inputs = rng.standard_normal((3, 32)).astype(np.float32)
    decoded = run(cast(cast(input("a", (2, 32)), dtype="q4_0"), dtype="f32"), a=weights["w"])
    assert 0 < np.abs(decoded - weights["w"]).max() < 1
    np.testing.assert_allclose(run(mul_mat(quantised, x), weights, x=inputs), inputs @ decoded.T, rtol=1e-5, atol=1e-5)
    verify(FoldConstants()(Graph(y=mul_mat(quantised[1:], x), row=quantised[0])).graph)  # a view is of its base's dtype


# Fused ops and guarded forms.


@pytest.fixture
def twice() -> Iterator[Op]:
    """`test_twice` is `test_once` of itself, which is two adds: expansions within expansions."""
    once = Op("test_once", "x[...]: real, bias[...]?: real -> y[...]: x", attrs={"by": Attr(float, 1.0)})
    outer = Op("test_twice", "x[...]: real -> y[...]: x")

    @once.expand
    def expand_once(x: Node, bias: Node | None, *, by: float) -> Node:
        return scale(x, scale=by) if bias is None else scale(x, scale=by) + bias

    @outer.expand
    def expand_twice(x: Node) -> Node:
        return once(once(x, by=2.0), x, by=3.0)

    yield outer
    registry.ops.remove("test_once")
    registry.ops.remove("test_twice")


def test_a_fused_op_is_expanded_until_a_device_can_run_it(twice: Op) -> None:
    x = input("x", (T, 4))

    def plain(node: Node) -> bool:
        return not node.op.startswith("test_")

    expanded = verify(ExpandFused(plain)(Graph(y=twice(x).named("blk.0.twice"))))
    assert ops_of(expanded) == ["scale", "scale", "add"] and expanded.outputs["y"].name == "blk.0.twice"
    inner = verify(ExpandFused(lambda n: n.op != "test_twice")(Graph(y=twice(x))))
    assert ops_of(inner) == ["test_once", "test_once"]
    whole = Graph(y=twice(x))
    assert ExpandFused(lambda n: True)(whole) is whole
    np.testing.assert_array_equal(run(twice(x), x=X), 7 * X)


@pytest.fixture
def formed() -> Iterator[Op]:
    """An op that adds 0 as itself, 1 in its form "small" (T <= 2), 2 in "wide" (T >= 6, with large intermediates)."""
    op = Op("test_formed", "x[T, N]: real -> y[T, N]: x")
    op.reference(lambda x: x + 0.0)
    op.lowering("small", lambda node: node.shape[0] <= 2)(lambda x: x + 1.0)

    @op.lowering("wide", lambda node: node.shape[0] >= 6)  # type: ignore[arg-type]
    def wide(x: Node) -> Node:
        spread = repeat(x.reshape(*x.shape, 1), shape=(*x.shape, 64))
        return sum_rows(spread).reshape(*x.shape) * (1 / 64) + 2.0

    yield op
    registry.ops.remove("test_formed")


X8 = np.arange(32, dtype=np.float32).reshape(8, 4)


def added(node: Node, t: int, **options: Any) -> float:
    result = run(node, options=CompileOptions(verify_passes=True, **options), x=X8[:t]) - X8[:t]
    assert (result == result.flat[0]).all()
    return float(result.flat[0])


def test_guards_choose_the_form_by_the_extents_of_the_step(formed: Op) -> None:
    node = formed(input("x", (T, 4)))
    assert [added(node, t) for t in (1, 2, 3, 5, 6, 8)] == [1, 1, 0, 0, 2, 2]
    plan = compile(Graph(y=node))
    bound = plan.bind()
    steps = [float((bound.run({"x": X8[:t]})["y"] - X8[:t]).max()) for t in (1, 8, 4, 2)]
    assert steps == [1, 2, 0, 1]
    assert [plan.choose({"T": t}) for t in (2, 6, 4)] == [(0,), (1,), (2,)]


def test_guards_of_numbers_are_known_when_the_graph_is_compiled(formed: Op) -> None:
    assert [added(formed(input("x", (t, 4))), t) for t in (1, 2, 3, 6)] == [1, 1, 0, 2]
    plan = compile(Graph(y=formed(input("x", (4, 4)))))
    assert ops_of(plan.graph) == ["test_formed"]


def test_passes_are_left_out_by_name(formed: Op) -> None:
    """A graph with something for each to do."""
    x = input("x", (4, 4))
    double = Op("test_double", "x[...]: real -> y[...]: x")
    double.expand(lambda x: x + x)  # and has no reference: no device runs it
    try:
        doubled = scale(constant("w", np.eye(4, dtype=np.float32)), scale=2.0)
        shown = {"a": mul_mat(doubled, relu(x)), "b": sum_rows(relu(x)), "c": mul(silu(x), x), "e": double(x)}
        graph = Graph(shown, d=formed(input("y", (T, 4))))
        everything = compile(graph, options=CompileOptions(verify_passes=True)).graph
        does = {
            "eliminate_common": lambda g: ops_of(g).count("relu") == 1,
            "fuse_declared": lambda g: "swiglu" in ops_of(g),
            "lower_guarded": lambda g: "choose" in ops_of(g),
            "fold_constants": lambda g: "fold:0" in g.constants,
        }
        assert {*does, "expand_fused"} == set(PASSES) and all(done(everything) for done in does.values())
        for name in does:
            left = compile(graph, options=CompileOptions(without=(name,), verify_passes=True)).graph
            assert {other: done(left) for other, done in does.items()} == {other: other != name for other in does}
        with pytest.raises(UnsupportedError, match="test_double"):
            compile(graph, options=CompileOptions(without=("expand_fused",)))
    finally:
        registry.ops.remove("test_double")


def test_only_the_chosen_form_is_computed(formed: Op) -> None:
    plan = compile(Graph(y=formed(input("x", (T, 4)))))
    kinds = {t: {n.op for n in plan.active(plan.choose({"T": t})) if n.op not in STRUCTURAL} for t in (1, 4, 8)}
    assert kinds == {1: {"scale"}, 4: {"test_formed"}, 8: {"repeat", "sum_rows", "scale"}}


def test_forms_are_forced_by_name(formed: Op) -> None:
    node = formed(input("x", (T, 4)))
    assert [added(node, t, lowerings=("wide",)) for t in (1, 4, 8)] == [2, 2, 2]
    assert [added(node, t, lowerings=("test_formed",)) for t in (1, 4, 8)] == [0, 0, 0]
    assert [added(node, t, lowerings=("other", "small")) for t in (1, 4, 8)] == [1, 1, 1]
    forced = LowerGuarded(force=("wide",))(Graph(y=node))
    assert "choose" not in ops_of(forced)


def test_a_form_whose_scratch_is_too_large_is_dropped(formed: Op) -> None:
    node = formed(input("x", (T, 4)))
    scratch = 8 * 4 * 64 * 4 + 8 * 4 * 4 * 3  # repeated, summed, scaled twice; at the largest T
    assert added(node, 8, scratch_bytes=scratch) == 2
    assert [added(node, t, scratch_bytes=scratch - 1) for t in (1, 4, 8)] == [1, 0, 0]
    assert [added(node, t, scratch_bytes=1) for t in (1, 8)] == [0, 0]
    assert ops_of(LowerGuarded(scratch_bytes=1)(Graph(y=node))) == ["test_formed"]


def test_choices_within_choices(formed: Op) -> None:
    x = input("x", (T, 4))
    inner = formed(formed(x))
    node = choose({"left": (inner, x.shape[0] <= 7), "right": (x + 10.0, ALWAYS)}).named("out")
    assert [added(node, t) for t in (1, 4, 6, 8)] == [2, 0, 4, 10]
    assert added(node, 6, lowerings=("right",)) == 10
    assert added(node, 6, lowerings=("small",)) == 2


def test_what_both_forms_need_is_no_scratch_of_one() -> None:
    x = input("x", (T, 4))
    shared = soft_max(repeat(x.reshape(T, 4, 1), shape=(T, 4, 64))).named("shared")
    forms = {"a": (sum_rows(shared).reshape(T, 4), x.shape[0] <= 4), "b": (shared[:, :, 0] * 1.0, ALWAYS)}
    kept = LowerGuarded(scratch_bytes=8 * 4 * 4)(Graph(y=choose(forms)))
    assert "choose" in ops_of(kept)
    assert "choose" not in ops_of(LowerGuarded(scratch_bytes=8 * 4 * 4 - 1)(Graph(y=choose(forms))))


def test_what_only_guarded_forms_share_is_scratch_of_each() -> None:
    x = input("x", (T, 4))
    large = sum_rows(repeat(x.reshape(T, 4, 1), shape=(T, 4, 64))).reshape(T, 4)
    forms = {"a": (scale(large, scale=1.0), T <= 2), "b": (scale(large, scale=2.0), T <= 4), "c": (x + 1.0, ALWAYS)}
    assert ops_of(LowerGuarded(scratch_bytes=4096)(Graph(y=choose(forms)))) == ["scale"]
    assert "choose" in ops_of(LowerGuarded(scratch_bytes=1 << 20)(Graph(y=choose(forms))))


def test_a_name_survives_the_loss_of_its_forms(formed: Op) -> None:
    node = formed(input("x", (T, 4))).named("blk.0.y")
    for options in ({"force": ("wide",)}, {"scratch_bytes": 1}):
        lowered = LowerGuarded(**options)(Graph(y=node))  # type: ignore[arg-type]
        assert lowered.outputs["y"].name == "blk.0.y"
    x = input("x", (T, 4))
    chosen = choose({"a": (relu(relu(x)), x.shape[0] <= 4), "b": (sigmoid(x), ALWAYS)}, "out")
    lowered = LowerGuarded(scratch_bytes=1)(Graph(y=chosen)).outputs["y"]
    assert (lowered.op, lowered.name) == ("sigmoid", "out")
