"""The shape of the repository: who imports whom, how long files are, and what they do not say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layout import PARTS, ROOT, package_folders, python_files, trespasses

STANDARD = frozenset(sys.stdlib_module_names)
TEXTS = {".py", ".md", ".toml", ".txt", ".yml", ".cu", ".cuh", ".in", ""}


def test_imports_follow_the_table() -> None:
    found = [line for path in python_files() for line in trespasses(path, (ROOT / path).read_text(), STANDARD)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("tensorgraph/graph.py", "from tensorgraph.ops import add", "may not import ops"),
        ("tensorgraph/graph.py", "def f():\n    from tensorgraph import models", "may not import models"),
        ("tensorgraph/graph.py", "from . import backends", "may not import backends"),
        ("tensorgraph/formats/q8_0.py", "from ..ops import add", "may not import ops"),
        ("tensorgraph/graph.py", "import tensorgraph", "facade"),
        ("tensorgraph/graph.py", "import tokenizers", "may import only"),
        ("ops/norm/rms_norm.py", "import tensorgraph.models.llama", "may not import models"),
        ("ops/norm/rms_norm.py", "from tensorgraph.backends.cpu import emit", "may not import backends"),
        ("ops/norm/rms_norm_cpu.py", "from tensorgraph.backends.cuda import emit", "may not import backends"),
        ("backends/reference/run.py", "from tensorgraph.ops.norms import rms_norm", "may not import ops"),
        ("models/llama.py", "from tensorgraph.tools import cli", "may not import tools"),
        ("models/llama.py", "from ops import add", "import tensorgraph.ops.add"),
        ("models/llama.py", "import torch", "may import only"),
        ("ops/norm/rms_norm.py", "from hypothesis import strategies", "may import only"),
    ],
)
def test_a_trespass_is_found(path: str, source: str, said: str) -> None:
    (found,) = trespasses(Path(path), source, STANDARD)
    assert said in found and found.startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tensorgraph/__init__.py", "import tensorgraph.ops"),
        ("tensorgraph/graph.py", "import json\nimport networkx\nfrom tensorgraph import errors\nfrom . import dtypes"),
        ("ops/norm/rms_norm.py", "import numpy\nfrom tensorgraph.dtypes import F32\nfrom tensorgraph.ops import add"),
        ("ops/norm/rms_norm.py", "def cases(draw):\n    from hypothesis import strategies"),
        ("ops/norm/rms_norm_cpu.py", "from tensorgraph.backends.cpu import emit"),
        ("models/text/chat.py", "import jinja2\nfrom tensorgraph.models import llama\nfrom tensorgraph.ops import add"),
        ("tools/cli.py", "import typer\nimport tensorgraph as tg\nfrom tensorgraph.models import llama"),
    ],
)
def test_what_the_table_allows(path: str, source: str) -> None:
    assert trespasses(Path(path), source, STANDARD) == []


def test_files_stay_under_400_lines() -> None:
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")]
    lengths = {path.as_posix(): len((ROOT / path).read_text().splitlines()) for path in [*python_files(), *tests]}
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}


def test_the_core_stays_within_4500_lines() -> None:
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "tensorgraph").rglob("*.py")) <= 4500


def test_every_folder_with_python_is_a_package() -> None:
    assert [folder for folder in package_folders().values() if not (ROOT / folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("part", PARTS)
def test_importing_a_folder_by_its_bare_name_says_what_to_write(part: str) -> None:
    bare = subprocess.run([sys.executable, "-c", f"import {part}"], cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode == 1
    assert f"ImportError: import tensorgraph.{part}, not {part}" in bare.stderr


@pytest.mark.parametrize("part", PARTS)
def test_an_uninstalled_checkout_works(part: str) -> None:
    """Isolated from an installed tensorgraph: only the checkout's root is put on the path, in front."""
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code += f"import tensorgraph.{part}; print(tensorgraph.{part}.__file__)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.returncode) == (str(ROOT / part / "__init__.py"), 0), ran.stderr


def test_no_text_names_a_path_outside_the_repository() -> None:
    outside = re.compile("|".join((r"(?<![\w.])/(work|root|home|Users)/\w", r"\.\./share" + "d/")))
    found = []
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        hidden = any(part.startswith(".") and part != ".ci" for part in relative.parts[:-1])
        if not hidden and path.is_file() and path.suffix in TEXTS:
            lines = path.read_text(errors="replace").splitlines()
            found += [f"{relative}:{number}: {line}" for number, line in enumerate(lines, 1) if outside.search(line)]
    assert not found, "\n".join(found)
