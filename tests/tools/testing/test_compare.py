"""Graphs on two sides: what is wrong is found and named, what is right or merely rounded is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions
from tensorgraph.dims import Dim
from tensorgraph.errors import UnknownNameError
from tensorgraph.graph import Graph, Node, choose, constant, input, structure_line
from tensorgraph.op import Op
from tensorgraph.ops import cos, mul, mul_mat, relu, rms_norm, scale, silu, sin, top_k
from tensorgraph.passes import EliminateCommon, rewrite
from tensorgraph.tools.testing import Limits, Report, Terms, compare, load_reproduction, rerun
from tensorgraph.tools.testing.cuts import cuts
from tensorgraph.tools.testing.pair import Pair
from tests.ops.kernel_devices import Float32Device, KernelDevice
from tests.tools.testing.wrong_devices import JoiningDevice, last_element_off, reads, wrong_node

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(0)
T = Dim("T", 64)
X = {"x": RNG.standard_normal((7, 64)).astype(np.float32)}
SHAPES = {"up": (128, 64), "gate": (128, 64), "down": (64, 128)}
WEIGHTS = {name: RNG.standard_normal(shape).astype(np.float32) / 8 for name, shape in SHAPES.items()}
EXACT = CompileOptions(exact=True)


def weight(name: str) -> Node:
    return constant(name, shape=SHAPES[name])


def gated() -> Graph:
    """A norm, two products, a gate and a product; the gate is written in plain ops."""
    h = rms_norm(input("x", (T, 64)), eps=1e-6)
    return Graph(y=mul_mat(weight("down"), mul(silu(mul_mat(weight("gate"), h)), mul_mat(weight("up"), h))))


def waves(n: int = 1) -> Graph:
    """Products and sines in turns, which no pass joins."""
    x = input("x", (T, 64))
    up, down = weight("up"), weight("down")
    for _ in range(n):
        x = mul_mat(down, sin(mul_mat(up, x)))
    return Graph(y=x)


def checked(graph: Graph, backend: Any, **terms: Any) -> Report:
    return compare(graph, X, WEIGHTS, terms=Terms(backends=("reference", backend), **terms))


@pytest.mark.parametrize("backend", ["reference", "cpu", Float32Device("f32")], ids=lambda b: getattr(b, "name", b))
def test_what_is_right_agrees(backend: Any) -> None:
    report = checked(gated(), backend)
    assert report.ok and (report.nodes, report.steps) == (6, 1) and set(report.worst) == {"rms_norm", "mul_mat", "silu", "mul"}
    assert max(worst.nmse for worst in report.worst.values()) < 1e-12 and report.whole["y"] < 1e-12
    assert "6 nodes agree" in str(report)


def test_a_wrong_node_is_named_with_its_line_inputs_and_worst_element(tmp_path: Path) -> None:
    device = wrong_node("wrong", reads("up"), last_element_off)
    report = checked(gated(), device, folder=tmp_path)
    first = report.first
    assert first is not None and not report.ok and first.alone and first.passes == ()
    assert (first.node.op, first.node.name, first.node.shape, first.extents) == ("mul_mat", "up", "[T, 128]", (7, 128))
    line = Path(__file__).read_text().splitlines()[int(first.node.where.removeprefix("test_compare.py:")) - 1]
    assert 'weight("up")' in line and first.node.text == line.strip()
    assert first.difference.at == (6, 127) and first.difference.got > first.difference.wanted
    h = X["x"].astype(np.float64) / np.sqrt((X["x"].astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    assert first.difference.wanted == pytest.approx((h @ WEIGHTS["up"].T.astype(np.float64))[6, 127], rel=1e-5)
    a, b = first.inputs
    assert (a.slot, a.source.name, b.slot, b.source.op) == ("a", "up", "b", "rms_norm")
    assert a.statistics.low == WEIGHTS["up"].min() and b.statistics.deviation == pytest.approx(h.std(), rel=1e-5)
    text = str(report)
    assert f"{first.node.where}: {line.strip()}" in text and "wrong by itself" in text and first.reproduction in text


def test_the_first_of_several_is_named() -> None:
    """In the order of the graph; what follows is computed from the wrong value and is not wrong itself."""
    names: list[str] = []
    for weights in (("up",), ("up", "down"), ("down",)):
        device = wrong_node("wrong", lambda node, w=weights: any(reads(name)(node) for name in w), last_element_off)  # type: ignore[misc]
        first = checked(gated(), device).first
        assert first is not None
        names.append(first.node.name)
    assert names == ["up", "up", "down"]


@pytest.mark.parametrize("wrong", ["nan", "inf", "zeros"])
def test_numbers_that_are_none_are_wrong(wrong: str) -> None:
    change = {"nan": np.full_like, "inf": lambda y, _: np.where(y == y.max(), np.inf, y), "zeros": lambda y, _: y * 0}[wrong]
    first = checked(gated(), wrong_node("wrong", reads("gate"), lambda y: change(y, np.nan))).first
    assert first is not None and first.node.name == "gate"
    assert (first.difference.nmse == np.inf) == (wrong != "zeros")


def test_what_a_reproduction_holds_fails_again_where_it_failed(tmp_path: Path) -> None:
    device = wrong_node("wrong", lambda node: node.op == "mul_mat" and node.size != 64 * T, last_element_off)
    first = checked(gated(), device, folder=tmp_path).first
    assert first is not None and first.reproduction is not None
    saved = load_reproduction(first.reproduction)
    assert saved.graph.constants.keys() == {first.node.name} and saved.weights[first.node.name].shape == (128, 64)
    assert saved.about == tuple(line for line in first.lines() if not line.startswith("  saved"))
    again = rerun(saved, device)
    assert again.first is not None and again.first.difference == first.difference
    assert rerun(saved, "cpu").ok and rerun(saved, "reference").ok


def test_what_was_found_is_told_where_it_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = checked(gated(), wrong_node("wrong", reads("up"), last_element_off), folder=tmp_path / "file")
    assert report.first is not None and report.first.node.name == "up" and report.first.reproduction is None
    assert "not saved: [reproduction]" in str(report) and "cannot be written" in report.first.unsaved


def sine_of_product(node: Node, source: Node) -> bool:
    return (node.op, source.op) == ("sin", "mul_mat")


def test_nodes_that_are_wrong_together_are_found(tmp_path: Path) -> None:
    device = JoiningDevice("joining", sine_of_product)
    report = checked(waves(), device, folder=tmp_path, options=EXACT)
    first = report.first
    assert first is not None and report.nodes == 3 and first.alone
    assert [(n.op, n.name) for n in first.together] == [("mul_mat", "up"), ("sin", "after up")]
    assert first.passes == ("grouping",) and "each of 2 nodes is right by itself" in first.verdict
    saved = load_reproduction(str(first.reproduction))
    assert {n.op for n in saved.graph} == {"sin", "mul_mat", "input", "constant"}
    assert rerun(saved, device).first is not None and rerun(saved, "reference").ok and rerun(saved, "cpu").ok


def test_nodes_that_are_wrong_in_one_graph_only_are_found(tmp_path: Path) -> None:
    """Taken out of it they are right: what is saved shows that, too."""
    device = JoiningDevice("joining", sine_of_product, least=4)
    first = checked(waves(2), device, folder=tmp_path).first
    assert first is not None and not first.alone and [n.op for n in first.together] == ["mul_mat", "sin"]
    assert "in this graph only" in first.verdict and rerun(load_reproduction(str(first.reproduction)), device).ok


def test_of_many_wrong_together_the_first_are_named() -> None:
    first = checked(waves(6), JoiningDevice("joining", sine_of_product)).first
    assert first is not None and (first.number, [n.op for n in first.together]) == (4, ["mul_mat", "sin"])


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values were laid open in each run of a search."""
    counts: list[int] = []
    right = Pair.with_opened

    def counted(self: Pair, given: Any, opened: Any, targets: Any, **more: Any) -> Any:
        counts.append(len(opened))
        return right(self, given, opened, targets, **more)

    monkeypatch.setattr(Pair, "with_opened", counted)
    return counts


