"""`tensorgraph bench`: what is fed to whom and in which order, the figures made of seconds, a peer that fails. No speeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.errors import InputError, ShapeError
from tensorgraph.models.text.model import load
from tensorgraph.session import Session
from tensorgraph.tools.bench import command
from tensorgraph.tools.bench.cases import Case
from tensorgraph.tools.bench.ours import Ours
from tensorgraph.tools.bench.roofs import Roofs
from tests.layout import ROOT
from tests.tools.commands import as_json, gguf, ok, refused, tg
from tests.tools.fake_peer import FakePeer

MEASURED = {1: Roofs(10.0, 100.0, 400.0), 2: Roofs(20.0, 200.0, None)}
REFERENCE = ("--backend", "reference", "-t", 2)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The numbers of threads that BLAS would be told."""
    told: list[int | None] = []
    monkeypatch.setattr(command.options, "limit_threads", told.append)
    return told


@pytest.fixture
def fixed_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "roofs_now", lambda threads: {n: MEASURED[n] for n in sorted({1, threads})})


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """What sessions were fed: their length before, and the ids."""
    seen: list[tuple[int, list[int]]] = []
    real = Session.eval

    def record(self: Session, ids: Any, **options: Any) -> Any:
        seen.append((self.length, list(ids)))
        return real(self, ids, **options)

    monkeypatch.setattr(Session, "eval", record)
    return seen


def test_our_rounds_begin_at_their_depth(fed: list[tuple[int, list[int]]]) -> None:
    with load(gguf("llama"), backend="reference") as model:
        ours = Ours(model, 16)
        for depth in (0, 3):
            ours.begin([1, 2, 3][:depth])
            assert fed == ([(0, [1, 2, 3])] if depth else [])
            del fed[:]
            for _ in range(2):
                ours.warm_up("pp", [7, 8])
                assert ours.run("tg", [7, 8]).seconds > 0
                assert fed == [(depth, [7, 8]), (depth, [7]), (depth + 1, [8])]
                del fed[:]
        ours.close()


def test_filled_rounds_begin_with_random_rows(fed: list[tuple[int, list[int]]]) -> None:
    with load(gguf("deepseek_v3"), backend="reference", kv_type="f32") as model:
        ours = Ours(model, 16, fill=True)
        ours.begin([1, 2, 3])
        assert ours.run("pp", [7]).seconds > 0 and fed == [(3, [7])]
        session = ours._session
        rows = np.random.default_rng(0)
        with session._store.begin([(session._open(), 0)]) as step:
            for name, spec in session._store.specs.items():
                np.testing.assert_array_equal(step.read(name)[:3], rows.standard_normal((3, *spec.row_shape), np.float32))
        ours.close()


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v32", "deepseek_v4"])
def test_what_is_filled_with_computed_rows_goes_on_as_if_computed(architecture: str) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2]
    with load(gguf(architecture), backend="reference") as model, model.session(context=32) as one, model.session() as other:
        one.eval(ids)
        with one._store.begin([(one._open(), 0)]) as step:
            rows = {name: step.read(name) for name in one._store.specs}
        for wrong in ([], [-1], list(range(33))):
            with pytest.raises(InputError):
                one.fill(wrong, lambda name, spec, n: rows[name])
        with pytest.raises(ShapeError):
            other.fill(ids, lambda name, spec, n: rows[name][1:])
        assert other.length == 0 and one.ids == ids
        other.fill(ids, lambda name, spec, n: rows[name])
        assert other.ids == ids
        np.testing.assert_array_equal(other.eval([7]), one.eval([7]))


