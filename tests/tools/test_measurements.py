"""Measurements that are kept: their models, and what is written of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tensorgraph.models.text.gguf_writer import NewTensor
from tensorgraph.tools import gguf_output
from tensorgraph.tools.bench import command, measurements
from tensorgraph.tools.bench.cases import Case
from tensorgraph.tools.bench.measurements import MEASUREMENTS, TYPES, Made, Measurement
from tensorgraph.tools.bench.roofs import Roofs
from tests.tools.commands import gguf, ok
from tests.tools.fake_peer import FakePeer


def tensors_of(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, NewTensor]:
    """What the file would hold, which is not written."""
    seen: list[Sequence[NewTensor]] = []

    def remember(command: str, out: Path, metadata: Any, tensors: Sequence[NewTensor], content: Any) -> int:
        seen.append(tensors)
        return 0

    monkeypatch.setattr(gguf_output, "write_file", remember)
    ok(*(str(tmp_path / "out.gguf") if word == measurements.OUT else word for word in made.words))
    return {tensor.name: tensor for tensor in seen[0]}


def made_by(name: str) -> list[Made]:
    return [source for pair in MEASUREMENTS[name].pairs for source in dict.fromkeys(pair) if isinstance(source, Made)]


@pytest.mark.parametrize("made", [m for m in made_by("types") if m.name.startswith("llama")], ids=lambda made: str(made.name))
def test_every_matrix_is_of_the_type(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = tensors_of(made, monkeypatch, tmp_path).values()
    assert {str(t.dtype) for t in tensors if len(t.shape) > 1} == {made.name.removeprefix("llama-")} <= {*TYPES}
    assert f"{sum(math.prod(t.shape) for t in tensors) / 1e6:.0f} million parameters" in MEASUREMENTS["types"].text
    assert "output.weight" in {t.name for t in tensors}


def test_the_mixture_chooses_8_of_64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = tensors_of(measurements.MIXTURE, monkeypatch, tmp_path)
    assert tensors["blk.3.ffn_up_exps.weight"].shape == (64, 768, 2048) and "blk.4.attn_q.weight" not in tensors
    assert str(tensors["blk.3.ffn_up_exps.weight"].dtype) == "q4_k"


@pytest.mark.parametrize("made", made_by("heads"), ids=lambda made: str(made.name))
def test_heads_are_nearly_all_that_is_read(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = tensors_of(made, monkeypatch, tmp_path)
    head = tensors["token_embd.weight"]  # which is the head, too
    assert "output.weight" not in tensors and made.name == f"head-{head.shape[0]}x{head.shape[1]}-{head.dtype}"
    assert 0.98 < head.size_bytes / sum(t.size_bytes for t in tensors.values()) < 0.995


def test_the_peer_s_best_type_is_that_of_the_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (made,) = made_by("smollm2")
    matrices = {t.name: str(t.dtype) for t in tensors_of(made, monkeypatch, tmp_path).values() if len(t.shape) > 1}
    assert {kind for name, kind in matrices.items() if name.startswith("blk.")} == {"q4_0"}
    assert matrices["token_embd.weight"] == "q8_0"


def test_files_are_made_once_and_again_for_other_words(tmp_path: Path) -> None:
    made = Made("tiny", ("quantize", str(gguf("llama")), measurements.OUT, "--type", "q8_0"))
    path = Path(made.make(tmp_path))
    before = path.stat()
    assert path.name == "tiny.gguf" and Path(made.make(tmp_path)) == path
    assert path.stat() == before and made.path(tmp_path) != Made("tiny", (*made.words[:-1], "q4_0")).path(tmp_path)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """A measurement of a small model with the fake peer's clock."""
    made = Made("llama-q8_0", ("quantize", str(gguf("llama")), measurements.OUT, "--type", "q8_0"))
    found = Measurement("bench-tiny", "A title", "A text.", [(made, made)], [Case("pp", 4), Case("tg", 2)], ("2",), 3, 1)
    monkeypatch.setitem(MEASUREMENTS, "tiny", found)
    monkeypatch.setattr(command, "roofs_now", lambda threads: {n: Roofs(10.0 * n, 100.0, None) for n in (1, 2)})
    return found


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "") -> int:
    """The program's exit code."""
    folders = ("--record", str(tmp_path / "record"), "--cache", str(tmp_path / "cache"))
    words = ["measurements", "tiny", "--peer", str(FakePeer(tmp_path, mode).python), *folders]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        measurements.main()
    return int(ended.value.code or 0)


def test_the_page_and_its_figures(tiny: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(tmp_path, monkeypatch) == 0
    lines = (tmp_path / "record/tiny.md").read_text().splitlines()
    assert lines[:5] == ["# A title", "", "A text.", "", "    make bench-tiny PEER=python-with-llama-cpp-python"]
    assert lines[6].startswith("Measured 20")
    assert lines[8] == "| model | size | params | threads | test | t/s | peer t/s | ratio | read |"
    assert [line.split("|")[1:6:4] for line in lines[10:12]] == [[" llama-q8_0 ", " pp4 "], [" llama-q8_0 ", " tg2 "]]
    assert any("another process kept a core busy" in line for line in lines)
    assert str(tmp_path) not in "\n".join(lines)
    found = json.loads((tmp_path / "record/tiny.json").read_text())
    assert found["name"] == "tiny" and found["command"].startswith("make bench-tiny ") and found["busy"] == 1
    assert [len(case["seconds"]) for case in found["runs"][0]["cases"]] == [3, 3] and found["machine"]["cores"] >= 1
    assert len((tmp_path / "record/tiny.json").read_text().splitlines()) == len(found) + 2 + 2


def test_without_its_peer_nothing_is_written(tiny: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(tmp_path, monkeypatch, "dies") == 1
    assert not (tmp_path / "record").exists()
