"""`make bench-cuda`: at small sizes, on the processor that stands for a GPU."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.host import HostDevice
from tensorgraph.backends.cuda.runtime import Memory, OutOfMemoryError
from tensorgraph.backends.cuda.weights import codes_of
from tensorgraph.dtypes import as_dtype
from tensorgraph.tools.bench.cuda import command, models, ops, peers
from tensorgraph.tools.bench.cuda.drawn import Drawing, without_data
from tensorgraph.tools.bench.cuda.kernels import Noted
from tensorgraph.tools.bench.cuda.model_cases import CASES, ModelCase
from tensorgraph.tools.bench.cuda.op_cases import Inputs, cases
from tensorgraph.tools.bench.cuda.results import Budget, Ceilings
from tensorgraph.tools.bench.cuda.scale import Scale, scale_of
from tests.backends.cuda.conftest import compiler  # noqa: F401  (a fixture)

with_compiler = pytest.mark.usefixtures("compiler")
CEILINGS = Ceilings(1e9, 1e9, dict.fromkeys(("f16", "s8", "dp4a", "f32"), 1e9), 1e-6)
FULL = Scale(True, 1 << 32, 1, 1, 1 << 30, (4, 16), 0.02, 1)


def ran(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The program's exit code."""
    monkeypatch.setattr("sys.argv", ["bench-cuda", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


@with_compiler
def test_all_that_is_asked_for_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ceilings, an op, a model; the page and the figures are those that are printed."""
    monkeypatch.setattr(command, "cases", lambda: [case for case in cases() if case.name == "rms_norm, 1 row"])
    words = ("--backend", "cuda-host", "-r", "2", "--json", "--record", str(tmp_path))
    assert ran(monkeypatch, *words) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "cuda.json").read_text())
    assert kept == {"name": "cuda", "command": "make bench-cuda", **printed}
    assert printed["device"]["name"] == "host" and printed["errors"] == []
    by_part = {part: [row for row in printed["runs"] if row["part"] == part] for part in command.PARTS}
    assert len(by_part["ceilings"]) == 8 and len(by_part["ops"]) == 1
    assert [row["more"]["test"] for row in by_part["models"]] == ["pp8", "tg4", "tg4 @ d16"]
    for row in printed["runs"]:
        assert len(row["seconds"]) == 2 and all(0 < s < 60 for s in row["seconds"]) and row["median_s"] > 0
    assert all(row["more"]["value"] > 0 and math.isfinite(row["more"]["value"]) for row in by_part["ceilings"])
    (norm,) = by_part["ops"]
    assert norm["kernels"] == 1 and norm["size_bytes"] == 2 * 4 * 256 and norm["limit"] and 0 < norm["of_limit"]
    decoding = by_part["models"][1]
    assert decoding["size_bytes"] > 0 and decoding["kernels"] > 5 and decoding["more"]["taken_bytes"] > 0
    assert 0 <= decoding["more"]["host_s"] <= decoding["median_s"] and decoding["more"]["device_s"] > 0
    left = {each["name"]: each["why"] for each in printed["not_run"]}
    assert left == {case.name: "it is too large for cuda-host" for case in CASES if not case.small}
    page = (tmp_path / "cuda.md").read_text()
    assert page.startswith("# CUDA kernels and models on host\n") and "| rms_norm, 1 row |" in page
    assert "- not run: models, V4-Flash: it is too large for cuda-host" in page and str(tmp_path) not in page


def test_what_there_is_no_time_for_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(monkeypatch, "--backend", "cuda-host", "--minutes", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == [] and len(found["not_run"]) == 1 + len(list(cases())) + len(CASES)
    assert all(each["why"].endswith("0 s of 0 minutes are left for it") for each in found["not_run"])


def test_shares_of_the_minutes() -> None:
    budget = Budget(10)
    budget.began -= 300
    assert budget.has("models", "a", 290) and not budget.has("models", "b", 310)
    assert not budget.has("ops", "c", 1, 0.45) and budget.has("ops", "d", 50, 0.6)
    assert [each["name"] for each in budget.not_run] == ["b", "c"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--backend", "cpu"), "wanted --backend cuda, cuda:N or cuda-host; got 'cpu'"),
        (("--backend", "cuda-host,cpu"), "wanted --backend cuda, cuda:N or cuda-host; got 'cuda-host,cpu'"),
        (("--backend", "cuda-host", "--only", "nothing"), "wanted --only ceilings, ops, models; got nothing"),
        (("--backend", "cuda-host", "--match", "nothing*"), "nothing is called 'nothing*'; there are mul_mat q4_k, 1 row, "),
        (("--backend", "cuda:x"), "wanted the number of a GPU after the colon; got 'cuda:x'"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("tensorgraph: [") and said in line


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(monkeypatch, "--help") == 0
    assert "--minutes" in capsys.readouterr().out


@pytest.fixture(scope="module")
def drawing() -> Drawing:
    return Drawing(HostDevice("cuda-host"))


@with_compiler
@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q4_1", "iq2_xxs", "q2_k", "mxfp4", "f16", "bf16", "f32"])
def test_what_is_drawn_is_as_large_as_weights_are(name: str, drawing: Drawing) -> None:
    dtype = as_dtype(name)
    layout = "planes" if dtype.is_block and codes_of(dtype) is not None else "dense"
    held = drawing.device.upload(without_data((60, 512), dtype), dtype, constant=True, layout=layout)
    found = drawing.device.download(held, dtype).astype(np.float64)
    assert found.shape == (60, 512) and np.isfinite(found).all()
    assert 0.9 < found.std() * math.sqrt(512) < 1.5 and abs(found.mean()) < 0.01
    assert len({row.tobytes() for row in found}) == 60  # rows differ
    again = drawing.device.download(
        drawing.device.upload(without_data((60, 512), dtype), dtype, constant=True, layout=layout), dtype
    )
    assert again.tobytes() != found.tobytes()


@with_compiler
def test_norms_are_drawn_around_one_and_data_stays(drawing: Drawing) -> None:
    f32 = as_dtype("f32")
    norm = drawing.device.download(drawing.device.upload(without_data((4096,), f32, 1.0), f32, constant=True), f32)
    assert abs(norm.mean() - 1) < 0.02 and 0.08 < norm.std() < 0.12
    given = np.arange(7, dtype=np.float32)
    assert drawing.device.download(drawing.device.upload(given, f32, constant=True), f32).tolist() == given.tolist()


SIZES = {"SmolLM2-135M Q4_1": 84.2e6, "Llama-3.1-8B Q4_K_M": 4.92e9, "V4-Flash": 80.76 * 2**30}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.deep] * (c.name == "V4-Flash"), id=c.name) for c in CASES])
def test_models_are_as_large_as_published(case: ModelCase) -> None:
    file = models.drawn_model(case).file
    assert file is not None and case.estimate_s <= 120
    size_bytes = sum(tensor.size_bytes for tensor in file.tensors.values())
    assert size_bytes == pytest.approx(SIZES.get(case.name, size_bytes), rel=0.02)
    assert size_bytes > (1 << 30 if case.name not in SIZES else 0)


@with_compiler
def test_a_model_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice("cuda-host", 200_000)
    work = command.Work(device, 1, Budget(1), {})
    bench = models.Bench(device, Drawing(device), Noted(device.runtime), CEILINGS, 1, True, lambda text: None)
    with work._kept("models", "a model"):
        list(models.measure(CASES[0], bench))
    (left,) = work.budget.not_run
    assert left["name"] == "a model" and "wants" in left["why"] and "are free" in left["why"] and not work.errors


def test_ops_at_full_size_have_the_costs_that_they_are_known_for() -> None:
    """Without data: nothing is taken of the host for 128k rows."""
    from tensorgraph import registry

    found = {}
    for case in cases():
        inputs = Inputs(0)
        node = case.build(inputs, FULL)
        found[case.name] = registry.ops.get(node.op).cost(node, {})
        assert all(x.nbytes < 1 << 24 for x in inputs.given.values() if any(x.strides)) and case.kind in CEILINGS.rates
    assert found["mul_mat q4_k, 1 row"].size_bytes == pytest.approx(14336 * 4096 * 4.5 / 8, rel=0.01)
    assert found["mul_mat f16, 512 rows"].flops == 2 * 512 * 4096 * 14336
    assert found["index_top_k of 1 token, 2,048 of 128k"].size_bytes == pytest.approx(131072 * (256 + 8), rel=0.01)
    assert found["latent attention of 1 token, 2,048 rows of 128k"].size_bytes < 2048 * 576 * 2 * 2


@with_compiler
def test_others_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can, one that cannot: which is said, and ours is there all the same."""
    turns: list[str] = []

    def broken() -> peers.Seconds:
        raise RuntimeError("no such\ndevice")

    def beside(work: peers.Work, instances: int) -> Iterator[tuple[str, Any]]:
        assert work == peers.Work("rms_norm", (1, 256)) and instances == 2
        yield "fake", lambda: lambda times: turns.append("fake") or 1.0  # type: ignore[func-returns-value]
        yield "broken", broken

    device = HostDevice("cuda-host")
    noted, _ = Noted(device.runtime), Drawing(device)
    seconds = device.runtime.seconds
    monkeypatch.setattr(device.runtime, "seconds", lambda run, times: turns.append("ours") or seconds(run, times))  # type: ignore[func-returns-value]
    monkeypatch.setattr(ops, "peers", beside)
    (case,) = [case for case in cases() if case.name == "rms_norm, 1 row"]
    row = ops.measure(case, device, noted, scale_of(device), CEILINGS, 3)
    assert turns[1:] == ["ours", "fake", "fake", "ours", "ours", "fake"]
    assert row.peer_seconds == {"fake": [1.0] * 3} and row.more["failed"] == ["broken: RuntimeError: no such device"]


def test_without_torch_nothing_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with one that finds no GPU."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch" not in peers.installed() and list(peers.peers(peers.Work("mm", (1, 2, 3)), 2)) == []
    blind = SimpleNamespace(__version__="2.9", cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", blind)
    assert peers.installed()["torch"] == "2.9" and list(peers.peers(peers.Work("mm", (1, 2, 3)), 2)) == []


def test_an_op_without_room_is_listed_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    work = command.Work(CudaDevice("cuda", lambda: None), 1, Budget(1), {})  # type: ignore[arg-type, return-value]

    def full(size_bytes: int) -> Memory:
        raise OutOfMemoryError("[cuda] wanted more;\n less is free")

    with work._kept("ops", "large"):
        full(1)
    assert work.budget.not_run == [{"part": "ops", "name": "large", "why": "[cuda] wanted more; less is free"}]
