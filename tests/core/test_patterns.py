"""Fused ops are found where their expansion stands, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.backends.reference.device import ReferenceDevice
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import DType, f16, f32
from tensorgraph.engine import Engine
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.models.architecture import model_from_config
from tensorgraph.op import Attr, Op
from tensorgraph.ops import (
    add,
    cast,
    clamp,
    mul,
    relu,
    scale,
    sigmoid,
    silu,
    soft_max,
    swiglu_oai,
    tanh,
)
from tensorgraph.patterns import fuse_declared, patterns_of
from tensorgraph.session import Session
from tests.models import tiny
from tests.reference import reference_path

Array = np.ndarray[Any, Any]
T, S = Dim("T", 8), Dim("S", 8)


@pytest.fixture
def gated() -> Iterator[Op]:
    """`relu(x * w) [+ bias] -> transposed -> scaled by alpha, soft-maxed`: views, an optional input, attributes, a default."""
    op = Op(
        "test_gated",
        "x[T, N]: real, w[N]: real, bias[N]?: real -> y[N, T]: x",
        attrs={"alpha": Attr(float), "beta": Attr(float, 0.5), "low": Attr(float, 0.0, high=0.0), "flag": Attr(bool, False)},
    )

    @op.expand
    def expand(x: Node, w: Node, bias: Node | None, *, alpha: float, beta: float, low: float, flag: bool) -> Node:
        h = relu(mul(x, w))
        h = h if bias is None else h + bias
        h = clamp(h, min=low, max=beta)
        n_tokens, n = h.shape
        return soft_max(scale(h.reshape(n_tokens, n, 1).permute(1, 0, 2).reshape(n, n_tokens), scale=alpha))

    @op.reference
    def reference(x: Array, w: Array, bias: Array | None, *, alpha: float, beta: float, low: float, flag: bool) -> Array:
        h = np.clip(np.maximum(x * w, 0) + (0 if bias is None else bias), low, beta) * alpha
        e = np.exp(h.T - h.T.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    yield op
    registry.ops.remove("test_gated")


def fused(*outputs: Node, supports: Callable[[Node], bool] = lambda n: True) -> Graph:
    graph = Graph({f"y{i}": node for i, node in enumerate(outputs)})
    return fuse_declared(supports)(graph)


def count(graph: Graph, op: str) -> int:
    return sum(n.op == op for n in graph)


def plain(
    x: Node,
    w: Node,
    bias: Node | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 0.7,
    low: float = 0.0,
    act: Op = relu,
    after: Callable[[Node], Node] = lambda h: h.permute(1, 0),
) -> tuple[Node, list[Node]]:
    """What a model would write for `test_gated`, and its intermediates."""
    a = mul(x, w)
    b = act(a)
    c = b if bias is None else b + bias
    d = clamp(c, min=low, max=beta)
    e = scale(after(d), scale=alpha)
    return soft_max(e), [a, b, c, d, e]


X, W, B = input("x", (T, 4)), constant("w", shape=(4,)), constant("b", shape=(4,))
WEIGHTS = {"w": np.array([1, -1, 0.5, 2], np.float32), "b": np.array([0, 1, -0.5, 0.25], np.float32)}
VALUES = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)


@pytest.mark.parametrize("bias", [None, B])
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.7), (0.371, 0.5), (-1.0, 3.0), (1.0, 1.0)])
def test_an_expansion_is_found_with_its_inputs_and_attributes(gated: Op, bias: Node | None, alpha: float, beta: float) -> None:
    written, _ = plain(X, W, bias, alpha=alpha, beta=beta)
    graph = fused(written)
    node = graph.outputs["y0"]
    assert node.op == "test_gated" and node.inputs == (X, W) + (() if bias is None else (B,))
    assert dict(node.attrs) == {"alpha": alpha, "beta": beta, "low": 0.0, "flag": False}
    assert node.shape == (4, T) and len(graph) == 1 + len(node.inputs)


def test_results_are_equal_with_and_without(gated: Op) -> None:
    written, _ = plain(X, W, B)
    graph = Graph(y=written)
    plans = {on: compile(graph, options=CompileOptions(fuse=on, verify_passes=True)) for on in (True, False)}
    assert count(plans[True].graph, "test_gated") == 1 and count(plans[False].graph, "test_gated") == 0
    on, off = (plans[f].bind(WEIGHTS).run({"x": VALUES})["y"] for f in (True, False))
    np.testing.assert_allclose(on, off, rtol=1e-6)


def test_a_name_and_its_place_are_kept(gated: Op) -> None:
    written, _ = plain(X, W)
    found = fused(written.named("blk.0.gate")).outputs["y0"]
    assert found.op == "test_gated" and found.name == "blk.0.gate" and found.where == written.where


def test_inputs_that_are_views_are_found(gated: Op) -> None:
    wide = input("wide", (T, 2, 4))
    graph = fused(plain(wide[:, 1], W)[0])
    node = graph.outputs["y0"]
    assert node.op == "test_gated" and node.at("x") is not None
    assert node.inputs[0].base is wide and node.inputs[0].index_map.offset == 4


def test_one_input_in_two_roles(gated: Op) -> None:
    assert fused(plain(X, W, W)[0]).outputs["y0"].inputs == (X, W, W)


def test_intermediates_that_others_need_stay(gated: Op) -> None:
    written, parts = plain(X, W, B)
    graph = fused(written, parts[2] * 3.0)
    assert count(graph, "test_gated") == 1 and count(graph, "relu") == 1 and count(graph, "clamp") == 0


def test_several_in_a_row(gated: Op) -> None:
    first, _ = plain(X, W)
    second, _ = plain(first.permute(1, 0), W, B, alpha=3.0)
    graph = fused(second)
    assert [n.attrs["alpha"] for n in graph if n.op == "test_gated"] == [2.0, 3.0] and count(graph, "soft_max") == 0


def turned(h: Node) -> Node:
    return soft_max(scale(clamp(h, min=0.0, max=0.7).permute(1, 0), scale=2.0))


SQUARE = input("square", (4, 4))
NEAR = {
    "another op": lambda: plain(X, W, act=sigmoid)[0],
    "not transposed": lambda: plain(SQUARE, W, after=lambda h: h)[0],
    "reshaped instead of transposed": lambda: plain(X, W, after=lambda h: h.reshape(4, T))[0],
    "only a part transposed": lambda: plain(X, W, after=lambda h: h[:, :2].permute(1, 0))[0],
    "a product in place of the sum": lambda: turned(mul(relu(mul(X, W)), B)),
    "operands exchanged": lambda: turned(add(SQUARE, relu(mul(SQUARE, W)))),
    "an attribute out of range": lambda: plain(X, W, low=0.25)[0],
    "an attribute that the expansion leaves at its default": lambda: soft_max(
        scale(clamp(relu(mul(X, W)), min=0.0, max=0.7).permute(1, 0), scale=2.0, bias=0.1)
    ),
    "an input of another shape": lambda: plain(X, constant("w", shape=(1,)))[0],
    "an input more": lambda: soft_max(turned(relu(mul(X, W))).inputs[0], input("mask", (4, T))),
    "another input of one role": lambda: turned(mul(relu(mul(X, W)), W)),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_left_alone(gated: Op, name: str) -> None:
    assert count(fused(turned(relu(mul(X, W)) + B)), "test_gated") == 1
    graph = fused(NEAR[name]())
    assert count(graph, "test_gated") == 0 and count(graph, "soft_max") == 1


def test_nothing_is_put_in_that_no_device_supports(gated: Op) -> None:
    written, _ = plain(X, W)
    assert fused(written, supports=lambda n: n.op != "test_gated").outputs["y0"] is written


def test_an_expansion_that_ends_in_a_view() -> None:
    op = Op("test_turned", "x[M, N]: real -> y[N, M]: x")
    op.expand(lambda x: sigmoid(relu(x)).permute(1, 0))
    try:
        found = fused(sigmoid(relu(X)).permute(1, 0)).outputs["y0"]
        assert found.op == "test_turned" and found.shape == (4, T)
        assert fused(sigmoid(relu(X))).outputs["y0"].op == "sigmoid"
        assert fused(sigmoid(relu(X)).permute(1, 0)[:2]).outputs["y0"].op == "view"
    finally:
        registry.ops.remove("test_turned")


def test_an_expansion_that_repeats_itself() -> None:
    """Written twice in the expansion, computed once in the graph, or the other way round: the same value."""
    op = Op("test_double", "x[...]: real -> y[...]: x")
    op.expand(lambda x: add(tanh(x), tanh(x)))
    try:
        h = tanh(X)
        assert fused(add(h, h)).outputs["y0"].op == fused(add(tanh(X), tanh(X))).outputs["y0"].op == "test_double"
        assert fused(add(tanh(X), tanh(input("z", (T, 4))))).outputs["y0"].op == "add"
    finally:
        registry.ops.remove("test_double")


ATTRS: list[dict[str, Attr]] = [
    {"k": Attr(int, low=1, high=4)},
    {"k": Attr(int, low=-9, high=-3)},
    {"mode": Attr(str)},
    {"mode": Attr(str, choices=("a", "b")), "k": Attr(int, high=9)},
    {"f": Attr(float, high=-2.0)},
    {"f": Attr(float, low=5.0), "flag": Attr(bool)},
    {"to": Attr(DType), "shape": Attr(tuple)},
]


@pytest.mark.parametrize("attrs", ATTRS)
def test_any_declaration_gives_a_pattern(attrs: dict[str, Attr]) -> None:
    """An op with narrow or odd attributes must not break the compilation of graphs that do not use it."""
    op = Op("test_odd", "x[N]: i64, y[2, N]: x, h[..., N]: f16, z[M]?: bool -> r[N]: h", attrs=attrs)
    op.expand(lambda x, y, h, z, **given: relu(cast(h, dtype="f32")).cast("f16"))
    try:
        patterns = list(patterns_of(op))
        assert len(patterns) == 2 and [p.root.dtype for p in patterns] == [f16, f16]
        half = cast(relu(cast(input("half", (3,), "f16"), dtype="f32")), dtype="f16")
        assert count(compile(Graph(y=half)).graph, "relu") == 1
    finally:
        registry.ops.remove("test_odd")


# The ops of the repository.


@pytest.mark.parametrize("split", [True, False])
def test_gated_units_are_found(split: bool) -> None:
    h = input("h", (T, 16))
    a, b = (h[:, :8], h[:, 8:]) if not split else (input("a", (T, 8)), input("b", (T, 8)))
    assert fused(mul(silu(a), b)).outputs["y0"].op == "swiglu"
    oai = swiglu_oai.rebuild(swiglu_oai.expansion, swiglu_oai(a, b, alpha=1.5, limit=6.0))  # type: ignore[arg-type]
    node = fused(oai).outputs["y0"]
    assert node.op == "swiglu_oai" and (node.attrs["alpha"], node.attrs["limit"]) == (1.5, 6.0)
    assert fused(mul(silu(a), a)).outputs["y0"].op == "swiglu"
    assert fused(mul(b, silu(a))).outputs["y0"].op == "mul"


@pytest.mark.parametrize(
    "op", [op for op in map(registry.ops.get, registry.ops) if op.expansion is not None], ids=lambda o: o.name
)
def test_every_fused_op_is_found_in_its_own_expansion(op: Op) -> None:
    for pattern in patterns_of(op):
        found = fused(pattern.root).outputs["y0"]
        assert found.op == op.name


@pytest.mark.parametrize(
    ("architecture", "layers"), [("deepseek_v32", [0, 1, 2]), ("glm_moe_dsa", None), ("deepseek_v4", [1, 3])]
)
def test_the_indexer_is_found_in_every_layer_that_has_one(architecture: str, layers: list[int] | None) -> None:
    model = model_from_config(reference_path(f"{architecture}/config.json"))
    graph = model.graph(Extents(64, 256), f32)
    plan = compile(graph)
    found = [n for n in plan.graph if n.op == "index_top_k"]
    wanted = [f"blk.{i}.index_ids" for i in layers] if layers else [n.name for n in graph if n.name.endswith(".index_ids")]
    assert [n.name for n in found] == wanted and len(wanted) > 1
    assert {n.attrs["every"] for n in found} == {4 if architecture == "deepseek_v4" else 1}
    assert {n.attrs["top_k"] for n in found} == {
        json.loads(Path(reference_path(f"{architecture}/config.json")).read_text())["index_topk"]
    }
    assert count(plan.graph, "attn_mask") == 0
    kept = compile(graph, options=CompileOptions(fuse=False))
    assert count(kept.graph, "index_top_k") == 0 and count(kept.graph, "attn_mask") == 1


class NoIndexer(ReferenceDevice):
    def supports(self, node: Node) -> bool:
        return node.op not in ("index_top_k", "swiglu", "swiglu_clamp") and super().supports(node)


@pytest.mark.parametrize("architecture", ["deepseek_v32", "deepseek_v4"])
def test_models_give_the_same_with_and_without_fusion(architecture: str) -> None:
    ids = tiny.tokens(architecture)[:70]
    whole = tiny.whole(tiny.engine(architecture), ids)
    options = CompileOptions(fuse=False, verify_passes=True)
    engines = [
        Engine(tiny.model(architecture), "reference", kv_dtype="f32", options=options),
        Engine(tiny.model(architecture), NoIndexer("reference:plain"), kv_dtype="f32"),
    ]
    for engine in engines:
        with Session(engine) as session:
            assert tiny.nmse(session.eval(ids, all_logits=True), whole) < 1e-12
