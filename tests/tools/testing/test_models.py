"""Models on two sides, over the steps of a sequence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions
from tensorgraph.decoding import Decoding
from tensorgraph.device import get_devices
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph
from tensorgraph.ops import scale
from tensorgraph.tools.testing import Report, Terms, compare_model, load_reproduction, rerun
from tests.models import tiny
from tests.ops.kernel_devices import Float32Device, registered
from tests.tools.testing.wrong_devices import JoiningDevice, WrongCpu, WrongStateDevice, last_element_off, reads, wrong_node

Array = np.ndarray[Any, Any]

N = 16
NODES = {"llama": 38, "qwen3moe": 62, "deepseek_v32": 172, "deepseek_v4": 990}


def checked(architecture: str, backend: Any, *, kind: str = "f32", kv_type: str = "f32", **terms: Any) -> Report:
    """Sixteen tokens and two steps."""
    model, ids = tiny.model(architecture, kind), tiny.tokens(architecture)[:N]
    return compare_model(model, ids, kv_type=kv_type, terms=Terms(backends=("reference", backend), **terms))


@pytest.mark.parametrize("architecture", NODES)
def test_the_cpu_agrees(architecture: str) -> None:
    model, ids = tiny.model(architecture), tiny.tokens(architecture)[:40]
    report = compare_model(model, ids, decode=1, kv_type="f32")
    assert report.ok and (report.nodes, report.steps) == (NODES[architecture], 2)
    assert max(worst.nmse for worst in report.worst.values()) < 1e-12 and max(report.whole.values()) < 1e-10
    assert {"logits", "logits of a session"} <= report.whole.keys() and report.amplified == ()


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "q4_0"), ("deepseek_v3", "q8_0"), ("qwen3moe", "q8_0")])
@pytest.mark.parametrize("exact", [True, False])
def test_quantised_weights_agree(architecture: str, kind: str, exact: bool) -> None:
    """Where activations are rounded to 8 bits, a router may choose other experts: that is no node's fault."""
    report = checked(architecture, "cpu", kind=kind, kv_type="f16", options=CompileOptions(exact=exact))
    assert report.ok and report.exact == exact
    worst = max(worst.nmse for worst in report.worst.values())
    assert worst < 1e-12 if exact else 1e-5 < worst < 1e-3
    assert exact or report.worst["rms_norm"].nmse < 1e-12


def test_other_arithmetic_agrees() -> None:
    """Everything in float32, sums in another order; rows in f16."""
    report = checked("llama", Float32Device("f32"), kv_type="f16")
    assert report.ok and 0 < max(worst.nmse for worst in report.worst.values()) < 1e-11 and report.whole["logits"] < 1e-6


def test_several_devices_agree_and_the_wrong_one_is_found(tmp_path: Path) -> None:
    """The second layer on another device: copies between them, and a node that is wrong on that one alone, and again so."""
    placed = CompileOptions(exact=True, placement={"blk.1.*": "second"})
    for change, name in ((lambda y: y, None), (lambda y: y * 1.01, "blk.1.ffn_up.weight")):
        second = wrong_node("second", lambda node: any("ffn_up" in i.base.name for i in node.inputs), change)
        report = checked("llama", [get_devices("cpu")[0], second], options=placed, folder=tmp_path)
        assert (report.first and report.first.node.name) == name and report.got == "cpu,second"
        if report.first is not None:
            with registered("second", lambda _, device=second: device):  # type: ignore[misc]
                again = rerun(load_reproduction(str(report.first.reproduction)))
            assert again.first is not None and again.first.node.name == name


def test_a_wrong_node_is_named_with_the_line_of_the_model_and_of_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.endswith("mistakes.llama")]:  # another test's, with the same file name
        monkeypatch.delitem(sys.modules, module)
    device = wrong_node("wrong", reads("blk.1.ffn_down.weight"), last_element_off)
    first = checked("llama", device, folder=tmp_path).first
    assert first is not None and (first.node.op, first.node.name) == ("mul_mat", "blk.1.ffn_down.weight")
    assert (first.step, first.length, first.alone) == (0, 0, True)
    assert first.node.where.startswith("llama.py:") and "decode(" in first.node.text
    assert first.block.startswith("blocks.py:") and "ffn_down" in "\n".join(first.lines())
    assert [value.source.op for value in first.inputs] == ["constant", "swiglu"]
    again = rerun(load_reproduction(str(first.reproduction)), device)
    assert again.first is not None and again.first.node.name == first.node.name


def test_a_node_that_is_wrong_in_later_steps_is_found_there() -> None:
    device = wrong_node("wrong", reads("blk.0.ffn_up.weight"), lambda y: y * 1.01 if len(y) == 1 else y)
    first = checked("llama", device).first
    assert first is not None and (first.node.name, first.step, first.length) == ("blk.0.ffn_up.weight", 1, N)


def test_nodes_that_are_wrong_together_are_found_layer_by_layer() -> None:
    joined = JoiningDevice("joining", lambda node, i: node.op == "add" and reads("blk.0.ffn_down.weight")(i))
    first = checked("llama", joined).first
    assert first is not None and [n.op for n in first.together] == ["mul_mat", "add"] and first.passes == ("grouping",)
    assert first.node.name == "blk.0.out"