@pytest.mark.parametrize(
    ("architecture", "unused_experts", "kept_bytes"),
    [("llama", 0, 2 * 2 * 2 * 32 * 2), ("deepseek_v2", 2 / 4, 2592), ("deepseek_v3", 12 / 16, 480)],
)
def test_bytes_of_a_token_are_those_of_the_file(architecture: str, unused_experts: float, kept_bytes: int) -> None:
    """Every weight but the other rows of the embeddings and the other experts; of each token before and itself, its state."""
    with load(gguf(architecture), backend="reference") as model:
        assert model.model.file is not None
        tensors = model.model.file.tensors
        embeddings = tensors["token_embd.weight"]
        experts = sum(t.size_bytes for name, t in tensors.items() if "_exps" in name)
        weights = sum(t.size_bytes for t in tensors.values()) - embeddings.size_bytes + 4 * embeddings.shape[1]
        ours = Ours(model, 64)
        assert ours.token_bytes(Case("tg", 8, 16)) == weights - unused_experts * experts + 20 * kept_bytes
        ours.close()


@pytest.mark.usefixtures("fixed_roofs")
def test_json_has_every_round(limits: list[int | None]) -> None:
    found = as_json("bench", gguf("llama"), *REFERENCE, "-p", 6, "-n", 2, "-d", 0, "-d", 4, "-r", 3)
    assert (found["rounds"], found["kv_type"], found["exact"], found["busy"], found["errors"]) == (3, "f16", False, 0, [])
    assert found["machine"]["cores"] >= 1 and found["machine"]["processor"] and set(found["versions"]) >= {"python", "numpy"}
    (run,) = found["runs"]
    assert (run["backend"], run["threads"], run["n_threads"], run["peer"]) == ("reference", "2", 2, None)
    assert run["model"] == {
        "name": "llama-f32", "file": str(gguf("llama")), "architecture": "llama", "type": "f32",
        "size_bytes": 2001408, "parameters": 2001408 // 4,
    }  # fmt: skip
    assert limits == [2]
    assert [c["test"] for c in run["cases"]] == ["pp6", "tg2", "pp6 @ d4", "tg2 @ d4"]
    for case in run["cases"]:
        assert len(case["seconds"]) == 3 and case["rates"] == [case["tokens"] / s for s in case["seconds"]]
        assert case["median"] == sorted(case["rates"])[1]
        assert [now["2"]["stream_gbs"] for now in case["roofs"]] == [20.0] * 3 and "peer" not in case and "ratio" not in case
        if case["kind"] == "tg":
            assert case["stream_fraction"] == pytest.approx(case["token_bytes"] * case["median"] / 20e9)
        else:
            assert "token_bytes" not in case


