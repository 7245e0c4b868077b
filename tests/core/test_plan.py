"""Plans: what they cost and say, the cache that finds them, and what running one refuses."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions, PlanCache, compile, plan_key
from tensorgraph.device import get_devices
from tensorgraph.dims import ALWAYS, Dim
from tensorgraph.dtypes import f16
from tensorgraph.errors import GraphError, InputError, UnknownNameError
from tensorgraph.graph import Graph, append, choose, constant, input
from tensorgraph.ops import flash_attn, get_rows, mul_mat, relu, rms_norm, scale, swiglu
from tensorgraph.ops.attention import Segment
from tests.core.devices import pair

Array = np.ndarray[Any, Any]
T, S = Dim("T", 8), Dim("S", 32)


def mlp(name: str = "w", size: int = 64, dtype: str = "f32", literal: float = 1.0) -> Graph:
    """`x + down(swiglu(gate x, up x))` with a norm whose weight is a literal."""
    x = input("x", (T, 32))
    h = rms_norm(x, constant("norm", np.full(32, literal, np.float32)), eps=1e-6)
    gate, up = (mul_mat(constant(f"{name}.{part}", shape=(size, 32), dtype=dtype), h) for part in ("gate", "up"))
    return Graph(y=x + mul_mat(constant(f"{name}.down", shape=(32, size), dtype=dtype), swiglu(gate, up)))


def weights(seed: int, size: int = 64) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"w.gate": (size, 32), "w.up": (size, 32), "w.down": (32, size)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def mlp_by_hand(x: Array, w: dict[str, Array], literal: float = 1.0) -> Array:
    x = x.astype(np.float64)
    h = literal * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    gate, up = h @ w["w.gate"].T, h @ w["w.up"].T
    return x + (gate / (1 + np.exp(-gate)) * up) @ w["w.down"].T


X = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)


# What a plan says of itself.


@pytest.mark.parametrize("t", [1, 5, 8])
def test_the_report_of_a_feed_forward_network(t: int) -> None:
    report = compile(mlp(dtype="q8_0")).report({"T": t})
    row, hidden, matrix = 32 * 4, 64 * 4, 64 * (32 // 32) * 34
    products = {"flops": 3 * 2 * t * 32 * 64, "bytes": 3 * matrix + 3 * t * (row + hidden)}
    # The norm, the gated unit and the sum: every input and the result once; four operations an element of the norm.
    others = (2 * t * row + row) + 3 * t * hidden + 3 * t * row
    assert report.read_write_bytes == products["bytes"] + others
    assert report.flops == products["flops"] + t * (4 * 32 + 64 + 32)
    assert report.weight_bytes == 3 * matrix + row
    assert (report.kernels, report.nodes, report.splits, report.copies, report.copy_bytes) == (6, 6 + 5, 1, 0, 0)
    # At the largest T: gate, up and their product, in whose place the norm was.
    assert report.arena_bytes == {"reference": 8 * 3 * hidden}


def test_the_report_of_attention() -> None:
    q, pos = input("q", (T, 4, 16)), input("pos", (T,), "i32")
    k, v = (append(name, input(f"new_{name}", (T, 2, 16)), S, f16) for name in "kv")
    seq, segment = input("seq", (T,), "i32"), Segment(k, v, input("k_pos", (S,), "i32"), input("k_seq", (S,), "i32"))
    o = flash_attn(q, segment, scale=0.25, pos=pos, seq=seq)
    report = compile(Graph(o=o)).report({"T": 3, "S": 20})
    assert report.flops == 2 * 2 * 3 * 4 * 20 * 16
    read = 3 * 4 * 16 * 4 + 2 * 20 * 2 * 16 * 2 + 2 * 20 * 4 + 2 * 3 * 4
    assert report.read_write_bytes == read + 3 * 4 * 16 * 4
    assert report.weight_bytes == 0 and report.kernels == 1


def test_the_report_counts_only_the_form_and_the_copies_of_its_step() -> None:
    h = relu(input("x", (T, 32)))
    few = mul_mat(constant("w", shape=(32, 32)), h).named("few")
    graph = Graph(y=choose({"few": (few, T <= 2), "many": (scale(h, scale=2.0), ALWAYS)}))
    plan = compile(graph, pair(), CompileOptions(placement={"few": "reference:1"}))
    small, large = plan.report({"T": 2}), plan.report({"T": 3})
    assert (small.copies, small.copy_bytes, small.weight_bytes) == (2, 2 * 2 * 32 * 4, 32 * 32 * 4)
    assert (large.copies, large.copy_bytes, large.weight_bytes) == (0, 0, 0)
    assert small.flops == 2 * 32 + 2 * 2 * 32 * 32


def test_a_plan_prints_its_splits_choices_and_memory() -> None:
    h = relu(input("x", (T, 32)))
    plan = compile(Graph(y=choose({"few": (relu(h * 2.0), (T <= 2) & (S >= 4)), "many": (h * 3.0, ALWAYS)})))
    lines = str(plan).splitlines()
    x, *computed = (line.split("  #")[0].split(" @")[0] for line in lines[1:7] if not line.startswith("split"))
    assert lines[0] == f"plan {plan.key}" and lines[2] == "split 0 on reference"
    assert (x, *computed) == (
        "  %0 f32[T, 32] = input() name=x",
        "  %1 f32[T, 32] = relu(x=%0)",
        "  %2 f32[T, 32] = scale(x=%1) scale=2 bias=0",
        "  %3 f32[T, 32] = relu(x=%2)",
        "  %4 f32[T, 32] = scale(x=%1) scale=3 bias=0",
    )
    assert lines[3].endswith(" @0+1024")
    assert lines[7].startswith("  %5 f32[T, 32] = choose(few=%3 if T <= 2 and S >= 4, many=%4 if always)  # test_plan.py:")
    assert lines[8] == "arena reference: 2048 bytes (4096 without sharing)" and len(lines) == 9


# The cache.


def test_plans_are_found_by_topology() -> None:
    cache = PlanCache()
    first = cache.get(mlp())
    assert (cache.hits, cache.misses, len(cache)) == (0, 1, 1) and cache.compile_s > 0
    spent = cache.compile_s
    again = cache.get(mlp())
    assert (cache.hits, cache.misses, len(cache)) == (1, 1, 1) and cache.compile_s == spent
    assert again.scheduled is first.scheduled and again.key == first.key
    for graph in (mlp(size=96), mlp(dtype="q8_0"), mlp(name="v")):
        assert cache.get(graph).key != first.key
    assert (cache.hits, cache.misses, len(cache)) == (1, 4, 4)


def test_devices_and_options_are_part_of_the_key() -> None:
    graph, one = mlp(), get_devices("reference")
    options = [CompileOptions(), CompileOptions(scratch_bytes=1), CompileOptions(fuse=False)]
    options += [CompileOptions(placement={"a": "reference"}), CompileOptions(lowerings=("a",)), CompileOptions(without=("a",))]
    keys = {plan_key(graph, one, o) for o in options}
    keys |= {plan_key(graph, get_devices(d), CompileOptions()) for d in ("reference:1", "reference,reference:1")}
    assert len(keys) == 8
    assert plan_key(graph, one, CompileOptions(verify_passes=True)) == plan_key(graph, one, CompileOptions())


def test_names_are_part_of_the_key_where_placement_goes_by_them() -> None:
    def places(first: str, second: str) -> list[str]:
        node = relu(scale(input("x", (4,)), scale=2.0).named(first)).named(second)
        plan = cache.get(Graph(y=node), pair(), CompileOptions(placement={"here": "reference:1"}))
        return [split.device for split in plan.scheduled.splits]

    cache = PlanCache()
    assert places("here", "there") == ["reference:1"] and places("there", "here") == ["reference:0", "reference:1"]


def test_a_plan_that_is_found_runs_on_the_devices_that_asked() -> None:
    cache, devices = PlanCache(), [pair(), pair()]
    for both in devices:
        node = relu(scale(input("x", (4,)), scale=2.0)).named("far")
        plan = cache.get(Graph(y=node), both, CompileOptions(placement={"far": "reference:1"}))
        plan.run(x=np.ones(4, np.float32))
    assert cache.hits == 1 and [both[1].traffic.copies for both in devices] == [1, 1]


def test_two_models_of_one_topology_share_a_plan_and_keep_their_values() -> None:
    """Other weights, and other literals: also where one folds them into something else."""
    cache = PlanCache()
    bound = [cache.get(mlp(literal=literal)).bind(weights(i)) for i, literal in enumerate((1.0, -3.0))]
    assert (cache.hits, cache.misses) == (1, 1)
    for i, literal in ((0, 1.0), (1, -3.0), (0, 1.0)):
        np.testing.assert_allclose(bound[i].run({"x": X})["y"], mlp_by_hand(X, weights(i), literal), rtol=1e-4, atol=1e-4)

    def folded(value: float) -> Graph:
        table = constant("table", np.full((4, 2), value, np.float32))
        return Graph(y=get_rows(scale(table * 2.0, scale=1.0, bias=1.0), input("ids", (T,), "i32")))

    results = [cache.get(folded(v)).bind().run({"ids": np.array([0, 3], np.int32)})["y"] for v in (1.0, 5.0)]
    assert cache.hits == 2 and results[0].tolist() == [[3, 3]] * 2 and results[1].tolist() == [[11, 11]] * 2


def test_one_plan_runs_at_any_extent() -> None:
    bound = compile(mlp()).bind(weights(3))
    for t in (5, 1, 3, 0, 5):
        np.testing.assert_allclose(bound.run({"x": X[:t]})["y"], mlp_by_hand(X[:t], weights(3)), rtol=1e-4, atol=1e-4)


def test_weights_are_uploaded_once_for_all_plans_that_share_them() -> None:
    asked: list[str] = []

    def find(name: str) -> Array:
        asked.append(name)
        return weights(1)[name]

    uploaded: dict[tuple[str, str], Any] = {}
    for options in (CompileOptions(), CompileOptions(fuse=False)):
        compile(mlp(), options=options).bind(find, uploaded=uploaded)
    assert sorted(asked) == ["w.down", "w.gate", "w.up"]


def test_literals_and_folded_values_are_not_shared_with_the_weights() -> None:
    """They carry one name in every graph."""
    uploaded: dict[tuple[str, str], Any] = {}
    for literal in (1.0, 2.0):
        bound = compile(mlp(literal=literal)).bind(weights(1), uploaded=uploaded)
        np.testing.assert_allclose(bound.run({"x": X})["y"], mlp_by_hand(X, weights(1), literal), rtol=1e-4, atol=1e-4)
        folding = Graph(y=get_rows(scale(constant("v", shape=(2, 2)), scale=literal), input("ids", (T,), "i32")))
        folded = compile(folding).bind({"v": np.ones((2, 2), np.float32)}, uploaded=uploaded)
        assert folded.run({"ids": np.array([1])})["y"].tolist() == [[literal, literal]]
    assert {name for _, name in uploaded if not name.startswith("fold ")} == {"w.gate", "w.up", "w.down"}


def test_what_is_folded_from_weights_is_computed_once_for_all_plans_that_share_them() -> None:
    asked: list[str] = []

    def find(name: str) -> Array:
        asked.append(name)
        return np.full((4, 2), ord(name), np.float32)

    a, b = (scale(constant(name, shape=(4, 2)), scale=2.0, bias=1.0) for name in "ab")
    ids = input("ids", (T,), "i32")
    uploaded: dict[tuple[str, str], Any] = {}
    for graph, wanted in (
        (Graph(y=get_rows(a, ids)), {"y": 195}),
        (Graph(y=get_rows(b, ids), z=get_rows(a, ids)), {"y": 197, "z": 195}),
    ):
        results = compile(graph).bind(find, uploaded=uploaded).run({"ids": np.array([3])})
        assert {name: value.tolist() for name, value in results.items()} == {n: [[v, v]] for n, v in wanted.items()}
    assert asked == ["a", "b"] and len(uploaded) == 2


# What cannot be run.


def test_inputs_are_named_exactly() -> None:
    bound = compile(Graph(y=input("a", (T,)) + input("b", (T,)))).bind()
    with pytest.raises(InputError, match=r"\[run\] wanted the inputs a, b; missing: b, unknown: c"):
        bound.run({"a": X[0], "c": X[0]})
    with pytest.raises(InputError, match="missing: a, b, unknown: none"):
        bound.run({})


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X[0]}, r"\[run\] x must be \[T, 32\], T <= 8; got \[32\]"),
        ({"x": X[:, :31]}, r"\[run\] x must be \[T, 32\], T <= 8; got \[5, 31\]"),
        ({"x": np.zeros((9, 32), np.float32)}, r"\[run\] x must be \[T, 32\], T <= 8; got \[9, 32\]"),
        ({"x": X.astype(np.complex64)}, r"\[run\] x must be f32; got complex64"),
        ({"x": X.astype(object)}, r"\[run\] x must be f32; got object"),
    ],
)
def test_inputs_that_do_not_fit(arrays: dict[str, Array], said: str) -> None:
    bound = compile(mlp()).bind(weights(0))
    with pytest.raises(InputError, match=said):
        bound.run(arrays)
    np.testing.assert_allclose(bound.run({"x": X})["y"], mlp_by_hand(X, weights(0)), rtol=1e-4, atol=1e-4)


def test_fractions_are_not_ids() -> None:
    graph = Graph(y=get_rows(input("table", (4, 2)), input("ids", (T,), "i32")))
    table = np.arange(8, dtype=np.float32).reshape(4, 2)
    with pytest.raises(InputError, match=r"\[run\] ids must be i32; got float64"):
        compile(graph).run(table=table, ids=np.array([0.5]))
    for narrower in (np.int64, np.uint8, np.int32):
        assert compile(graph).run(table=table, ids=np.array([3], narrower))["y"].tolist() == [[6, 7]]
    assert compile(graph).run(table=table.astype(np.float64), ids=np.array([1]))["y"].dtype == np.float32
    assert compile(graph).run(table=table.astype(ml_dtypes.bfloat16), ids=np.array([1]))["y"].tolist() == [[2, 3]]


def test_one_dim_has_one_value() -> None:
    bound = compile(Graph(y=input("a", (T, 1)) + input("b", (T, 1)), z=input("c", (T * 2 + 1,)))).bind()
    a, c = np.zeros((3, 1), np.float32), np.zeros(7, np.float32)
    assert bound.run({"a": a, "b": a, "c": c})["y"].shape == (3, 1)
    with pytest.raises(InputError, match=r"\[run\] b must be \[T, 1\], T <= 8; got \[4, 1\]; T is 3"):
        bound.run({"a": a, "b": np.zeros((4, 1), np.float32), "c": c})
    with pytest.raises(InputError, match=r"\[run\] c must be \[2\*T \+ 1\], T <= 8; got \[6\]"):
        bound.run({"c": c[:6], "a": a, "b": a})
    with pytest.raises(InputError, match=r"\[run\] a must be \[T, 1\], T <= 8; got \[3, 1\]"):
        bound.run({"a": a, "b": a, "c": c}, dims={"T": 4})


def test_extents_that_no_input_gives() -> None:
    x = input("x", (16,))
    bound = compile(Graph(y=relu(x.slice(0, Dim("U", 3), Dim("U", 3) + 2)))).bind()
    values = np.arange(16, dtype=np.float32)
    assert bound.run({"x": values}, dims={"U": 3})["y"].tolist() == [3, 4]
    with pytest.raises(InputError, match=r"\[run\] no input gives the extents U; pass them as dims"):
        bound.run({"x": values})
    for wrong in (4, -1):
        with pytest.raises(InputError, match=rf"\[run\] wanted the extents U <= 3; got U = {wrong}"):
            bound.run({"x": values}, dims={"U": wrong})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"w.up": None}, UnknownNameError, r"\[bind\] the weight 'w.up' is missing; given: w.gate, w.down"),
        ({"w.up": np.zeros((64, 31), np.float32)}, InputError, r"the weight 'w.up' must be f32\[64, 32\]; got float32\[64, 31\]"),
        ({"w.up": np.zeros((64, 32), np.float16)}, InputError, r"the weight 'w.up' must be f32\[64, 32\]; got float16\[64, 32\]"),
        ({"w.up": [1, 2]}, InputError, r"the weight 'w.up' must be f32\[64, 32\]; got int64\[2\]"),
        ({"w.up": np.zeros(64, np.float32)}, InputError, r"the weight 'w.up' must be f32\[64, 32\]; got float32\[64\]"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {k: v for k, v in (weights(0) | change).items() if v is not None}
    with pytest.raises(error, match=said):
        compile(mlp()).bind(given)


def test_blocks_come_in_bytes() -> None:
    plan = compile(mlp(dtype="q8_0"))
    given = {k: np.zeros((v.shape[0], v.shape[1] // 32 * 34), np.uint8) for k, v in weights(0).items()}
    np.testing.assert_array_equal(plan.bind(given).run({"x": X})["y"], X)
    with pytest.raises(InputError, match=r"the weight 'w.gate' must be q8_0\[64, 34\]; got float32\[64, 32\]"):
        plan.bind(weights(0))


def test_a_malformed_graph_is_not_compiled() -> None:
    x = input("x", (T,))
    with pytest.raises(GraphError, match="the dim T has two maxima"):
        compile(Graph(y=relu(x), z=relu(input("z", (Dim("T", 9),)))))
