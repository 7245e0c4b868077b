"""`tensorgraph profile`: whose time and work is whose, groups, sums; against counts by hand. No speeds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu.executor import ThreadCounters
from tensorgraph.backends.cpu.kernel import Call, Ref
from tensorgraph.compiler import run_op
from tensorgraph.device import get_devices
from tensorgraph.errors import InputError
from tensorgraph.graph import Node, constant, input
from tensorgraph.models.text.model import TextSession, load
from tensorgraph.ops import add, mul_mat, rms_norm
from tensorgraph.tools import profile as command
from tensorgraph.tools.bench.cases import Case
from tensorgraph.tools.bench.roofs import Roofs
from tensorgraph.tools.profile import NativeRun, Steps, as_text, since
from tensorgraph.tools.profile_groups import Work, charged, kernel_name, labels, works
from tests.reference import reference_path
from tests.tools.commands import as_json, gguf, ok, refused

ROOFS = Roofs(stream_gbs=10.0, fma_gflops=100.0, dot_gops=400.0)
QUICK = ("--no-roofs", "-p", 6, "-n", 3, "-d", 5, "-r", 2, "-t", 1)


def emit_product(k: Any, operands: Any) -> None: ...


def emit_rows(k: Any, operands: Any) -> None: ...


def call(nodes: tuple[Node, ...], emit: Any = emit_product, **operands: Node) -> Call:
    refs = {name: Ref(node, "r16" if node.dtype.is_block else "dense") for name, node in operands.items()}
    return Call(emit, refs, nodes=nodes)


@pytest.fixture
def block() -> dict[str, Node]:
    """rms_norm, a product of quantised weights [96, 64], one of f32 weights [64, 96], and a sum, of 2 tokens."""
    x = input("x", (2, 64))
    norm = constant("blk.3.norm.weight", shape=(64,))
    up, down = constant("blk.3.up.weight", shape=(96, 64), dtype="q8_0"), constant("blk.3.down.weight", shape=(64, 96))
    h = rms_norm(x, norm, eps=1e-5)
    wide = mul_mat(up, h)
    narrow = mul_mat(down, wide)
    return {"x": x, "norm": norm, "up": up, "down": down, "h": h, "wide": wide, "narrow": narrow, "y": add(narrow, x)}


def test_a_node_of_several_calls_is_charged_once(block: dict[str, Node]) -> None:
    """To the call that reads its weights; one without weights to the call that writes it; else to the first."""
    h, wide, narrow, y = block["h"], block["wide"], block["narrow"], block["y"]
    calls = [
        call((h, wide), emit_rows, x=block["x"], norm=block["norm"]),
        call((h, wide), w=block["up"], y=wide),
        call((narrow, y), emit_rows, x=wide),
        call((narrow, y), w=block["down"], residual=block["x"], y=y),
    ]
    assert charged(calls) == [(h,), (wide,), (), (narrow, y)]
    assert charged([calls[2]]) == [(narrow, y)]
    assert [kernel_name(c) for c in calls] == ["rows", "product", "rows", "product"]


def test_work_is_what_goes_in_and_out(block: dict[str, Node]) -> None:
    """Bytes: operands once, and nothing that stays inside; operations of products of packed weights are int8, unless exact."""
    h, wide, narrow, y = block["h"], block["wide"], block["narrow"], block["y"]
    one, other = call((h, wide), x=block["x"], norm=block["norm"], w=block["up"], y=wide), call((narrow, y), w=block["down"], y=y)
    packed = 96 * 64 // 32 * 34
    int8, plain = works([one, other], {}, exact=False)
    assert int8.size_bytes == 2 * 64 * 4 + 64 * 4 + packed + 2 * 96 * 4
    assert int8.int8_ops == 2 * 96 * 64 * 2 and int8.flops < 10 * 2 * 64
    assert plain.size_bytes == 2 * 96 * 4 + 64 * 96 * 4 + 2 * 2 * 64 * 4
    assert plain == Work(plain.size_bytes, 2 * 64 * 96 * 2 + 2 * 64, 0)
    (exact,) = works([one], {}, exact=True)
    assert exact.int8_ops == 0 and exact.flops == int8.flops + int8.int8_ops


def test_weights_that_two_nodes_of_a_call_read_are_read_once(block: dict[str, Node]) -> None:
    again = mul_mat(block["up"], block["x"])
    both = call((block["wide"], again), x=block["x"], h=block["h"], w=block["up"], y=again, z=block["wide"])
    (work,) = works([both], {}, exact=False)
    assert work.size_bytes == 96 * 64 // 32 * 34 + 2 * 2 * 64 * 4 + 2 * 2 * 96 * 4


@pytest.mark.parametrize(
    ("work", "seconds", "limit"),
    [
        (Work(20_000_000, 100, 100), 2e-3, "read"),
        (Work(100, 300_000_000, 400_000_000), 4e-3, "f32"),
        (Work(100, 100_000_000, 800_000_000), 3e-3, "int8"),
    ],
)
def test_the_roof_is_the_larger_of_reading_and_computing(work: Work, seconds: float, limit: str) -> None:
    assert work.roof(ROOFS) == (pytest.approx(seconds), limit)


def test_without_int8_instructions_the_roof_is_f32s() -> None:
    assert Work(0, 0, 10**9).roof(Roofs(10.0, 100.0, None)) == (pytest.approx(1e-2), "int8")


def test_labels(block: dict[str, Node]) -> None:
    h, wide, y = block["h"], block["wide"], block["y"]
    first, last = rms_norm(block["x"], eps=1e-5), add(y, y)
    calls = [
        call((first,), emit_rows, x=block["x"], y=first),
        call((h, wide), w=block["up"], norm=block["norm"], x=block["x"], y=wide),
        call((y,), emit_rows, x=y),
        call((block["narrow"],), w=block["down"], x=wide),
        call((last,), emit_rows, y=last),
    ]
    assert labels(calls, "layer") == ["before", "blk.3", "blk.3", "blk.3", "after"]
    assert labels(calls[:1], "layer") == ["before"]
    assert labels(calls, "op") == ["rows: rms_norm", "product: rms_norm, mul_mat", "rows: add", "product: mul_mat", "rows: add"]
    assert labels(calls, "kernel")[1:4] == ["product: blk.*.up, blk.*.norm", "rows: add", "product: blk.*.down"]
    assert [" ".join(label.split()) for label in labels(calls, "step")][::4] == ["0 before rows: rms_norm", "4 after rows: add"]


def steps_of(calls: list[Call]) -> Steps:
    """Two decode steps: 3 and 5 ms of calls, 1 ms outside the loop, and 9 and 2 ms for taking times."""
    seconds = [np.array([1e-3, 2e-3]), np.array([1e-3, 4e-3])]
    runs = [[NativeRun(calls, {}, s, float(s.sum()) + extra)] for s, extra in zip(seconds, (9e-3, 2e-3), strict=True)]
    return Steps(Case("tg", 2, 7), [runs[0][0].spent_s + 1e-3, runs[1][0].spent_s + 1e-3], runs)


def test_times_are_means_of_steps(block: dict[str, Node]) -> None:
    calls = [call((block["h"],), emit_rows, x=block["x"], y=block["h"]), call((block["wide"],), x=block["h"], w=block["up"])]
    steps = steps_of(calls)
    assert (steps.native_s, steps.outside_s, steps.n_calls) == (pytest.approx(4e-3), pytest.approx(1e-3), 2)
    slow, quick = steps.groups("op", False)
    assert (slow.label, slow.calls, slow.seconds) == ("product: mul_mat", 2, pytest.approx(6e-3))
    assert (quick.label, quick.calls, quick.seconds) == ("rows: rms_norm", 2, pytest.approx(2e-3))
    assert [g.seconds for g in steps.groups("step", False)] == [quick.seconds, slow.seconds]
    about = {"model": {"name": "m", "architecture": "a", "type": "t"}, "backend": "cpu", "n_threads": 1, "kv_type": "f16"}
    lines = as_text(about | {"exact": True, "by": "op"}, [(steps, [slow, quick])], ROOFS, 1).splitlines()
    assert lines[0] == "m (a t), cpu, 1 thread, rows f16, exact"
    assert lines[1] == "roofs: 10.0 GB/s read, 100 f32 GFLOP/s, 400 int8 GOP/s"
    assert lines[3] == "tg2 @ d7: 2 steps of 2 calls, 200.0 t/s"
    assert lines[4] == "a step: 5.000 ms = 4.000 ms inside the native loop, 1.000 ms outside"
    assert lines[6].split()[:4] == ["op", "calls", "ms", "a"] and lines[6].endswith("of roof")
    n_bytes = 96 * 64 // 32 * 34 + 2 * (64 + 96) * 4
    row = ["product:", "mul_mat", "1", "3.000", "3000.00", "75.0%", f"{n_bytes / 1e6:.3f}", "0.025", "0.0", "0.0", "0%", "read"]
    assert lines[7].split() == row
    assert lines[8].split()[:5] == ["1", "others", "1", "1.000", "1000.00"] and lines[9].split()[:3] == ["all", "2", "4.000"]


@pytest.mark.parametrize("by", ["op", "layer", "kernel", "step"])
def test_every_grouping_has_all_calls(by: str) -> None:
    """Groups add up to the step, whatever they are; bytes and operations do not depend on them."""
    found = as_json("profile", gguf("llama"), *QUICK, "--by", by)
    assert [c["test"] for c in found["cases"]] == ["pp6 @ d5", "tg3 @ d5"] and found["roofs"] is None
    assert [c["steps"] for c in found["cases"]] == [2, 3] and found["n_threads"] == 1
    for case in found["cases"]:
        groups = case["groups"]
        assert case["wall_s"] == pytest.approx(case["native_s"] + case["outside_s"])
        assert sum(g["total_s"] for g in groups) == pytest.approx(case["native_s"])
        assert sum(g["share"] for g in groups) == pytest.approx(1)
        assert sum(g["calls"] for g in groups) == pytest.approx(case["calls"])
        assert all(g["mean_s"] * g["calls"] == pytest.approx(g["total_s"]) for g in groups)
        if by == "layer":
            assert {g["label"] for g in groups} == {"before", "blk.0", "blk.1", "after"}
        if by == "step":
            assert [g["label"].split()[0] for g in groups] == [str(i) for i in range(int(case["calls"]))]
        else:
            assert [g["total_s"] for g in groups] == sorted((g["total_s"] for g in groups), reverse=True)


def test_what_is_there_before_may_be_random(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    real = TextSession.fill

    def record(self: TextSession, ids: Any, rows: Any) -> None:
        filled.append(len(ids))
        real(self, ids, rows)

    monkeypatch.setattr(TextSession, "fill", record)
    found = as_json("profile", gguf("llama"), *QUICK, "--fill", "random")
    assert found["fill"] == "random" and filled == [5] and [c["test"] for c in found["cases"]] == ["pp6 @ d5", "tg3 @ d5"]
    assert as_json("profile", gguf("llama"), *QUICK)["fill"] is None and filled == [5]


def test_threads_share_the_chunks_of_all_calls() -> None:
    """Those of both cases apart; with one thread all are its own, and it is busy for nearly all of the loop's time."""
    found = as_json("profile", gguf("llama"), *QUICK)["cases"]
    for case in found:
        (thread,) = case["threads"]
        assert thread["chunks"] >= case["calls"] and thread["share"] == 1
        assert (thread["runs"], thread["parks"]) == (case["steps"], 0)
        assert thread["busy"] == pytest.approx(1, abs=0.05)
    both = as_json("profile", gguf("llama"), *QUICK[:-1], 2)["cases"]
    for case, alone in zip(both, found, strict=True):
        calling, other = case["threads"]
        assert calling["chunks"] + other["chunks"] == alone["threads"][0]["chunks"]
        assert calling["share"] + other["share"] == pytest.approx(1) and calling["runs"] == case["steps"] >= other["runs"]
        assert 0 <= other["busy"] < 1.05 and 0 < calling["busy"] < 1.05
    text = ok("profile", gguf("llama"), *QUICK).split("\n\n")
    assert [part.splitlines()[0].split() for part in text if part.startswith("thread")] == [
        ["thread", "chunks", "a", "step", "of", "all", "busy", "runs", "slept"]
    ] * 2


