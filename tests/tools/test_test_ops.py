"""`tensorgraph test-ops`: its tables, its JSON, its exit codes."""

from __future__ import annotations

import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.tools import test_ops as command
from tests.core.devices import StrictDevice
from tests.ops import kernel_devices as planted
from tests.ops.kernel_devices import KernelDevice, registered
from tests.tools.commands import as_json, ok, refused, tg


def test_help_has_examples_and_every_option() -> None:
    text = ok("test-ops", "--help")
    assert "tensorgraph test-ops --backend cpu --op mul_mat --op rms_norm --examples 300" in text
    for option in ("--op", "--backend", "--examples", "--seed", "--list", "--coverage", "--json"):
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
    others = [name for name in registry.backends if name != "reference"]
    with registered("strict", StrictDevice):
        results = as_json("test-ops", "--op", "neg", "--examples", 2)["results"]
    assert [r["backend"] for r in results] == sorted([*others, "strict"])


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
        coverage = ok("test-ops", "--coverage", "--op", "neg", "--op", "abs", "--backend", "strict").splitlines()
        nested = as_json("test-ops", "--coverage", "--op", "neg", "--backend", "strict")["coverage"]
    assert text.splitlines()[1].split() == ["neg", "strict", "0", "4", "no", "kernel"]
    assert [line.split() for line in coverage] == [["op", "strict"], ["neg", "no"], ["abs", "yes"]]
    assert nested == {"neg": {"strict": {"how": "no", "supported": 0, "samples": 20}}}


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