def test_a_search_takes_few_runs(searched: list[int]) -> None:
    """Of 48 nodes: halves of halves, and one run for each node that stays; one to see that something is wrong."""
    first = checked(waves(16), JoiningDevice("joining", lambda node, i: sine_of_product(node, i) and i.size != 64 * T)).first
    assert first is not None and len(first.together) == 2
    assert len(searched) <= 1 + 6 + 2 and searched[0] == 0


def test_rounding_that_grows_takes_few_runs(searched: list[int]) -> None:
    """Of 192 nodes: halves of halves, for each value that it is followed from."""
    report = checked(waves(64), Float32Device("f32"), limits=Limits(region=1e-14, whole=1e-14))
    assert report.ok and report.whole["y"] > 1e-10
    assert 0 < len(report.amplified) <= 8 and len(searched) <= 24


def test_what_rounding_selects_otherwise_is_not_blamed() -> None:
    """Scores that are equal but for the order in which they are summed."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal(64).astype(np.float32)
    weights = {"w": np.stack([rng.permutation(values) for _ in range(32)]), "t": rng.standard_normal((32, 16)).astype(np.float32)}
    x = {"x": np.full((7, 64), 0.1, np.float32) * np.arange(1, 8, dtype=np.float32)[:, None]}
    ids = top_k(mul_mat(constant("w", shape=(32, 64)), input("x", (T, 64))), k=1).reshape(T)
    chosen = registry.ops.get("get_rows")(constant("t", shape=(32, 16)), ids).named("chosen")
    graph, terms = Graph(y=scale(chosen, scale=2.0).named("y")), Terms(backends=("reference", Float32Device("f32")))
    report = compare(graph, x, weights, terms=terms)
    assert report.ok and report.whole["y"] > 0.1 and {n.op for n in report.amplified} <= {"top_k", "get_rows", "scale"}


@pytest.fixture
def wrong_pattern() -> Iterator[None]:
    """A fused op that is not what it expands to."""
    op = Op("odd_glu", "a[...]: real, b[...]: a -> y[...]: a")
    op.reference(lambda a, b: a / (1 + np.exp(-a)) * b * 1.01)
    op.expand(lambda a, b: mul(silu(a), b))
    yield
    registry.ops.remove("odd_glu")


def test_a_wrong_pattern_is_named_by_its_pass(wrong_pattern: None, tmp_path: Path) -> None:
    """Both devices are the reference: one computes the graph as it is written."""
    report = checked(gated(), KernelDevice("fusing"), folder=tmp_path)
    first = report.first
    assert first is not None and first.passes == ("fuse_declared",) and first.alone
    assert [n.op for n in first.together] == ["silu", "mul"] and "without fuse_declared" in str(report)
    assert first.difference.nmse == pytest.approx(1e-4, rel=1e-3)
    assert rerun(load_reproduction(str(first.reproduction)), KernelDevice("fusing")).first is not None
    assert checked(gated(), KernelDevice("fusing"), options=CompileOptions(without=("fuse_declared",))).ok


class Careless(EliminateCommon):
    """Takes two nodes of one op, shape and inputs for the same, whatever their attributes."""

    def __call__(self, graph: Graph) -> Graph:
        seen: dict[str, Node] = {}
        number: dict[Node, int] = {}

        def merge(node: Node, _: Node) -> Node | None:
            if node.op != "scale":
                return None
            inputs = [number.setdefault(i, len(number)) for i in node.inputs]
            return seen.setdefault(structure_line(replace(node, attrs={}), inputs), node)

        return rewrite(graph, merge)


def test_a_wrong_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = input("x", (T, 64))
    graph = Graph(y=mul(scale(x, scale=2.0), sin(scale(x, scale=3.0))))
    assert checked(graph, "cpu").ok
    monkeypatch.setattr("tensorgraph.compiler.EliminateCommon", Careless)
    report = checked(graph, "cpu")
    assert report.first is not None and report.first.passes == ("eliminate_common",)
    assert report.first.node.attrs["scale"] == "3" and not report.first.alone and "right by itself" in report.first.verdict


def test_with_and_without_a_pass(wrong_pattern: None) -> None:
    """One backend, the first side without the pass: they differ exactly where the pass is at fault."""
    device = KernelDevice("fusing")
    terms = Terms(backends=(device, device))
    names = "fuse_declared", "fold_constants"
    with_it, alike = (compare(gated(), X, WEIGHTS, terms=replace(terms, without=name)) for name in names)
    assert with_it.first is not None and with_it.first.passes == ("fuse_declared",) and with_it.first.node.op == "mul"
    assert alike.ok and alike.whole == {"y": 0.0} and "no difference" in str(alike)
    with pytest.raises(UnknownNameError, match="there is no pass fuse_everything. Known: eliminate_common"):
        compare(gated(), X, WEIGHTS, terms=Terms(without="fuse_everything"))


@pytest.mark.parametrize("backend", ["cpu", Float32Device("f32")], ids=lambda b: getattr(b, "name", b))
def test_amplified_rounding_is_not_blamed(backend: Any) -> None:
    """A product of two products, of which the sine of a million times is taken: no digit of the result is certain."""
    h = mul_mat(weight("down"), mul_mat(weight("up"), rms_norm(input("x", (T, 64)), eps=1e-6)))
    report = checked(Graph(z=sin(scale(h, scale=1e6)).named("z")), backend)
    assert report.ok and report.whole["z"] > 1e-2 and [n.op for n in report.amplified] == ["sin"]
    assert "rounding grows at sin z" in str(report)


def test_a_wrong_node_before_amplified_rounding_is_still_found() -> None:
    h = mul_mat(weight("down"), mul_mat(weight("up"), rms_norm(input("x", (T, 64)), eps=1e-6)))
    device = wrong_node("wrong", reads("down"), lambda y: y * (1 + 1e-3))
    first = checked(Graph(z=sin(scale(h, scale=1e6))), device).first
    assert first is not None and first.node.name == "down" and first.difference.nmse == pytest.approx(1e-6, rel=1e-3)


def amplified_beside_wrong(n: int) -> Graph:
    """Sines that make the most of rounding, and a cosine of a product."""
    x, up, down, outputs = input("x", (T, 64)), weight("up"), weight("down"), dict[str, Node]()
    for i in range(n):
        h = mul_mat(down, mul_mat(up, rms_norm(scale(x, scale=1.0 + i), eps=1e-6)))
        outputs[f"z{i}"] = sin(scale(h, scale=1e6 + i))
    return Graph({**outputs, "y": mul_mat(down, cos(mul_mat(up, x)))})


@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_wrong_node_beside_amplified_rounding_is_still_found(n: int) -> None:
    device = JoiningDevice("joining", lambda node, i: (node.op, i.op) == ("cos", "mul_mat"), rounds=True)
    report = checked(amplified_beside_wrong(n), device)
    assert report.first is not None and [node.op for node in report.first.together] == ["mul_mat", "cos"]


def test_a_search_that_ends_early_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorgraph.tools.testing.region.MOST_EXCUSED", 2)
    full, early = (checked(amplified_beside_wrong(n), Float32Device("f32")) for n in (2, 3))
    assert full.ok and not full.ended and len(full.amplified) == 2 and "nodes agree, worst" in str(full)
    assert early.ended and len(early.amplified) == 2 and "not all was looked at" in str(early)


def test_selections_are_compared_as_they_are() -> None:
    x = input("x", (T, 64))
    graph = Graph(ids=top_k(mul_mat(weight("up"), x), k=4))
    assert checked(graph, "cpu").ok
    first = checked(graph, wrong_node("wrong", lambda node: node.op == "top_k", lambda y: y[:, ::-1])).first
    assert first is not None and first.node.op == "top_k" and first.difference.nmse == 1.0


@pytest.mark.parametrize("n", [1, 7])
def test_only_the_form_that_is_computed_is_compared(n: int) -> None:
    x = input("x", (T, 64))
    forms = {"few": (mul_mat(weight("up"), x).named("few"), T <= 2), "many": (scale(mul_mat(weight("gate"), x), scale=2.0), True)}
    graph = Graph(y=relu(choose(forms)))
    given = {"x": X["x"][:n]}
    report = compare(graph, given, WEIGHTS)
    assert report.ok and ("scale" in report.worst) == (n > 2)
    for name, chosen in (("up", n <= 2), ("gate", n > 2)):
        device = wrong_node("wrong", reads(name), last_element_off)
        assert compare(graph, given, WEIGHTS, terms=Terms(backends=("reference", device))).ok != chosen


def test_extents_that_no_input_has_are_given() -> None:
    filled = registry.ops.get("fill")(shape=(Dim("N", 9), 4), value=2.0)
    graph = Graph(y=scale(filled, scale=3.0))
    assert compare(graph, {}, dims={"N": 5}).nodes == 2


@pytest.mark.parametrize("limit_bytes", [1, 40_000])
def test_parts_give_the_same_as_the_whole(limit_bytes: int) -> None:
    whole, parts = (checked(gated(), Float32Device("f32"), limit_bytes=n) for n in (1 << 32, limit_bytes))
    assert (parts.nodes, parts.worst, parts.whole) == (whole.nodes, whole.worst, whole.whole)
    for device in (wrong_node("wrong", reads("up"), last_element_off), JoiningDevice("joining", sine_of_product)):
        one, many = (checked(waves(3), device, limit_bytes=n).first for n in (1 << 32, limit_bytes))
        assert one is not None and many == one


@pytest.mark.parametrize("limit_bytes", [1, 40_000, 200_000, 1 << 32])
def test_parts_take_what_they_may(limit_bytes: int) -> None:
    """Both sides' values, and weights in float64; a part has a node at least."""
    graph = waves(3)
    parts = cuts(graph, {"T": 7}, limit_bytes)
    assert [n for part in parts for n in part.nodes] == [n for n in graph.nodes if n.op in ("mul_mat", "sin")]
    for part in parts:
        weights = {i for n in part.nodes for i in n.inputs if i.op == "constant"}
        size = sum(2 * 7 * int(n.shape[1]) * 4 for n in part.nodes) + len(weights) * 128 * 64 * 8  # type: ignore[arg-type]
        assert size <= limit_bytes or len(part.nodes) == 1
        assert set(part.apart.inputs) <= {"x", *(f"%{graph.number[n]}" for n in (*part.sources, *part.nodes))}
    assert len(parts) == {1: 9, 40_000: 9, 200_000: 1 + (limit_bytes < 150_000), 1 << 32: 1}[limit_bytes]


def test_limits_can_be_set() -> None:
    device = wrong_node("wrong", reads("up"), lambda y: y * (1 + 1e-6))
    assert checked(gated(), device, limits=Limits(node=1e-9, region=1e-9, whole=1e-9)).ok
    first = checked(gated(), wrong_node("wrong", reads("up"), lambda y: y * (1 + 1e-4)), limits=Limits(node=1e-9)).first
    assert first is not None and first.difference.nmse == pytest.approx(1e-8, rel=1e-2)