def test_counters_are_differences() -> None:
    two = [ThreadCounters(5, 2, 1, 0.5), ThreadCounters(3, 1, 0, 0.25)]
    assert since(two, [ThreadCounters(9, 3, 1, 1.5), ThreadCounters(4, 1, 2, 0.25)]) == [
        ThreadCounters(4, 1, 0, 1.0), ThreadCounters(1, 0, 2, 0.0)
    ]  # fmt: skip
    assert since(two[:1], two) == two


def test_operations_are_two_a_weight_and_token() -> None:
    """Matrices are [n, d]: all are used for each new token, those after the last attention, and the head, for the last alone."""
    with load(gguf("llama")) as model:
        assert model.model.file is not None
        tensors = model.model.file.tensors
        sizes = {name: int(np.prod(t.shape)) for name, t in tensors.items() if len(t.shape) == 2}
    head = sizes.pop("output.weight", sizes["token_embd.weight"])
    del sizes["token_embd.weight"]
    after = sum(size for name, size in sizes.items() if name.startswith("blk.1.ffn_"))
    for case in as_json("profile", gguf("llama"), *QUICK)["cases"]:
        products = sum(g["flops"] for g in case["groups"] if "mul_mat" in g["label"])
        n = 6 if case["kind"] == "pp" else 1
        wanted = 2 * (n * (sum(sizes.values()) - after) + after + head)
        assert wanted <= products < 1.05 * wanted
    quantised = reference_path("llama/llama-q4_1.gguf")
    for exact in ((), ("--exact",)):
        totals = [sum(g["int8_ops"] for g in c["groups"]) for c in as_json("profile", quantised, *QUICK, *exact)["cases"]]
        assert all(total == 0 for total in totals) if exact else all(total > 2 * sum(sizes.values()) for total in totals)


