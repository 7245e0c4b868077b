"""The guides in docs/, followed as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tensorgraph import registry
from tests.models import tiny
from tests.reference import reference_path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "from tensorgraph.tools.start import main; main()"


class Guide:
    """A page of docs/, whose files are written and whose commands are run in a folder."""

    def __init__(self, page: str, folder: Path) -> None:
        self.text, self.folder = (ROOT / "docs" / page).read_text(), folder

    def commands(self) -> list[list[str]]:
        """Its lines `    tensorgraph ...`, as arguments; not those that are another command's output, with a --case."""
        lines = re.findall(r"^    tensorgraph (.*)$", self.text, re.MULTILINE)
        return [shlex.split(line, comments=True) for line in lines if "--case" not in line]

    def blocks(self) -> list[tuple[str, str]]:
        """Its Python blocks, each with the file named in its first line."""
        return re.findall(r"```python\n# (\S+)\n(.*?)```", self.text, re.DOTALL)

    def write(self, path: str, content: str) -> None:
        """Write a file; a block that is indented takes the place of what begins and ends as it does."""
        file = self.folder / path
        if content.startswith(" "):
            lines, new = file.read_text().splitlines(), content.splitlines()
            at = lines.index(new[0])
            content = "\n".join([*lines[:at], *new, *lines[at + len(new) :]]) + "\n"
        file.write_text(content)

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return self._run(["-c", PROGRAM, *arguments])

    def _run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}:{self.folder / 'range'}:{ROOT}"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=environment, timeout=300)

    def python(self, path: str) -> str:
        """What a file prints that must succeed."""
        result = self._run([path])
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def ok(self, arguments: list[str]) -> str:
        result = self.run(arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


def installed(folder: Path, package: str) -> None:
    """What `pip install -e` leaves beside a plugin, so that its entry point is found."""
    (entry,) = re.findall(r"\[project.entry-points.*\]\n(.*)\n", (folder / "pyproject.toml").read_text())
    info = folder / f"{package}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[tensorgraph.plugins]\n" + entry.replace('"', "") + "\n")


def test_adding_an_op(tmp_path: Path) -> None:
    guide = Guide("adding-an-op.md", tmp_path)
    made, finds, *shown = guide.commands()
    declared, kernel, *mended = guide.blocks()
    guide.ok(made)
    installed(tmp_path / "range", "range_ops")

    def failure() -> str:
        result = guide.run([*finds, "--backend", "cpu", "--examples", "60", "--seed", "7"])
        assert result.returncode == 1, result.stdout + result.stderr
        return result.stdout

    assert finds == ["test-ops", "--op", "row_range"]
    assert "fill in the kernel of row_range" in failure()
    guide.write(*declared)
    guide.write(*kernel)
    told = re.findall(r"^    (reference: .*) \(error", guide.text, re.MULTILINE)
    for said, fix in zip(told, mended, strict=True):
        found = failure()
        assert said in found
        (line,) = re.findall(r"^tensorgraph test-ops (--backend cpu --case .*)$", found, re.MULTILINE)
        assert guide.run(["test-ops", *shlex.split(line)]).returncode == 1
        guide.write(*fix)
        assert "1 tested, 0 failed" in guide.ok(["test-ops", *shlex.split(line)])
    found = guide.ok([*finds, "--examples", "150"])  # a description holds for CUDA too, where its kernels can be run by the host
    assert re.search(r"^[12] tested, 0 failed$", found, re.MULTILINE) and ("cuda-host" in found) == ("2 tested" in found)
    described, perf, support, coverage = map(guide.ok, shown)
    assert "does_not_see_order" in described and "row_range_cpu.py" in described
    assert "row_range  cpu" in perf and "x f32[4096, 4096]" in perf
    assert [line.split() for line in support.splitlines()][1] == ["row_range", "x", "real", *["all"] * len([*registry.backends])]
    assert coverage.splitlines()[-1] == "1 ops, 0 without a kernel, a law or strided cases"


def test_adding_a_model(tmp_path: Path) -> None:
    guide = Guide("adding-a-model.md", tmp_path)
    (path, content), compare = guide.blocks()
    assert content == (ROOT / "tests/models/outside/smollm3.py").read_text()  # which its own test holds, layer by layer
    guide.write(path, content)
    guide.write(*compare)
    shutil.copytree(tiny.folder("smollm3"), tmp_path / "checkpoint")
    shutil.copy(reference_path("smollm3/reference.npz"), tmp_path)
    printed = guide.python(compare[0])
    errors = [float(error) for error in re.findall(r"^(?:reference|cpu), \d+ tokens a step: NMSE (\S+)$", printed, re.MULTILINE)]
    assert len(errors) == 6 and max(errors) <= 1e-9
    (tmp_path / "pyproject.toml").write_text('[project.entry-points."tensorgraph.plugins"]\nsmollm3 = "smollm3"\n')
    installed(tmp_path, "smollm3")
    planned, inspected = map(guide.ok, guide.commands())
    assert "smollm3" in inspected and "arena" in planned
