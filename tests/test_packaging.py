"""Wheel, sdist, editable install and console script, each built from a copy of the checkout and used on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.layout import FOLDERS, PARTS, ROOT, installed_parts, package_folders, python_files

OTHERS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "Makefile",
          "requirements", "docs", ".ci", ".gitattributes", ".gitignore")  # fmt: skip
USE = """
import importlib.util, pathlib, tensorgraph
for part in ("ops", "backends", "models", "tools"):
    module = importlib.import_module("tensorgraph." + part)
    print(pathlib.Path(module.__file__).resolve())
    assert importlib.util.find_spec(part) is None, part
print(tensorgraph.__version__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must succeed."""
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd)}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_checkout(folder: Path) -> Path:
    """The checkout without what git ignores and without the packed data."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in OTHERS:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, folder / "tests")
    return folder


def build(source: Path, target: Path) -> Path:
    """The wheel of a source folder or sdist, without reaching any registry."""
    options = ("-q", "--no-deps", "--no-build-isolation", "-w", target)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source.parent)
    (wheel,) = target.glob("*.whl")
    return wheel


def bare_environment(folder: Path) -> Path:
    """The programs of a new virtual environment that finds this one's packages after its own."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def install(binaries: Path, *what: str | Path) -> None:
    options = ("-q", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    run(binaries / "python", "-m", "pip", "install", *options, *what, cwd=binaries)


def declared() -> dict[str, Any]:
    listed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return listed


def test_the_package_list_is_the_disk() -> None:
    block = "packages = [\n" + "".join(f'    "{name}",\n' for name in sorted(package_folders())) + "]"
    assert declared()["packages"] == sorted(package_folders()), f"in pyproject.toml write\n{block}"


def test_the_package_folders_are_mapped() -> None:
    mapped = {f"tensorgraph.{part}": part for part in PARTS}
    assert declared()["package-dir"] == {"tensorgraph": "tensorgraph", **mapped}


def test_a_wheel_holds_every_module_and_nothing_deleted(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    stale = checkout / "build/lib/tensorgraph/ghost/__init__.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    doomed = checkout / "ops/doomed.py"
    doomed.write_text("")
    assert "tensorgraph/ops/doomed.py" in zipfile.ZipFile(build(checkout, tmp_path / "first")).namelist()
    doomed.unlink()
    wheel = build(checkout, tmp_path / "second")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    installed = {"/".join(installed_parts(path)) for path in python_files()}
    assert {name for name in names if name.endswith(".py")} == installed
    assert {name.split("/")[0] for name in names} == {"tensorgraph"} and "tensorgraph/py.typed" in names

    binaries = bare_environment(tmp_path / "env")
    install(binaries, wheel)
    printed = run(binaries / "python", "-c", USE, cwd=tmp_path).split()
    site = (binaries.parent / "lib").resolve()
    assert all(Path(line).is_relative_to(site) for line in printed[: len(PARTS)]) and printed[len(PARTS) :] == ["0.1.0"]
    assert "Usage" in run(binaries / "tensorgraph", "--help", cwd=tmp_path)


def test_an_sdist_holds_the_tests_and_builds_the_same_wheel(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    wanted = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    name = run(sys.executable, "-c", code, cwd=checkout).split()[-1]
    with tarfile.open(checkout / "dist" / name) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers()}
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert wanted <= held
    assert not [path for path in held if path.endswith(".pyc")]
    (source,) = (tmp_path / "unpacked").iterdir()
    first = zipfile.ZipFile(build(checkout, tmp_path / "a")).namelist()
    assert sorted(zipfile.ZipFile(build(source, tmp_path / "b")).namelist()) == sorted(first)


@pytest.mark.parametrize("changed", [False, True])
def test_an_editable_install_reads_the_checkout(tmp_path: Path, changed: bool) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    binaries = bare_environment(tmp_path / "env")
    install(binaries, "-e", checkout)
    if changed:  # an edit counts at once
        facade = checkout / "tensorgraph/__init__.py"
        facade.write_text(facade.read_text().replace('"0.1.0"', '"0.1.0+edited"'))
    printed = run(binaries / "python", "-c", USE, cwd=tmp_path).split()
    assert printed[: len(PARTS)] == [str(checkout / part / "__init__.py") for part in PARTS]
    assert printed[len(PARTS) :] == ["0.1.0+edited" if changed else "0.1.0"]
    assert "Usage" in run(binaries / "tensorgraph", "--help", cwd=tmp_path)
