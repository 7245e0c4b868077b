"""`test-ops perf` and `test-ops support`: what ops are measured with, and which types their inputs may have."""

from __future__ import annotations

import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.device import get_devices
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import GraphError
from tensorgraph.graph import STRUCTURAL, Node, input
from tensorgraph.op import Op, node_bytes
from tensorgraph.tools.bench.roofs import Roofs
from tensorgraph.tools.conformance import perf
from tensorgraph.tools.conformance.support import support, types_text
from tensorgraph.tools.conformance.typical import filled, typical_cases
from tests.core.devices import StrictDevice
from tests.ops.kernel_devices import registered
from tests.tools.commands import as_json, ok, refused


@pytest.mark.parametrize("name", list(registry.ops))
def test_every_op_has_typical_inputs(name: str) -> None:
    op = registry.ops.get(name)
    for slots, attrs in typical_cases(op):
        node = op.apply({slot: input(slot, x.shape, as_dtype(x.dtype)) for slot, x in slots.items()}, attrs)
        cost = op.cost(node, {})
        assert 1 << 24 <= sum(node_bytes(n) for n in (node, *node.inputs)) <= 1 << 29
        assert cost.size_bytes >= 1 << 26 or cost.flops > 4 * cost.size_bytes  # more than caches hold, or bound by arithmetic


def test_typical_floats_take_no_memory_until_they_are_filled() -> None:
    slots, _ = typical_cases(registry.ops.get("mul_mat"))[0]
    assert not slots["a"].any()
    found = filled(slots)
    assert found["a"].dtype == np.float32 and 0.5 < np.abs(found["a"]).max() <= 1 and found["a"].std() > 0.5


def test_speeds_are_the_ops_own_costs_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf, "_run", lambda bound, given, device: 0.5)
    (device,) = get_devices("cpu")
    roofs = Roofs(stream_gbs=1.0, fma_gflops=2.0, dot_gops=4.0)
    one, many = perf.speeds(registry.ops.get("mul_mat"), device, seconds=0, roofs=roofs)
    n_bytes, n_flops = 4 * (4096 * 4096 + 2 * 4096), 2 * 4096 * 4096
    assert one.gbs == pytest.approx(n_bytes / 0.5 / 1e9) and one.gflops == pytest.approx(n_flops / 0.5 / 1e9)
    assert one.bound == "memory" and one.roof == pytest.approx(n_bytes / 1e9 / 0.5)
    assert many.bound == "arithmetic" and many.roof == pytest.approx(512 * n_flops / 2e9 / 0.5)
    assert one.case == "a f32[4096, 4096], b f32[1, 4096]"
    of_blocks = next(perf.speeds(registry.ops.get("mul_mat"), device, dtype=as_dtype("q4_0"), seconds=0, roofs=roofs))
    assert of_blocks.case.startswith("a q4_0") and of_blocks.gbs == pytest.approx(
        (n_bytes - 4096 * 4096 * (4 - 18 / 32)) / 0.5 / 1e9
    )
    many_of_blocks = [*perf.speeds(registry.ops.get("mul_mat"), device, dtype=as_dtype("q4_0"), seconds=0, roofs=roofs)][1]
    assert many_of_blocks.roof == pytest.approx(512 * n_flops / 4e9 / 0.5)  # int8 products
    with pytest.raises(GraphError, match=r"\[rope\] wanted an input that may be a weight of q4_0"):
        list(perf.speeds(registry.ops.get("rope"), device, dtype=as_dtype("q4_0")))


def test_perf_runs_kernels_and_says_what_it_leaves_out() -> None:
    found = as_json(
        "test-ops", "perf", "--op", "fill", "--op", "get_rows", "--op", "rope", "--backend", "cpu", "--type", "q4_k", "-t", 1
    )
    (rows,) = found["ops"]
    assert rows["op"] == "get_rows" and rows["seconds"] > 0 and rows["gbs"] > 0 and rows["case"].startswith("a q4_k[16384, 2048]")
    assert found["roofs"]["stream_gbs"] > 0 and [line.split()[0] for line in found["left_out"]] == ["fill", "rope"]
    (constant,) = as_json("test-ops", "perf", "--op", "fill", "--backend", "cpu")["ops"]  # not computed once and for all
    assert constant["gbs"] > 0 and constant["case"] == "f32[4096, 4096]"
    text = ok("test-ops", "perf", "--op", "relu", "--backend", "cpu")
    rows_of = [line.split() for line in text.splitlines()]
    assert rows_of[0][:4] == ["op", "backend", "ms", "GB/s"] and rows_of[1][:2] == ["relu", "cpu"] and "the roof: " in text
    assert "there is no 'nowhere'" in refused("test-ops", "perf", "--backend", "nowhere")


def test_support_lists_types_by_input() -> None:
    found = {(t.op, t.slot): t for t in support(["mul_mat", "add", "cast", "rope", "geglu"], ["cpu", "reference"])[0]}
    assert types_text(found["mul_mat", "a"].accepted) == "real, blocks" and types_text(found["add", "a"].accepted) == "real"
    assert types_text(found["cast", "x"].accepted) == "real, int, bool, blocks"
    assert {"f32", "i8", "q8_0", "q2_k"} <= set(found["cast", "dtype"].accepted)
    assert found["rope", "x"].own["cpu"] == () and found["rope", "x"].expanded["cpu"] == found["rope", "x"].accepted
    assert found["geglu", "a"].own["cpu"] == found["geglu", "a"].accepted  # with b, which is of a's type
    assert ("geglu", "b") not in found


def test_support_says_what_is_refused() -> None:
    class Narrow(StrictDevice):
        def supports(self, node: Node) -> bool:
            return node.op in STRUCTURAL or all(n.dtype.name == "f32" for n in (node, *node.inputs))

    with registered("narrow", Narrow):
        text = ok("test-ops", "support", "--op", "neg", "--op", "mul_mat", "--backend", "narrow")
        (line,) = as_json("test-ops", "support", "--op", "neg", "--backend", "narrow")["support"]
    rows = [line.split() for line in text.splitlines()]
    assert rows == [
        ["op", "input", "types", "narrow"],
        ["neg", "x", "real", "f32"],
        *(["mul_mat", s, "real,", "blocks", "f32"] for s in "ab"),
    ]
    assert line == {
        "op": "neg",
        "slot": "x",
        "accepted": ["f64", "f32", "f16", "bf16"],
        "own": {"narrow": ["f32"]},
        "expanded": {"narrow": []},
    }


def test_types_in_few_words() -> None:
    assert types_text(["f64", "f32", "bf16"]) == "real but f16"
    assert types_text(["f32"]) == "f32" and types_text([]) == "none" and types_text(["i32", "bool", "f16"]) == "f16, i32, bool"


def test_an_op_without_signature_says_what_to_measure() -> None:
    op = Op("unmeasured")
    try:
        with pytest.raises(GraphError, match="`typical` inputs to measure"):
            typical_cases(op)
        text = ok("test-ops", "support", "--op", "neg", "--op", "unmeasured", "--backend", "reference")
        assert text.splitlines()[-1].startswith("not known: [unmeasured] wanted a signature")
    finally:
        registry.ops.remove("unmeasured")
