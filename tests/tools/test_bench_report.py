"""The tables of `tensorgraph bench`: one for all models, as text, in Markdown, on a terminal; and busy neighbours."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich import console

from tensorgraph.tools.bench import busy as neighbours
from tensorgraph.tools.bench import command, report
from tensorgraph.tools.bench.busy import NeighbourError, busy
from tensorgraph.tools.bench.cases import Case
from tensorgraph.tools.bench.report import Run
from tensorgraph.tools.bench.roofs import Roofs
from tensorgraph.tools.bench.rounds import Figures
from tests.layout import ROOT
from tests.tools.commands import as_json, gguf, ok
from tests.tools.fake_peer import FakePeer

MEASURED = {1: Roofs(10.0, 100.0, 400.0), 2: Roofs(20.0, 200.0, None)}
REFERENCE = ("--backend", "reference", "-t", 2)
ABOUT = {
    "rounds": 3, "kv_type": "f16", "exact": False, "busy": 0, "versions": {"tensorgraph": "0", "numpy": "2"},
    "machine": {"processor": "P", "cores": 2, "features": ["avx2"], "load": 1.25},
}  # fmt: skip
PEER = {"package": "9.9", "library": "b1", "type": "q4_0"}


@pytest.fixture(autouse=True)
def _fixed_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.options, "limit_threads", lambda count: None)
    monkeypatch.setattr(command, "roofs_now", lambda threads: {n: MEASURED[n] for n in sorted({1, threads})})


def run_of(name: str, threads: int, peer_file: str | None, peer_s: float = 0.5) -> Run:
    """pp8 in 2 s and tg4 in 1 s, which reads 2.5 GB a token; the peer's in as many `peer_s`."""
    figures = [
        Figures(case, [s] * 3, [s * peer_s] * 3 if peer_file else [], [MEASURED] * 3, "flash attention on" if peer_file else "")
        for case, s in ((Case("pp", 8), 2.0), (Case("tg", 4), 1.0))
    ]
    model = {"name": name, "file": f"{name}.gguf", "type": "q4_1", "size_bytes": 3 << 20, "parameters": 2_500_000}
    peer = {**PEER, "file": peer_file} if peer_file else None
    return Run(model, "cpu", str(threads), threads, figures, {"tg4": 2_500_000_000}, peer)


def test_one_table_has_a_row_a_model_threads_and_test() -> None:
    runs = [run_of(name, threads, f"{name}.gguf") for name in ("a", "b-q4_1") for threads in (1, 2)]
    head, *rows = report.table_rows(runs)
    assert head == ("model", "size", "params", "threads", "test", "t/s", "peer t/s", "ratio", "read")
    assert [(row[0], *row[3:5]) for row in rows] == [
        (name, threads, test) for name in ("a q4_1", "b-q4_1") for threads in ("1", "2") for test in ("pp8", "tg4")
    ]
    assert rows[0][1:3] == ("3.0 MiB", "2.5 M") and rows[0][5:] == ("4.00 ± 0.00", "8.00 ± 0.00", "0.50", "-")
    assert rows[1][5:] == ("4.00 ± 0.00", "8.00 ± 0.00", "0.50", "10.0 GB/s 100%") and rows[3][-1] == "10.0 GB/s  50%"
    alone = [run_of("a", 1, None)]
    assert report.table_rows(alone)[0] == ("model", "size", "params", "threads", "test", "t/s", "read")


def test_other_weights_of_the_peer_are_a_column() -> None:
    runs = [run_of("a", 1, "a.gguf"), run_of("a", 1, "other.gguf")]
    head, *rows = report.table_rows(runs)
    assert head[6] == "peer's" and {row[6] for row in rows} == {"q4_0"}
    assert "peer of a: other.gguf, q4_0" in report.notes(runs, ABOUT)


def test_notes_say_each_thing_once() -> None:
    runs = [run_of("a", 1, "a.gguf"), run_of("b", 2, "b.gguf")]
    runs[1].figures[1].peer_setting, runs[1].figures[0].ours_quiet = "flash attention off", False
    assert report.notes(runs, {**ABOUT, "busy": 2}) == [
        "median ± median absolute deviation of 3 rounds, after a warm-up; ratio: the median of the rounds' ratios",
        "meanwhile each of 2 other processes kept a core busy, beside both sides",
        "machine: P, 2 cores, avx2; a load of 1.2 before",
        "versions: tensorgraph 0, numpy 2",
        "backend cpu, rows f16",
        "peer: llama-cpp-python 9.9 (llama.cpp b1)",
        "peer: flash attention on; flash attention off in b tg4 on 2 threads",
        "note: our threads kept running after b pp8 on 2 threads, so the other side was disturbed",
    ]
    assert "meanwhile another process kept a core busy, beside both sides" in report.notes(runs, {**ABOUT, "busy": 1})


def test_markdown(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path)
    lines = ok("bench", gguf("llama"), *REFERENCE, "-p", 2, "-n", 0, "-r", 1, "--md", "--peer", fake.python).splitlines()
    assert lines[:2] == ["| model | size | params | threads | test | t/s | peer t/s | ratio |", "| :-- |" + " --: |" * 7]
    assert len(lines[2].split("|")) == 10 and "- peer: llama-cpp-python 9.9 (llama.cpp b1)" in lines
    assert lines[-3:] == ["| --: | --: | --: | --: |", "| 1 | 10.0 | 100 | 400 |", "| 2 | 20.0 | 200 | - |"]


