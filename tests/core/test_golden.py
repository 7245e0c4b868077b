"""Graphs and plans as text, compared with tests/golden; `--update-golden` writes them anew, and the diff is reviewed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorgraph.backends.cpu.kernel import Context, Kernel
from tensorgraph.backends.cpu.program import OperandKey, Recipe, write_kernel
from tensorgraph.backends.cpu.target import find_target
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import get_devices, stream_layouts
from tensorgraph.dims import Dim
from tensorgraph.dtypes import f16
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.models.architecture import model_from_config
from tensorgraph.ops import mul, mul_mat, rms_norm, silu
from tensorgraph.state import StateSpec
from tests.core.devices import pair
from tests.reference import reference_path

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ONE_LAYER = {"num_hidden_layers": 1, "vocab_size": 64}


def mlp(tmp_path: Path) -> Graph:
    x = input("x", (Dim("T", 8), 32))
    h = rms_norm(x, constant("norm.weight", shape=(32,)), eps=1e-6)
    gate, up = (mul_mat(constant(f"{name}.weight", shape=(64, 32), dtype="q8_0"), h) for name in ("gate", "up"))
    return Graph(y=x + mul_mat(constant("down.weight", shape=(32, 64), dtype="q8_0"), mul(silu(gate), up)))


def model(architecture: str, **change: Any) -> Callable[[Path], Graph]:
    """One layer of the tiny model of an architecture, from its configuration."""

    def build(tmp_path: Path) -> Graph:
        config = json.loads(reference_path(f"{architecture}/config.json").read_text()) | ONE_LAYER | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model_from_config(tmp_path / "config.json").graph(Extents(16, 64), f16)

    return build


GRAPHS = {
    "mlp": mlp,
    "llama": model("llama"),
    "deepseek_v32": model("deepseek_v32", first_k_dense_replace=0),
    "deepseek_v4": model("deepseek_v4", compress_ratios=[4], num_hash_layers=0, hc_sinkhorn_iters=2),
}


def stable(text: str) -> str:
    """Without what changes when a line is added to a model file: line numbers, and the key that hashes everything."""
    return re.sub(r"\.py:\d+", ".py", re.sub(r"^plan [0-9a-f]{32}$", "plan KEY", text, flags=re.M))


def compare(name: str, text: str, update: bool) -> None:
    path = GOLDEN / f"{name}.txt"
    if update:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    wanted = path.read_text() if path.is_file() else ""
    diff = difflib.unified_diff(wanted.splitlines(), text.splitlines(), f"tests/golden/{name}.txt", "now", lineterm="", n=1)
    assert wanted == text, "\n".join(["run with --update-golden if this is meant:", *diff])


def test_the_text_of_a_plan_with_groups(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    graph = GRAPHS["llama"](tmp_path)
    layouts = stream_layouts(graph, {name: StateSpec(n.shape[1:]) for name, n in graph.streams.items()}, get_devices("cpu:avx2"))
    assert layouts == {"blk.0.k": "rows16", "blk.0.v": "panels"}
    text = str(compile(graph, "cpu:avx2", CompileOptions(layouts=layouts, verify_passes=True)))
    compare("llama_cpu", stable(text) + "\n", request.config.option.update_golden)


def test_the_text_of_a_kernel(request: pytest.FixtureRequest) -> None:
    rows, one = OperandKey("x", "f16", "dense", (None, None), (None, 1), False), (None,)
    keys = [rows, OperandKey("weight", "f32", "dense", one, (1,), False), rows._replace(name="y")]
    names = [key.name for key in keys]
    emit = rms_norm.kernel("cpu").calls(node_of_rms_norm(), Context(find_target("avx2"), False, lambda n: "dense"))[0].emit
    text = write_kernel(Kernel(find_target("avx2")), Recipe(emit, names, keys, (("eps", 1e-6),)))
    compare("rms_norm_avx2", text, request.config.option.update_golden)


def node_of_rms_norm() -> Node:
    node: Node = rms_norm(input("x", (3, 8), "f16"), input("w", (8,)), eps=1e-6)
    return node


@pytest.mark.parametrize("name", GRAPHS)
def test_the_text_of_graphs_and_plans(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    graph = GRAPHS[name](tmp_path)
    text = f"{graph}\n\n{compile(graph, options=CompileOptions(verify_passes=True))}\n"
    compare(name, stable(text), request.config.option.update_golden)


def test_the_text_of_a_plan_for_two_devices(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    plan = compile(mlp(tmp_path), pair(["silu", "swiglu"]), CompileOptions(placement={"down.*": "reference:1"}))
    compare("two_devices", stable(f"{plan}\n"), request.config.option.update_golden)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_text_does_not_depend_on_the_process(name: str, tmp_path: Path) -> None:
    """Built twice, printed twice the same, and with one key: no address, no order of a set."""
    first, second = GRAPHS[name](tmp_path), GRAPHS[name](tmp_path)
    assert str(first) == str(second) and first.key == second.key
    assert str(compile(first)) == str(compile(second))


def test_a_difference_is_shown(tmp_path: Path) -> None:
    golden = (GOLDEN / "mlp.txt").read_text()
    with pytest.raises(AssertionError, match=r"run with --update-golden if this is meant:[\s\S]*\+%4 f32\[T, 33\]"):
        compare("mlp", golden.replace("%4 f32[T, 32]", "%4 f32[T, 33]"), update=False)
