"""Files that are written here, read by the `gguf` package and by our own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import FormatError
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.gguf_writer import ALIGNMENT, NewTensor, header, size_bytes, write

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NUMBERS = st.integers(-(2**31), 2**32 - 1) | st.floats(width=32, allow_nan=False) | st.booleans()
LISTS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1) | st.lists(TEXTS, min_size=1) | st.lists(st.booleans(), min_size=1)


def tensor(name: str, dtype: str, *shape: int) -> NewTensor:
    return NewTensor(name, as_dtype(dtype), shape)


def written(path: Path, metadata: dict[str, Any], contents: dict[NewTensor, bytes]) -> Path:
    head = header(metadata, list(contents))
    with path.open("wb") as stream:
        write(stream, head, contents, lambda each: [memoryview(contents[each])])
    assert path.stat().st_size == size_bytes(head, contents)
    return path


@settings(deadline=None, max_examples=40)
@given(metadata=st.dictionaries(st.text("abc._", min_size=1), NUMBERS | TEXTS | LISTS, max_size=6))
def test_metadata_comes_back(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    path = written(tmp_path_factory.mktemp("written") / "x.gguf", metadata, {tensor("t", "f32", 1): bytes(4)})
    theirs = gguf.GGUFReader(path)
    with GGUF.open(path) as ours:
        assert set(ours.metadata) == set(metadata)
        for key, value in metadata.items():
            mine = ours.metadata[key]
            assert (mine.tolist() if isinstance(mine, np.ndarray) else mine) == value
            assert theirs.fields[key].contents() == value


def test_tensors_come_back_at_aligned_places(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wanted = [tensor("a", "f32", 3), tensor("b", "q4_0", 2, 3, 64), tensor("c", "q6_k", 5, 256), tensor("d", "i32", 7, 1)]
    contents = {each: rng.bytes(each.size_bytes) for each in wanted}
    path = written(tmp_path / "x.gguf", {"general.architecture": "llama"}, contents)
    theirs = {each.name: each for each in gguf.GGUFReader(path).tensors}
    with GGUF.open(path) as ours:
        for each in wanted:
            info = ours.tensors[each.name]
            assert (info.shape, info.dtype, info.size_bytes) == (each.shape, each.dtype, each.size_bytes)
            assert info.offset % ALIGNMENT == 0 == theirs[each.name].data_offset % ALIGNMENT
            assert ours.data(each.name).tobytes() == contents[each] == theirs[each.name].data.tobytes()
            assert theirs[each.name].tensor_type.name == each.dtype.name.upper()


@pytest.mark.parametrize(
    ("metadata", "tensors", "said"),
    [
        ({"a.b": 2**32}, [], "a.b: wanted numbers of 32 bits"),
        ({"a.b": [1, 2**31]}, [], "a.b: wanted numbers of 32 bits"),
        ({"a.b": None}, [], "a.b: wanted numbers of 32 bits"),
        ({"a.b": []}, [], "a.b: wanted an array of at least one"),
        ({}, [tensor("n" * 64, "f32", 1)], "at most 63 bytes"),
        ({}, [tensor("n", "f32", 1, 1, 1, 1, 1)], "1 to 4 axes"),
        ({}, [tensor("n", "bool", 1)], "no tensors of bool"),
    ],
)
def test_what_a_file_cannot_hold(metadata: dict[str, Any], tensors: list[NewTensor], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        header(metadata, tensors)


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="t has 12 bytes; got 8"):
        written(tmp_path / "x.gguf", {}, {tensor("t", "f32", 3): bytes(8)})