def test_a_profiled_step_computes_what_others_do() -> None:
    """Inside `profiling`, also where the steps were prepared in advance; every run is told of."""
    ids = list(range(20, 32))
    with load(gguf("llama"), threads=1) as model, model.session(context=64) as plain, model.session(context=64) as timed:
        wanted = [plain.eval(ids[:8]), *(plain.eval([token]) for token in ids[8:])]
        told: list[NativeRun] = []
        device: Any = model.engine.devices[0]
        with device.profiling(lambda *run: told.append(NativeRun(*run))):
            got = [timed.eval(ids[:8]), *(timed.eval([token]) for token in ids[8:])]
        assert all(np.array_equal(a, b) for a, b in zip(wanted, got, strict=True))
        assert [run.dims["T"] for run in told] == [8, 1, 1, 1, 1] and [run.dims["S"] for run in told][1:] == [9, 10, 11, 12]
        assert all(len(run.seconds) == len(run.calls) and (run.seconds >= 0).all() for run in told)
        assert all(run.seconds.sum() <= run.spent_s for run in told)
        timed.eval([1])
        assert len(told) == 5


def test_what_a_kernel_refuses_is_refused_while_profiled() -> None:
    told: list[Any] = []
    (device,) = get_devices("cpu")
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    with device.profiling(lambda *run: told.append(run)):  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="below 3"):
            run_op("get_rows", table, np.array([3], np.int32), backend=device)
        assert told == []
        assert run_op("get_rows", table, np.array([2], np.int32), backend=device).tolist() == [[8, 9, 10, 11]]
    run_op("get_rows", table, np.array([1], np.int32), backend=device)
    assert len(told) == 1


