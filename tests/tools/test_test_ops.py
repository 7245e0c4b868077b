"""`tensorgraph test-ops`: its tables, its JSON, its exit codes."""

from __future__ import annotations

import json
import shlex

import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.tools import test_ops as command
from tensorgraph.tools.conformance.here import others
from tests.core.devices import StrictDevice
from tests.ops import kernel_devices as planted
from tests.ops.kernel_devices import KernelDevice, registered
from tests.tools.commands import as_json, ok, refused, tg


def test_help_has_examples_and_every_option() -> None:
    text = ok("test-ops", "--help")
    assert "tensorgraph test-ops --backend cpu --op mul_mat --op rms_norm --examples 300" in text
    for option in (
        "--op",
        "--backend",
        "--examples",
        "--seed",
        "--case",
        "--type",
        "-t, --threads",
        "--list",
        "--coverage",
        "--json",
    ):
        assert f"  {option} " in text
    assert "test-ops" in ok("--help")


def test_list_names_every_op_with_inputs_and_source() -> None:
    listed = as_json("test-ops", "--list")["ops"]
    assert [o["op"] for o in listed] == list(registry.ops)
    mul_mat = next(o for o in listed if o["op"] == "mul_mat")
    assert mul_mat == {"op": "mul_mat", "signature": str(registry.ops.get("mul_mat").signature), "source": "ggml_mul_mat"}
    lines = ok("test-ops", "--list").splitlines()
    assert len(lines) == len(listed) + 1 and lines[0].split()[:2] == ["op", "source"]
    assert any(line.startswith("flash_attn") and line.endswith("(by its shape rule)") for line in lines)


def test_the_reference_conforms_to_itself() -> None:
    text = ok("test-ops", "--op", "add", "--op", "top_k", "--backend", "reference", "--examples", 5, "--seed", 1)
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["op", "backend", "cases", "no", "kernel", "worst"]
    assert [(r[0], r[1], r[2], r[3], r[-1]) for r in rows[1:3]] == [
        ("add", "reference", "5", "0", "ok"),
        ("top_k", "reference", "5", "0", "ok"),
    ]
    assert text.splitlines()[-1] == "2 tested, 0 failed"


def test_every_backend_but_the_reference_by_default() -> None:
    with registered("strict", StrictDevice):
        results = as_json("test-ops", "--op", "neg", "--examples", 2)["results"]
    assert [r["backend"] for r in results] == sorted([*others(), "strict"])


def test_a_failure_is_told_and_is_the_exit_code() -> None:
    with registered("mistaken", lambda name: KernelDevice(name, finish=planted.last_element)):
        given = ("--op", "neg", "--op", "add", "--backend", "mistaken", "--examples", 30, "--seed", 4)
        text, told = tg("test-ops", *given), tg("test-ops", "--json", *given)
    assert (text.exit_code, told.exit_code) == (1, 1)
    assert "neg on mistaken, seed 4\nreference: differs first at [" in text.stdout and "  x = " in text.stdout
    assert text.stdout.splitlines()[-1] == "2 tested, 2 failed" and text.stderr == ""
    assert '"failed": 2' in told.stdout and '"worst": null' in told.stdout


def test_what_a_backend_has_no_kernel_for_is_said() -> None:
    with registered("strict", lambda name: StrictDevice(name, refused=("neg",))):
        text = ok("test-ops", "--op", "neg", "--backend", "strict", "--examples", 4)
        shown = tg("test-ops", "--coverage", "--op", "neg", "--op", "abs", "--backend", "strict")
        told = tg("test-ops", "--coverage", "--op", "neg", "--backend", "strict", "--json")
    assert text.splitlines()[1].split() == ["neg", "strict", "0", "4", "no", "kernel"]
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert (shown.exit_code, told.exit_code) == (1, 1)
    assert [row[:3] for row in rows[:3]] == [["op", "strict", "laws"], ["neg", "no", "1"], ["abs", "yes", "2"]]
    assert rows[-3:] == ["neg lacks a kernel on strict".split(), [], "2 ops, 1 without a kernel, a law or strided cases".split()]
    found = json.loads(told.stdout)
    assert found["coverage"] == {"neg": {"strict": {"how": "no", "supported": 0, "samples": 20}}}
    assert found["tests"]["neg"]["lacks"] == ["a kernel on strict"] and found["tests"]["neg"]["strided"] > 0


def test_no_op_lacks_a_kernel_a_law_or_strided_cases() -> None:
    last = ok("test-ops", "--coverage").splitlines()[-1]
    assert last == f"{len(list(registry.ops))} ops, 0 without a kernel, a law or strided cases"


def test_a_failing_case_runs_again_from_its_line() -> None:
    with registered("mistaken", lambda name: KernelDevice(name, finish=planted.tail_of_16)):
        text = tg("test-ops", "--op", "mul", "--backend", "mistaken", "--examples", 60, "--seed", 3).stdout
        (line,) = [line for line in text.splitlines() if line.startswith("tensorgraph test-ops ")]
        _, *arguments = shlex.split(line)
        again = tg(*arguments)
        told = json.loads(tg(*arguments, "--json").stdout)["results"][0]
    assert again.exit_code == 1 and "1 tested, 1 failed" in again.stdout and "differs first at [0]" in again.stdout
    assert told["failure"]["again"] == line and told["failure"]["text"] == arguments[-1]
    right = ok(*[a if a != "mistaken" else "cpu" for a in arguments])
    assert right.splitlines()[1].split()[:3] == ["mul", "cpu", "1"] and "1 tested, 0 failed" in right
    assert "wanted it alone" in refused(*arguments, "--seed", 4)
    other = {
        "--seed": (4, "perf"),
        "--case": ("neg(1)", "support"),
        "--examples": (7, "perf"),
        "--type": ("q4_0", "test"),
        "-t": (1, "test"),
    }
    for option, (value, mode) in other.items():
        assert "belongs to the mode" in refused("test-ops", mode, "--op", "neg", option, value)
    assert "wanted 7 values, as silu is declared now; got 8" in refused(
        "test-ops", "--case", 'silu([5], 7, "f32", 1, "nan", false, "dense", 1)'
    )
    assert "wanted values one, ties" in refused("test-ops", "--case", 'silu([5], 7, "f32", 1, "wat", false, "dense")')
    assert "wanted a case as mul is declared now" in refused("test-ops", "--case", 'mul("x", "y", 3, 4, 5, 6, 7)')
    for wrong in ("mul(", "mul", "mul(open)", "mul(1 + 1)", "mul(__import__('os'))", ""):
        assert "[case] wanted a line as a failing test prints it" in refused("test-ops", "--case", wrong)
    assert "[case] wanted a case as mul is declared now" in refused("test-ops", "--case", "mul([], 0)")
    assert "did you mean 'mul'?" in refused("test-ops", "--case", "mull([], 0)")


def test_a_terminal_is_told_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(command.sys, "stderr", terminal)
    with command._progress() as tell:
        tell("add on cpu (1 of 2)")
    assert "add on cpu (1 of 2)" in terminal.getvalue()


def test_unknown_names_are_refused_before_anything_runs() -> None:
    assert "did you mean 'rms_norm'?" in refused("test-ops", "--op", "add", "--op", "rms_nrom")
    assert "there is no 'nowhere'" in refused("test-ops", "--op", "add", "--backend", "nowhere")
