"""The conformance of ops, and steps of a model, under sanitizers of addresses and of undefined behaviour."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.backends.cuda.host import HostDevice
from tensorgraph.backends.cuda.host_compiler import sanitizer_environment
from tensorgraph.errors import UnsupportedError
from tests.models import tiny
from tests.tools.commands import arrays, gguf

pytestmark = pytest.mark.usefixtures("compiler")
BACKEND = "cuda-host:sanitized"
TOGETHER = 12  # processes, each of which starts and builds for some ops


def program(*given: object) -> subprocess.CompletedProcess[str]:
    """Run tensorgraph with the sanitizers in its process."""
    command = [sys.executable, "-m", "tensorgraph.tools.cli", *map(str, given), "--backend", BACKEND]
    environment = os.environ | sanitizer_environment()
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.deep
@pytest.mark.parametrize("part", range(TOGETHER))
def test_ops(part: int) -> None:
    ops = list(registry.ops)[part::TOGETHER]
    done = program("test-ops", "--examples", 2, *(word for op in ops for word in ("--op", op)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if BACKEND in line] == ops


@pytest.mark.deep
@pytest.mark.parametrize("architecture", ["llama", "deepseek_v32"])
def test_steps(architecture: str, tmp_path: Path) -> None:
    """A prompt in two chunks, then tokens one by one."""
    stored, n = tiny.reference(architecture), 26
    (tmp_path / "ids.json").write_text(json.dumps(stored["input_ids"][:n].tolist()))
    given = ("--ids", tmp_path / "ids.json", "--prefill", 22, "--chunk", 19, "--out", tmp_path / "out.npz", "--exact")
    done = program("logits", gguf(architecture), *given, "--kv-type", "f32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert tiny.nmse(arrays(tmp_path / "out.npz")["logits"], stored["logits"][:n]) <= 1e-9


def test_without_the_sanitizers_it_says_how_to_start() -> None:
    with pytest.raises(UnsupportedError, match="wanted the sanitizers in the process; start it with LD_PRELOAD='.*libasan"):
        HostDevice(BACKEND)
    with pytest.raises(UnsupportedError, match="wanted cuda-host or cuda-host:sanitized; got 'cuda-host:1'"):
        HostDevice("cuda-host:1")
