"""The scheduler: placement, splits, copies, and the same results whatever runs where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import get_devices
from tensorgraph.dims import ALWAYS, Dim
from tensorgraph.engine import Engine
from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node, choose, constant, input
from tensorgraph.op import node_bytes
from tensorgraph.ops import cont, mul_mat, relu, rms_norm, scale, sigmoid, soft_max
from tensorgraph.plan import Plan
from tensorgraph.session import Session
from tests.core.arena import play_plan
from tests.core.devices import StrictDevice, pair
from tests.models import tiny

Array = np.ndarray[Any, Any]
T = Dim("T", 4)
RNG = np.random.default_rng(5)
WEIGHTS = {f"blk.{i}.w": RNG.standard_normal((6, 6)).astype(np.float32) for i in range(6)}
X = RNG.standard_normal((4, 6)).astype(np.float32)


def chain(n: int) -> Graph:
    """n layers `x + relu(x @ w)`, each under its name."""
    x = input("x", (T, 6))
    for i in range(n):
        x = (x + relu(mul_mat(constant(f"blk.{i}.w", shape=(6, 6)), x))).named(f"blk.{i}.out")
    return Graph(y=x)


def on_two(
    graph: Graph, placement: dict[str, str], refused: Sequence[str] = ()
) -> tuple[Plan, tuple[StrictDevice, StrictDevice]]:
    devices = pair(refused)
    return compile(graph, devices, CompileOptions(placement=placement, verify_passes=True)), devices


def check(graph: Graph, plan: Plan, devices: Sequence[StrictDevice], arrays: dict[str, Array]) -> dict[str, Array]:
    """Bit for bit the results of one device, and the traffic that the plan lists (all extents at their maxima)."""
    before = [(d.traffic.copies, d.traffic.size_bytes) for d in devices]
    results = plan.bind(WEIGHTS).run(arrays, dims={"T": 4})
    single = compile(graph).bind(WEIGHTS).run(arrays, dims={"T": 4})
    for name, value in single.items():
        assert results[name].tobytes() == value.tobytes()
    for device, (copies, size_bytes) in zip(devices, before, strict=True):
        arriving = [n for n in plan.scheduled.copies if plan.scheduled.device[n] == device.name]
        assert device.traffic.copies - copies == len(arriving)
        assert device.traffic.size_bytes - size_bytes == sum(map(node_bytes, arriving))
    return results


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_chain_is_cut_once_where_its_weights_are(cut: int) -> None:
    graph = chain(4)
    plan, devices = on_two(graph, {f"blk.{i}.w": "reference:1" for i in range(cut, 4)})
    assert [s.device for s in plan.scheduled.splits] == ["reference:0", "reference:1"]
    (copied,) = plan.scheduled.copies
    assert copied.inputs[0].name == f"blk.{cut - 1}.out" and plan.report({"T": 4}).copy_bytes == 4 * 6 * 4
    check(graph, plan, devices, {"x": X})
    assert devices[0].traffic.copies == 0 and devices[1].traffic.size_bytes == 96


def test_alternating_layers_cost_one_copy_each() -> None:
    graph = chain(5)
    plan, devices = on_two(graph, {"blk.[13].w": "reference:1", "blk.?.w": "reference:0"})
    assert [s.device[-1] for s in plan.scheduled.splits] == list("01010")
    assert len(plan.scheduled.copies) == 4
    check(graph, plan, devices, {"x": X})


def test_patterns_place_nodes_and_the_first_that_matches_counts() -> None:
    graph = chain(4)
    plan, devices = on_two(graph, {"blk.[12].out": "reference:1", "blk.2.*": "reference:0"})
    where = {n.name: d[-1] for n, d in plan.scheduled.device.items() if n.name.endswith(".out") and n.op != "copy"}
    assert where == {"blk.0.out": "0", "blk.1.out": "1", "blk.2.out": "1", "blk.3.out": "1"}
    products = [plan.scheduled.device[n][-1] for n in plan.graph if n.op == "mul_mat"]
    assert products == ["0", "0", "0", "1"]  # weights of layer 2 are placed; the others go where their input belongs
    check(graph, plan, devices, {"x": X})


def test_inputs_and_weights_are_held_where_they_are_used() -> None:
    """Also their views: nothing but computed values is copied."""
    x, w = input("x", (T, 6)), constant("blk.0.w", shape=(6, 6))
    a = relu(x.permute(1, 0)).named("a")
    b = mul_mat(w.permute(1, 0)[:, :4], x[:, 1:5]).named("b")
    c = mul_mat(w.permute(1, 0)[:, :4], x[:, 1:5] * 2.0).named("c")
    graph = Graph(a=a, b=b, c=c)
    plan, devices = on_two(graph, {"b": "reference:1"})
    assert {d for n, d in plan.scheduled.device.items() if n.name in ("a", "c") and n.op != "input"} == {"reference:0"}
    assert plan.scheduled.copies == ()
    check(graph, plan, devices, {"x": X})


def test_a_value_is_copied_once_however_often_it_is_used() -> None:
    h = sigmoid(input("x", (T, 6)))
    graph = Graph(y=relu(h).named("far.0") + (h * 2.0).named("far.1"), z=soft_max(h).named("far.2"))
    plan, devices = on_two(graph, {"far.*": "reference:1"})
    assert len(plan.scheduled.copies) == 1
    check(graph, plan, devices, {"x": X})


def test_a_copy_is_kept_for_later_splits() -> None:
    h = sigmoid(input("x", (T, 6)))
    a = relu(h).named("far.0")
    b = scale(a, scale=2.0).named("near")
    graph = Graph(y=(b + h).named("far.1"))
    plan, devices = on_two(graph, {"far.*": "reference:1", "near": "reference:0"})
    assert [s.device[-1] for s in plan.scheduled.splits] == list("0101") and len(plan.scheduled.copies) == 3
    check(graph, plan, devices, {"x": X})


def test_a_view_is_copied_as_the_elements_it_shows() -> None:
    h = sigmoid(input("x", (T, 6)))
    graph = Graph(y=relu(h[:, :2].permute(1, 0)).named("far"))
    plan, devices = on_two(graph, {"far": "reference:1"})
    assert plan.report({"T": 4}).copy_bytes == 4 * 2 * 4
    check(graph, plan, devices, {"x": X})


@pytest.mark.parametrize("where", ["reference:0", "reference:1"])
def test_outputs_that_are_inputs_weights_or_views_of_them(where: str) -> None:
    x, w = input("x", (T, 6)), constant("blk.0.w", shape=(6, 6))
    graph = Graph(x=x, w=w, xt=x.permute(1, 0), wt=w[1:, ::2], y=relu(x))
    plan, devices = on_two(graph, {"blk.0.w": where, "x": where})
    results = check(graph, plan, devices, {"x": X})
    np.testing.assert_array_equal(results["wt"], WEIGHTS["blk.0.w"][1:, ::2])


def test_what_a_device_cannot_run_goes_to_one_that_can_and_is_reported() -> None:
    graph = chain(2)
    plan, devices = on_two(graph, {}, refused=["relu"])
    assert [(n.op, wanted, got) for n, wanted, got in plan.scheduled.moved] == [("relu", "reference:0", "reference:1")] * 2
    assert len(plan.scheduled.copies) == 4
    check(graph, plan, devices, {"x": X})
    number = {n: i for n, i in plan.graph.number.items() if n.op == "relu"}
    for i in number.values():
        assert f"moved %{i} relu: reference:0 does not support it, runs on reference:1" in str(plan).splitlines()


def test_folding_uses_whatever_device_can() -> None:
    w = constant("blk.0.w", shape=(6, 6))
    graph = Graph(y=mul_mat(cont(sigmoid(w).permute(1, 0)), input("x", (T, 6))))
    plan, devices = on_two(graph, {}, refused=["sigmoid"])
    assert plan.prologue is not None and plan.scheduled.copies == ()
    results = plan.bind(WEIGHTS).run({"x": X})
    single = compile(graph).bind(WEIGHTS).run({"x": X})
    assert results["y"].tobytes() == single["y"].tobytes()


def test_what_no_device_supports() -> None:
    graph = Graph(y=relu(input("x", (T, 6))).named("blk.0.act"))
    devices = (StrictDevice("reference:0", ["relu"]), StrictDevice("reference:1", ["relu"]))
    line = r'%1 f32\[T, 6\] = relu\(x=%0\)  # "blk.0.act" test_schedule.py:\d+'
    said = r"\[schedule\] no device of reference:0, reference:1 supports " + line
    with pytest.raises(UnsupportedError, match=said):
        compile(graph, devices)


def test_devices_that_are_not_there() -> None:
    with pytest.raises(UnsupportedError, match=r"'blk.0.w' is placed on 'gpu'; the devices are reference:0, reference:1"):
        on_two(chain(1), {"blk.*": "gpu"})
    with pytest.raises(UnsupportedError, match=r"\[devices\] wanted .* each once; got reference, reference"):
        get_devices("reference, reference")
    with pytest.raises(UnsupportedError, match=r"\[devices\] wanted at least one, each once; got none"):
        get_devices([])
    assert [d.name for d in get_devices("reference,reference:1")] == ["reference", "reference:1"]


def test_choices_across_devices() -> None:
    """Only the copies of the form that a step takes are made."""
    x = sigmoid(input("x", (T, 6)))
    forms = {"few": (relu(x).named("far"), T <= 2), "many": (scale(x, scale=2.0), ALWAYS)}
    graph = Graph(y=rms_norm(choose(forms), eps=0.1))
    plan, devices = on_two(graph, {"far": "reference:1"})
    bound, single = plan.bind(), compile(graph).bind()
    for t, copies in ((4, 0), (2, 2), (3, 0), (1, 2)):
        before = sum(d.traffic.copies for d in devices)
        assert bound.run({"x": X[:t]})["y"].tobytes() == single.run({"x": X[:t]})["y"].tobytes()
        assert sum(d.traffic.copies for d in devices) - before == copies


@st.composite
def placed_graphs(draw: Any) -> tuple[Graph, dict[str, str]]:
    """Random graphs with views and choices; every node is placed somewhere or nowhere."""
    nodes: list[Node] = [input("x", (T, 6)), constant("blk.0.w", shape=(6, 6)), constant("blk.1.w", shape=(6, 6))]
    placement = {}
    for i in range(draw(st.integers(2, 14))):
        a, b = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        kind = draw(st.integers(0, 5))
        if kind == 0 and a.shape == b.shape:
            node = a + b
        elif kind == 1:
            node = mul_mat(nodes[1 + draw(st.integers(0, 1))], a)
        elif kind == 2 and a.shape == b.shape and a is not b:
            node = choose({"a": (a, T <= draw(st.integers(0, 4))), "b": (b, ALWAYS)})
        elif kind == 3:
            turned = a.reshape(a.shape[0], 2, 3).permute(0, 2, 1)
            node = (
                cont(turned).reshape(*a.shape)
                if draw(st.booleans())
                else a + cont(turned[:, 1:, 1]).reshape(a.shape[0], 2)[:, :1]
            )
        else:
            node = draw(st.sampled_from((relu, sigmoid)))(a)
        nodes.append(node.named(f"n{i}"))
        if draw(st.booleans()):
            placement[f"n{i}"] = f"reference:{draw(st.integers(0, 1))}"
    wanted = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))
    return Graph({f"y{i}": n for i, n in enumerate(wanted)}), placement


@given(placed_graphs(), st.sets(st.sampled_from(("relu", "add", "cont", "mul_mat"))))
@settings(max_examples=150)
def test_any_placement_gives_the_same(case: tuple[Graph, dict[str, str]], refused: set[str]) -> None:
    graph, placement = case
    devices = pair(sorted(refused))
    plan = compile(graph, devices, CompileOptions(placement=placement))
    arrays = {"x": X} if "x" in plan.graph.inputs else {}
    bound = plan.bind(WEIGHTS)
    before = sum(d.traffic.copies for d in devices)  # folding may have copied
    results = bound.run(arrays, dims={"T": 4})
    single = compile(graph).bind(WEIGHTS).run(arrays, dims={"T": 4})
    for name, value in single.items():
        assert results[name].tobytes() == value.tobytes()
    active = plan.active(plan.choose({"T": 4}))
    assert sum(d.traffic.copies for d in devices) - before == sum(n in active for n in plan.scheduled.copies)
    ways = [(n.inputs[0], plan.scheduled.device[n]) for n in plan.scheduled.copies]
    assert len(set(ways)) == len(ways)
    where = [s.device for s in plan.scheduled.splits]
    assert all(a != b for a, b in zip(where, where[1:], strict=False))
    play_plan(plan)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v32"])
def test_a_model_split_by_layers_gives_the_same_bits(architecture: str) -> None:
    """Weights and state of layer 1 on, on a second device: one hidden state goes over, and the logits stay."""
    ids = tiny.tokens(architecture)[:24]
    devices = pair()
    placement = {"blk.[1-9].*": "reference:1"}
    engine = Engine(tiny.model(architecture), devices, kv_dtype="f32", options=CompileOptions(placement=placement))
    wanted = tiny.whole(tiny.engine(architecture), ids)
    with Session(engine) as session:
        got = session.eval(ids, all_logits=True)
        assert got.tobytes() == wanted.tobytes()
        assert session.eval([5]).shape == (tiny.model(architecture).vocab_size,)
    assert [devices[0].traffic.copies, devices[1].traffic.copies] == [0, 2]
    assert devices[1].traffic.size_bytes == (24 + 1) * tiny.model(architecture).config.hidden_size * 4