WRONG_ROWS = {
    "turned": {"stream": "blk.1.v", "change": lambda rows: rows[::-1]},
    "in another type": {"stream": "blk.0.k", "change": lambda rows: np.round(rows * 64) / 64},
    "of before": {"stream": "blk.1.v", "change": lambda rows: rows * 2, "what": "earlier"},
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_wrong_rows_of_state_are_found(wrong: str, tmp_path: Path) -> None:
    device = WrongStateDevice("wrong", WRONG_ROWS[wrong])
    first = checked("llama", device, folder=tmp_path).first
    assert first is not None and (first.node.op, first.node.name) == ("append", WRONG_ROWS[wrong]["stream"])
    before = wrong == "of before"
    assert (first.step, first.verdict.startswith("rows that were there before")) == (int(before), before)
    saved = load_reproduction(str(first.reproduction))
    assert saved.length == (N if before else 0) and rerun(saved, "cpu").ok and rerun(saved, "reference").ok
    assert rerun(saved, device).first is not None


def test_a_node_that_reads_state_wrongly_is_found_and_saved_with_it(tmp_path: Path) -> None:
    """The store holds the right rows; given them as an input, the node is right."""
    device = WrongStateDevice("wrong", {"stream": "blk.1.v", "change": lambda rows: rows[::-1], "what": "read"})
    first = checked("llama", device, folder=tmp_path).first
    assert first is not None and (first.node.op, first.node.name, first.alone) == ("flash_attn", "blk.1.k", True)
    assert [(n.op, n.name) for n in first.together] == [("append", "blk.1.v"), ("flash_attn", "blk.1.k")]
    saved = load_reproduction(str(first.reproduction))
    assert rerun(saved, "cpu").ok and rerun(saved, device).first is not None


def test_a_fusion_of_the_cpu_that_is_wrong_for_few_tokens_is_found(tmp_path: Path) -> None:
    """A call that takes the gate for what is gated: right for a prompt, wrong for the tokens that follow."""
    device = WrongCpu("planted", gated="blk.0.ffn_gate.weight")
    report = checked("llama", device, folder=tmp_path)
    first = report.first
    assert first is not None and report.nodes == NODES["llama"] and (first.step, first.alone) == (1, True)
    assert first.node.op == "swiglu"
    assert {n.name for n in first.together[:-1]} <= {f"blk.0.ffn_{w}.weight" for w in ("gate", "up", "norm")}
    assert first.passes == ("grouping",)
    saved = load_reproduction(str(first.reproduction))
    assert rerun(saved, device).first is not None and rerun(saved, "cpu").ok


def test_a_weight_that_is_packed_wrongly_is_found() -> None:
    weight = tiny.model("llama", "q4_0").weight("blk.1.attn_q.weight")
    first = checked("llama", WrongCpu("planted", weight=weight), kind="q4_0").first
    assert first is not None and (first.node.name, first.alone) == ("blk.1.attn_q.weight", True)
    assert first.difference.at[-1] in (5, 6)


def test_sessions_that_step_otherwise_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Decoding.next

    def wrong(self: Decoding, token: int) -> Array | None:
        logits = right(self, token)
        return None if logits is None else logits * 1.01

    monkeypatch.setattr(Decoding, "next", wrong)
    report = checked("llama", "cpu")
    assert report.first is not None and report.first.stage == "session" and report.first.step == 2
    assert "wrong as a session steps" in str(report)


def test_rows_that_are_chosen_early_and_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node of the graph is right then: it is the graph that is not the model's."""

    def careless(graph: Graph) -> Graph:
        return Graph({name: scale(node, scale=1.01) for name, node in graph.outputs.items()}, effects=graph.effects)

    monkeypatch.setattr("tensorgraph.models.architecture.choose_early", careless)
    for limit_bytes in (1 << 32, 300_000):
        first = checked("llama", "cpu", limit_bytes=limit_bytes).first
        assert first is not None and (first.stage, first.step, first.node.op) == ("graph", 0, "scale")
        assert first.difference.nmse == pytest.approx(1e-4, rel=1e-3) and "not what the model wrote" in first.verdict


def test_parts_find_the_same() -> None:
    """A few nodes at a time: no more memory than they take."""
    device = JoiningDevice("joining", lambda node, i: node.op == "add" and reads("blk.1.ffn_down.weight")(i))
    for backend in (Float32Device("f32"), device):
        whole, parts = (checked("llama", backend, limit_bytes=n) for n in (1 << 32, 300_000))
        assert parts == whole


def test_more_tokens_than_the_context_holds_are_refused() -> None:
    model = tiny.model("llama")
    with pytest.raises(InputError, match=f"at most {model.context} tokens with the steps; got {model.context - 1} and 2 steps"):
        compare_model(model, [1] * (model.context - 1))


@pytest.mark.parametrize("ids", [[], [512], [-1], [[1]], [1.5]])
def test_what_are_no_tokens_is_refused(ids: Any) -> None:
    with pytest.raises(InputError, match="wanted token ids below 512"):
        compare_model(tiny.model("llama"), ids)


@pytest.mark.parametrize("decode", [-1, 1.5, "2"])
def test_what_is_no_number_of_steps_is_refused(decode: Any) -> None:
    with pytest.raises(InputError, match="wanted decode as a number of steps >= 0"):
        compare_model(tiny.model("llama"), tiny.tokens("llama")[:4], decode=decode)


def test_an_encoder_takes_as_many_tokens_as_its_context_holds() -> None:
    """It makes no steps: none are counted."""
    model = tiny.model("bert")
    ids = np.resize(tiny.reference("bert")["ids/0"], model.context + 1)
    assert compare_model(model, ids[:-1]).steps == 1
    with pytest.raises(InputError, match=f"at most {model.context} tokens with the steps; got {model.context + 1} and 0 steps"):
        compare_model(model, ids)