@pytest.mark.usefixtures("fixed_roofs")
def test_the_peer_does_what_ours_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fed: list[tuple[int, list[int]]]) -> None:
    """The same ids at the same positions, logits of the same tokens, as many threads, and no settings of our libraries."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fake, other = FakePeer(tmp_path), tmp_path / "other.gguf"
    options = ("-p", 600, "-n", 2, "-d", 3, "-r", 1, "--peer", fake.python, "--peer-model", other)
    (run,) = as_json("bench", gguf("deepseek_v3"), *REFERENCE, *options)["runs"]
    assert (run["peer"]["package"], run["peer"]["library"], run["peer"]["file"]) == ("9.9", "b1", str(other))
    (loaded,) = fake.notes("load")
    assert loaded == {"load": str(other), "environment": [], "n_gpu_layers": 0, "load_mode": 1}
    off, on = fake.notes("n_ctx")
    assert (off["flash_attn_type"], on["flash_attn_type"]) == (0, 1)
    assert off["n_ctx"] >= 603 and off["n_batch"] == off["n_ubatch"] == 512 and off["n_threads"] == off["n_threads_batch"] == 2
    assert (off["type_k"], off["type_v"], off["no_perf"]) == (1, 1, True)
    decodes = fake.notes("rows")
    assert all(note["n"] == len(note["rows"]) <= 512 for note in decodes)
    assert all(row[2:4] == [1, 0] for note in decodes for row in note["rows"])
    # begin in both contexts; then warm-ups in both and a round in the faster, of a prompt in two parts and of two tokens
    assert [note["context"] for note in decodes] == [1, 2, *(1, 1, 2, 2), *(1, 1, 2, 2), *(2, 2), *(2, 2)]
    steps = [fed[0], *fed[-3:]]
    assert [length for length, _ in steps] == [0, 3, 3, 4] and [len(ids) for _, ids in steps] == [3, 600, 1, 1]
    prompt = [row for note in decodes[10:12] for row in note["rows"]]
    assert [[row[0] for row in prompt], [row[1] for row in prompt]] == [steps[1][1], list(range(3, 603))]
    assert [row[4] for row in prompt] == [0] * 599 + [1]
    assert [note["rows"] for note in decodes[12:]] == [[[steps[2][1][0], 3, 1, 0, 1]], [[steps[3][1][0], 4, 1, 0, 1]]]
    assert [note["at"] for note in fake.notes("cut")] == [[0, 3, -1]] * 6
    for case in run["cases"]:
        assert case["peer"]["setting"] == "flash attention on" and case["peer"]["quiet"]
        assert case["peer"]["seconds"] == [1.0] and case["peer"]["rates"] == [case["tokens"]]
        assert case["ratio"] == pytest.approx(1 / case["seconds"][0])


@pytest.mark.usefixtures("fixed_roofs")
def test_a_peer_repeats_state_where_ours_is_random(tmp_path: Path) -> None:
    """The first 128 tokens are evaluated, their state is put behind them once more, and what is left is evaluated again."""
    fake = FakePeer(tmp_path)
    options = ("-p", 2, "-n", 0, "-d", 300, "-r", 1, "--fill", "random", "--peer", fake.python)
    (run,) = as_json("bench", gguf("deepseek_v3"), *REFERENCE, *options)["runs"]
    assert [(c["n_seq_max"], c["kv_unified"]) for c in fake.notes("n_ctx")] == [(2, True)] * 2
    first, second = ([note for note in fake.notes("rows") if note["context"] == context] for context in (1, 2))
    for decodes in (first, second):
        starts = [(note["rows"][0][1], len(note["rows"])) for note in decodes[:2]]
        assert starts == [(0, 128), (256, 44)]
    repeated = fake.notes("repeated")
    assert [note["context"] for note in repeated] == [1, 2]
    before = [[128 + row[1], row[0]] for row in first[0]["rows"]]
    assert repeated[0]["repeated"] == before == repeated[1]["repeated"]
    assert second[-1]["rows"][0][1] == 300 and run["cases"][0]["peer"]["seconds"] == [0.5]


@pytest.mark.usefixtures("fixed_roofs")
@pytest.mark.parametrize(
    ("mode", "said"), [("other state", "positions of tokens do not stand in it"), ("full", "does not take a state")]
)
def test_a_peer_whose_state_cannot_be_repeated(mode: str, said: str, tmp_path: Path) -> None:
    options = ("-p", 2, "-n", 0, "-d", 300, "-r", 1, "--fill", "random", "--peer", FakePeer(tmp_path, mode).python)
    result = tg("bench", gguf("deepseek_v3"), *REFERENCE, *options)
    assert result.exit_code == 1 and said in result.stderr


@pytest.mark.usefixtures("fixed_roofs")
def test_a_peer_without_flash_attention_goes_without(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "no flash")
    (run,) = as_json("bench", gguf("llama"), *REFERENCE, "-p", 2, "-n", 0, "-r", 1, "--peer", fake.python)["runs"]
    assert run["peer"]["flash_attn"] == ["off"] and run["cases"][0]["peer"]["setting"] == "flash attention off"


@pytest.mark.usefixtures("fixed_roofs")
def test_a_peer_that_cannot_forget_starts_again(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "recurrent")
    ok("bench", gguf("llama"), *REFERENCE, "-p", 2, "-n", 0, "-d", 3, "-r", 1, "--peer", fake.python)
    assert [len(note["rows"]) for note in fake.notes("rows")] == [3, 3, *(3, 2, 3, 2), *(3, 2)]


@pytest.mark.usefixtures("fixed_roofs")
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("broken", "llama_cpp cannot be imported: libllama.so is not there"),
        ("unreadable", "cannot load"),
        ("unreadable", "wrong magic"),
        ("small", "wanted a vocabulary of 512; got 5"),
        ("dies", "exit status 3 when asked to run: GGML_ASSERT failed"),
        ("refuses", "llama_decode returned 1; no slot"),
    ],
)
def test_a_peer_that_fails_is_a_sentence_and_an_exit_code(mode: str, said: str, tmp_path: Path) -> None:
    options = ("-p", 2, "-n", 2, "-r", 2, "--json", "--peer", FakePeer(tmp_path, mode).python)
    result = tg("bench", gguf("llama"), *REFERENCE, *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("tensorgraph: [peer] ") and said in line
    found = json.loads(result.stdout)
    assert found["errors"] == [line.removeprefix("tensorgraph: ")]
    assert [len(case["seconds"]) for case in found["runs"][0]["cases"]] == [2, 2]


@pytest.mark.usefixtures("fixed_roofs")
@pytest.mark.parametrize(("program", "said"), [("none/python", "No such file"), ("/bin/echo", "wanted a line of JSON")])
def test_a_peer_that_is_no_python_is_a_sentence(program: str, said: str, tmp_path: Path) -> None:
    result = tg("bench", gguf("llama"), *REFERENCE, "-p", 2, "-n", 2, "-r", 1, "--peer", tmp_path / program)
    assert result.exit_code == 1 and said in result.stderr and "pp2" in result.stdout


def test_ctrl_c_ends_at_once_and_leaves_no_child(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "hangs")
    arguments = ("bench", gguf("llama"), *REFERENCE, "-p", 2, "-n", 0, "-d", 1, "--peer", fake.python)
    program = [sys.executable, "-m", "tensorgraph.tools.cli", *map(str, arguments)]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (notes := fake.notes("pid")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130 and stdout == b"" and b"Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(notes[0]["pid"], 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--json", "--md"), "--json or --md"),
        (("-t", "many"), "'many'"),
        (("-t", 0), "'0'"),
        (("-t", 1, "-t", 2), "wanted one -t for reference, got 2"),
        (("--peer-model", "x.gguf"), "--peer-model goes with --peer"),
        (("smollm2", "--peer", "python", "--peer-model", "x.gguf"), "one MODEL"),
        (("-d", 100000), "wanted 100002"),
    ],
)
def test_what_cannot_be_is_a_sentence(arguments: tuple[object, ...], said: str) -> None:
    line = refused("bench", gguf("llama"), "--backend", "reference", "-p", 2, "-n", 2, *arguments)
    assert said in line


def test_nothing_to_measure_is_a_sentence() -> None:
    assert "-p or -n above 0" in refused("bench", gguf("llama"), *REFERENCE, "-p", 0, "-n", 0)


def test_models_and_backends_that_are_not_there_are_sentences(tmp_path: Path) -> None:
    assert "there is no file" in refused("bench", tmp_path / "none.gguf", "--backend", "reference")
    assert "'abacus'" in refused("bench", gguf("llama"), "--backend", "abacus")


def test_help_has_a_sentence_examples_and_every_option() -> None:
    text = ok("bench", "--help")
    assert "tensorgraph bench smollm2" in text and "bench" in ok("--help")
    options = [line for line in text.splitlines() if line.startswith("  -")]
    assert len(options) >= 13 and all(len(line.split()) > 2 for line in options)


def test_thread_counts_are_numbers_or_auto() -> None:
    assert command.thread_counts(["2", "auto", "02", "1"]) == [2, None, 1]


def test_the_ids_are_the_same_each_time() -> None:
    ids = command.random_ids(50, 7)
    assert ids == command.random_ids(50, 7) and set(ids) == set(range(7))


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with command.progress() as say:
        say("round 1")
    assert capsys.readouterr() == ("", "")
