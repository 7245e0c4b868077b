"""The packed reference data: everything unpacks to what the manifest says, small enough, and with clear errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import reference
from tests.reference import DATA, manifest, reference_path, unpack


@pytest.mark.parametrize("name", sorted(manifest()))
def test_every_file_unpacks_to_its_digest(name: str) -> None:
    content, entry = reference_path(name).read_bytes(), manifest()[name]
    assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size_bytes"], entry["sha256"])


def test_small_files_are_given_as_they_are() -> None:
    assert reference_path("llama/config.json") == DATA / "llama/config.json"


def test_an_absent_name_is_said() -> None:
    with pytest.raises(FileNotFoundError, match="no 'llama/nothing.gguf'"):
        reference_path("llama/nothing.gguf")


def test_damage_is_noticed_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "data" / "numbers.npz.xz"
    packed.parent.mkdir()
    shutil.copy(DATA / manifest()["ops/reduce.npz"]["packed"], packed)
    entry = {"packed": packed.name, "size_bytes": len(unpack(packed)), "sha256": "0" * 64}
    monkeypatch.setattr(reference, "DATA", packed.parent)
    monkeypatch.setattr(reference, "manifest", lambda: {"numbers.npz": entry})
    monkeypatch.setattr(reference, "cache_folder", lambda: tmp_path / "cache")
    with pytest.raises(ValueError, match="numbers.npz.xz unpacks to SHA-256"):
        reference_path("numbers.npz")
    assert not (tmp_path / "cache").exists()


def test_recipes_make_the_same_weights() -> None:
    """The f16 file is made from the f32 file, whose weights are exact in f16: read by the peer's reader, they agree."""
    from gguf import GGUFReader

    exact = {tensor.name: tensor.data for tensor in GGUFReader(reference_path("llama/llama-f32.gguf")).tensors}
    for tensor in GGUFReader(reference_path("llama/llama-f16.gguf")).tensors:
        np.testing.assert_array_equal(np.asarray(tensor.data, np.float32), exact[tensor.name])


def test_op_index_and_arrays_belong_together() -> None:
    index = json.loads(reference_path("ops/index.json").read_text())
    assert index["n_cases"] == len(index["cases"]) > 300
    held: dict[str, set[str]] = {}
    for case in index["cases"]:
        if case["file"] not in held:
            with np.load(reference_path(f"ops/{case['file']}")) as arrays:
                held[case["file"]] = set(arrays.files)
        keys = {part[kind] for part in case["srcs"] for kind in ("raw_key", "decoded_key")} | {case["out"]["key"]}
        assert keys <= held[case["file"]], case["id"]


def test_no_more_than_25_mb() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 25_000_000