def test_text_for_pipes() -> None:
    lines = ok("bench", gguf("llama"), gguf("llama"), *REFERENCE, "-p", 6, "-n", 2, "-d", 4, "-r", 1).splitlines()
    assert lines[0].split() == ["model", "size", "params", "threads", "test", "t/s", "read"]
    assert [line.split()[:6] for line in lines[1:3]] == [["llama-f32", "1.9", "MiB", "0.5", "M", "2"]] * 2
    assert ["pp6 @ d4" in line for line in lines[1:5]] == [True, False] * 2 and lines[2].endswith("%") and lines[5] == ""
    assert lines[-1].split() == ["2", "20.0", "200", "-"]


@pytest.mark.parametrize("width", [60, 200])
def test_a_terminal_gets_whole_cells(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = console.Console
    monkeypatch.setattr(console, "Console", lambda **options: real(**options, width=width, force_terminal=True))
    report.show([run_of("a-model-of-a-long-name", 1, "x.gguf"), run_of("b", 2, "b.gguf", 3.0)], ABOUT)
    out = capsys.readouterr().out
    assert "a-model-of-a-long-name q4_1" in out and "10.0 GB/s 100%" in out and "…" not in out
    assert "\x1b[1;31m0.50" in out and "\x1b[1;32m3.00" in out
    assert "median ± median absolute deviation of 3 rounds, after a warm-up; ratio" in out


def test_a_peer_may_have_several_files(tmp_path: Path) -> None:
    fake, other = FakePeer(tmp_path), gguf("qwen3")
    arguments = ("-p", 2, "-n", 0, "-r", 1, "--peer", fake.python, "--peer-model", gguf("llama"), "--peer-model", other)
    runs = as_json("bench", gguf("llama"), *REFERENCE, *arguments)["runs"]
    assert [run["peer"]["file"] for run in runs] == [str(gguf("llama")), str(other)] == [n["load"] for n in fake.notes("load")]
    assert [run["peer"]["type"] for run in runs] == ["f32", "f32"]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Started:
    """The processes that `busy` starts in this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        real = subprocess.Popen

        def popen(*arguments: Any, **options: Any) -> Any:
            self.processes.append(real(*arguments, **options))
            return self.processes[-1]

        monkeypatch.setattr(neighbours.subprocess, "Popen", popen)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_neighbours_are_there_until_the_block_ends(error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    try:
        with busy(2):
            assert [process.poll() for process in started.processes] == [None, None]
            if error is not None:
                raise error
    except BaseException as raised:
        assert type(raised) is error
    assert [process.returncode for process in started.processes] == [-signal.SIGKILL] * 2


def test_a_neighbour_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "LOOP", "raise SystemExit(3)")
    started = Started(monkeypatch)
    with pytest.raises(NeighbourError, match=r"wanted 1 busy processes to the end; 1 ended before, with \[3\]"), busy(1):
        started.processes[0].wait()


def test_neighbours_end_with_a_process_that_is_killed() -> None:
    code = (
        "import os, subprocess, sys, time\nfrom tensorgraph.tools.bench import busy\nreal = subprocess.Popen\n"
        "def popen(*a, **k):\n    p = real(*a, **k)\n    print(p.pid, flush=True)\n    return p\n"
        "busy.subprocess.Popen = popen\nwith busy.busy(2):\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = [int(process.stdout.readline()) for _ in range(2)]
        assert all(map(running, found))
        process.kill()
    end = time.monotonic() + 60
    while any(map(running, found)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(running, found))


def test_both_sides_are_measured_beside_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    alive: list[list[int | None]] = []
    real = command.roofs_now

    def look(threads: int) -> Any:
        alive.append([process.poll() for process in started.processes])
        return real(threads)

    monkeypatch.setattr(command, "roofs_now", look)
    arguments = ("-p", 2, "-n", 1, "-r", 2, "--busy", 3, "--peer", FakePeer(tmp_path).python)
    found = as_json("bench", gguf("llama"), *REFERENCE, *arguments)
    assert found["busy"] == 3 and len(found["runs"][0]["cases"][0]["peer"]["seconds"]) == 2
    assert [states[:3] for states in alive] == [[None] * 3] * 2
    assert [process.returncode for process in started.processes[:3]] == [-signal.SIGKILL] * 3
    assert "another process kept a core busy" in ok("bench", gguf("llama"), *REFERENCE, "-p", 1, "-n", 0, "-r", 1, "--busy", 1)


def test_neighbours_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come to processor time, which a process that sleeps never does."""
    started = Started(monkeypatch)
    with busy(1):
        stat, end = Path(f"/proc/{started.processes[0].pid}/stat"), time.monotonic() + 60
        while (ticks := int(stat.read_text().rpartition(")")[2].split()[11])) < 30 and time.monotonic() < end:
            time.sleep(0.01)
        assert ticks >= 30
