"""`tensorgraph new-op`: the files that it writes, and what it does not touch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layout import ROOT
from tests.tools.commands import as_json, ok, refused


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout."""
    for name in (
        "ops/__init__.py",
        "ops/reduce/__init__.py",
        "ops/elementwise/__init__.py",
        "tensorgraph/op.py",
        "pyproject.toml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(path: Path) -> tuple[list[str], list[str]]:
    """What a family's `__init__.py` imports, in order, and what is in its `__all__`."""
    body = ast.parse(path.read_text()).body
    imports = [f"{n.module}.{alias.name}" for n in body if isinstance(n, ast.ImportFrom) for alias in n.names]
    listed = next(ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign))
    return [name for name in imports if not name.startswith("__future__")], listed


@pytest.mark.parametrize("family", ["reduce", "elementwise"])
def test_into_a_checkout(family: str, checkout: Path) -> None:
    path = checkout / "ops" / family / "__init__.py"
    imports, listed = names(path)
    told = as_json("new-op", "halved", "--family", family)
    assert told["files"] == [f"ops/{family}/halved.py", f"ops/{family}/halved_cpu.py", f"ops/{family}/__init__.py"]
    new_imports, new_listed = names(path)
    assert new_listed == sorted([*listed, "halved"])
    assert sorted(new_imports) == sorted([*imports, f"tensorgraph.ops.{family}.halved.halved"])
    modules = [name.rpartition(".")[0] for name in new_imports]
    assert modules == sorted(modules)
    kernel = (checkout / f"ops/{family}/halved_cpu.py").read_text()
    assert f"from tensorgraph.ops.{family}.halved import halved" in kernel and "@cpu_formula(halved)" in kernel
    assert told["next"][-1] == "Then renew the documentation: tensorgraph ops --markdown > docs/ops.md" and len(told["next"]) == 2
    checked = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--quiet",
        "--ignore",
        "F401",
        "--config",
        str(ROOT / "pyproject.toml"),
        "ops",
    ]
    assert subprocess.run(checked, capture_output=True, text=True, cwd=checkout).stdout == ""


def test_a_new_family_is_said_to_need_a_line(checkout: Path) -> None:
    text = ok(
        "new-op", "halved", "--family", "halves", "--signature", "x[..., N]: real, w[N]?: real, ids[T]: int -> y[..., 1]: x"
    )
    assert 'The family is new: add "tensorgraph.ops.halves" to packages in pyproject.toml' in text
    declared = (checkout / "ops/halves/halved.py").read_text()
    assert "def reference(x: Array, w: Array | None, ids: Array) -> Array:" in declared
    assert '"x[..., N]: real, w[N]?: real, ids[T]: int -> y[..., 1]: x",' in declared
    kernel = (checkout / "ops/halves/halved_cpu.py").read_text()
    assert "def emit(k: Kernel, x: Operand, w: Operand | None, ids: Operand, y: Operand) -> None:" in kernel
    assert "from tensorgraph.ops.halves.halved import halved" in (checkout / "ops/halves/__init__.py").read_text()


def test_nothing_is_lost(checkout: Path) -> None:
    (checkout / "ops/reduce/halved_cpu.py").write_text("mine")
    before = (checkout / "ops/reduce/__init__.py").read_text()
    assert "ops/reduce/halved_cpu.py must not be there yet" in refused("new-op", "halved", "--family", "reduce")
    assert (checkout / "ops/reduce/halved_cpu.py").read_text() == "mine"
    assert not (checkout / "ops/reduce/halved.py").exists() and (checkout / "ops/reduce/__init__.py").read_text() == before


def test_names_and_places_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "wanted to be run at the root of a checkout of tensorgraph, or --package" in refused("new-op", "a", "--family", "f")
    for name in ("Upper", "lambda", "1st", "a-b", "../a"):
        assert "NAME must be a lower-case Python name" in refused("new-op", name, "--family", "f", "--package", tmp_path)
        assert "--family must be a lower-case Python name" in refused("new-op", "a", "--family", name, "--package", tmp_path)
    assert "there is an op 'add' already" in refused("new-op", "add", "--family", "f", "--package", tmp_path)
    assert "must not end like a kernel's file" in refused("new-op", "a_cpu", "--family", "f", "--package", tmp_path)
    assert "signature" in refused("new-op", "a", "--family", "f", "--package", tmp_path, "--signature", "x -> y")
    assert list(tmp_path.iterdir()) == []


def test_a_package_grows(tmp_path: Path) -> None:
    ok("new-op", "first", "--family", "mine", "--package", tmp_path)
    project = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project + "# mine\n")
    text = ok("new-op", "another", "--family", "mine", "--package", tmp_path)
    assert (tmp_path / "pyproject.toml").read_text() == project + "# mine\n" and "pyproject.toml" not in text
    imports = [line for line in (tmp_path / "mine/__init__.py").read_text().splitlines() if line.startswith("from mine")]
    assert imports == ["from mine.another import another", "from mine.first import first"]


def test_a_second_family_of_a_package_is_said_to_need_lines(tmp_path: Path) -> None:
    ok("new-op", "first", "--family", "mine", "--package", tmp_path)
    project = tmp_path / "pyproject.toml"
    before = project.read_text()
    assert as_json("new-op", "second", "--family", "mine", "--package", tmp_path)["next"][1].startswith("Make the plugin known")
    told = as_json("new-op", "third", "--family", "other", "--package", tmp_path)["next"]
    assert told[1:3] == [
        f'The family is new: add "other" to packages in {project}',
        f'The family is new: add other = "other" to [project.entry-points."tensorgraph.plugins"] in {project}',
    ]
    assert project.read_text() == before
    both = before.replace('["mine"]', '["mine", "other"]').replace('mine = "mine"', 'mine = "mine"\nother = "other"')
    project.write_text(both)
    assert len(as_json("new-op", "fourth", "--family", "other", "--package", tmp_path)["next"]) == 2
    project.write_text("[tool.setuptools.packages.find]\n")
    assert len(as_json("new-op", "fifth", "--family", "other", "--package", tmp_path)["next"]) == 3


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("k[N]: real -> z[N]: k", "each a Python name of its own, and not k, run or y, which the files use themselves; got 'k'"),
        ("x[N]: real, y[N]: x -> z[N]: x", "got 'y'"),
        ("lambda[N]: real -> y[N]: f32", "got 'lambda'"),
        ("1x[N]: real -> y[N]: f32", "got '1x'"),
        ("x[N]: real, x[N]: real -> y[N]: x", "got 'x'"),
        ("x[..., N]: real -> y[..., M]: x", "M in the result of --signature must be an axis or type of an input"),
        ("-> y[N]: f32", "N in the result of --signature must be"),
        ("-> y[...]: f32", "... in the result of --signature must be"),
        ("x[...]: real -> y[...]: dtype", "dtype in the result of --signature must be"),
        ("x[...]: real -> y[...]: real", "real in the result of --signature must be"),
    ],
)
def test_signatures_that_cannot_be_are_refused(signature: str, said: str, tmp_path: Path) -> None:
    assert said in refused("new-op", "a", "--family", "f", "--package", tmp_path, "--signature", signature)
    assert list(tmp_path.iterdir()) == []