def test_text_has_a_table_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorgraph.tools.bench.roofs.measure", lambda threads, seconds: Roofs(10.0 * threads, 100.0, None))
    monkeypatch.setattr("tensorgraph.tools.bench.roofs.fma_after_reading", lambda threads: 50.0 * threads)
    lines = ok("profile", gguf("llama"), *QUICK[1:-2], "-t", 2, "--top", 1).splitlines()
    assert lines[0].endswith("(llama f32), cpu, 2 threads, rows f16") and lines[1].startswith("roofs: 20.0 GB/s read, 100 f32")
    assert lines[1].endswith("GFLOP/s (100 just after reading)")
    heads = [line for line in lines if " steps of " in line]
    assert heads[0].startswith("pp6 @ d5: 2 steps of ") and heads[1].startswith("tg3 @ d5: 3 steps of ")
    assert sum(line.startswith("all ") for line in lines) == 2 == sum(" others " in line for line in lines)
    found = as_json("profile", gguf("llama"), *QUICK[1:], "--top", 2)
    assert found["roofs"] == {"stream_gbs": 10.0, "fma_gflops": 100.0, "dot_gops": None, "late_fma_gflops": 50.0}
    assert [len(c["groups"]) for c in found["cases"]] == [2, 2]
    assert all(g["roof"] in ("read", "f32") and g["roof_fraction"] > 0 for c in found["cases"] for g in c["groups"])


def test_what_cannot_be_profiled_is_a_sentence() -> None:
    line = refused("profile", gguf("llama"), "--backend", "reference")
    assert "wanted a backend that runs a step in a native loop, such as cpu; reference does not" in line
    line = refused("profile", gguf("llama"), *QUICK, "--backend", "reference,cpu")
    assert "wanted steps that a native loop runs" in line and "run elsewhere with reference,cpu" in line
    assert "-p or -n above 0" in refused("profile", gguf("llama"), "-p", 0, "-n", 0)
    assert "wanted --by op, layer, kernel, step; got 'node'" in refused("profile", gguf("llama"), "--by", "node")
    assert "the context of" in refused("profile", gguf("llama"), "-d", 10**6)
    assert "there is no file" in refused("profile", "none.gguf")
    assert "'abacus'" in refused("profile", gguf("llama"), "--backend", "abacus")


def test_of_several_backends_those_with_a_native_loop_are_profiled() -> None:
    (case,) = as_json("profile", gguf("llama"), *QUICK, "-p", 0, "--backend", "cpu,reference")["cases"]
    (alone,) = as_json("profile", gguf("llama"), *QUICK, "-p", 0)["cases"]
    work = [sum(g["flops"] for g in c["groups"]) for c in (case, alone)]
    assert work[0] == pytest.approx(work[1], rel=0.05)


def test_json_is_all_there_is() -> None:
    text = ok("profile", "--json", gguf("llama"), *QUICK)
    assert json.loads(text)["by"] == "op" and text.count("\n") == 1
    assert command.GROUPINGS == ("op", "layer", "kernel", "step")
