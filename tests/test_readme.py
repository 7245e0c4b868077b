"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(source: str) -> str:
    result = subprocess.run([sys.executable, "-"], input=source, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_graph_example_runs_and_is_short() -> None:
    assert len(EXAMPLES[0].splitlines()) <= 30
    out = run(EXAMPLES[0])
    assert "snake(" in out and "arena reference:" in out
    assert re.findall(r"^\((\d+), 64\)$", out, re.MULTILINE) == ["1", "7", "512"]
    assert re.search(r"\[mul_mat\] b must be .*64.*got \[T, 63\]", out)


def test_the_kernel_example_computes_what_the_reference_does() -> None:
    check = """
from tensorgraph.compiler import run_op
values = np.linspace(-3, 3, 37, dtype=np.float32)
native, meant = (run_op("snake", values, a=2.0, backend=name) for name in ("cpu", "reference"))
print("off by", np.abs(native - meant).max())
"""
    off = re.search(r"off by (\S+)", run(EXAMPLES[0] + EXAMPLES[3] + check))
    assert off is not None and 0 <= float(off[1]) < 1e-6


def test_the_model_example_generates_text() -> None:
    assert "Paris" in run(EXAMPLES[1])


def test_the_checking_example_agrees() -> None:
    out = run(EXAMPLES[4])
    assert "cpu beside reference, exact, 1 step: 2 nodes agree" in out and "cpu beside cpu, exact, 1 step: no difference" in out


def test_the_encoder_example_says_which_texts_are_alike() -> None:
    (a, b, c), (_, d, e), _ = [[float(x) for x in re.findall(r"-?\d[\d.e-]*", row)] for row in run(EXAMPLES[2]).splitlines()]
    assert a == pytest.approx(1, abs=1e-5) and d == pytest.approx(1, abs=1e-5) and b > 0.3 > max(c, e)


@pytest.mark.parametrize("folder", ["tensorgraph", "ops", "backends", "models", "testing", "tools", "tests"])
def test_the_folders_of_the_table_are_there(folder: str) -> None:
    assert f"`{folder}/`" in (ROOT / "README.md").read_text() and (ROOT / folder).is_dir()
