"""The GGUF reader against the `gguf` package's writer and reader, in one file and in parts."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as peer
import numpy as np
import pytest

from tensorgraph.errors import FormatError, InputError, UnknownNameError
from tensorgraph.models.text.gguf import GGML_TYPES, GGUF
from tensorgraph.ops.formats import FORMATS, decode

Q = peer.GGMLQuantizationType


def write_small(path: Path, **options: Any) -> None:
    """A file with a value of every metadata type and tensors of several element types."""
    writer = peer.GGUFWriter(path, "llama", **options)
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("uint32", 2**32 - 1)):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", 2**64 - 1)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "½ café 🦙\n")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 0.25])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.strings", ["", "a", "ÿ▁the", "🦙" * 30])
    rng = np.random.default_rng(7)
    weights = rng.standard_normal((6, 64), np.float32)
    writer.add_tensor("f32", weights)
    writer.add_tensor("f16", weights.astype(np.float16)[:, :3].copy())
    for qtype in (Q.Q4_0, Q.Q8_0, Q.BF16):
        writer.add_tensor(qtype.name.lower(), peer.quants.quantize(weights, qtype), raw_dtype=qtype)
    writer.add_tensor("cube", rng.standard_normal((2, 3, 5)))
    writer.add_tensor("i32", np.arange(5, dtype=np.int32))
    writer.add_tensor("i8", np.arange(3, dtype=np.int8))
    writer.add_tensor("iq2_xxs", rng.integers(0, 256, (2, 66), np.uint8), raw_dtype=Q.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_small(path)
    return path


def assert_equals_peer(got: GGUF, path: Path) -> None:
    reader = peer.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: plain(value) for key, value in got.metadata.items()} == fields
    assert list(got.metadata) == list(fields)
    assert_same_tensors(got, reader)
    assert len(got.tensors) == len(reader.tensors)


def assert_same_tensors(got: GGUF, reader: peer.GGUFReader) -> None:
    for want in reader.tensors:
        info, data = got.tensors[want.name], got.data(want.name)
        assert info.dtype is GGML_TYPES[want.tensor_type] and info.shape == tuple(want.shape.tolist()[::-1])
        assert (info.offset, info.size_bytes) == (want.data_offset, want.n_bytes)
        assert data.nbytes == want.n_bytes and data.tobytes() == want.data.tobytes()
        assert not data.flags.writeable
        assert data.shape == (want.data.shape if info.dtype.is_block else info.shape)
        assert data.dtype == (info.dtype.numpy or np.uint8)


def test_every_ggml_type_is_known_with_its_layout() -> None:
    for kind, (block_size, block_bytes) in peer.GGML_QUANT_SIZES.items():
        dtype = GGML_TYPES[int(kind)]
        wanted = 36 if kind is Q.Q8_1 else block_bytes  # the package's 40 is from before the scales were f16
        assert (dtype.name, dtype.block_size, dtype.block_bytes) == (kind.name.lower(), block_size, wanted)
    by_name = {dtype.name: dtype for dtype in GGML_TYPES.values()}
    assert len(by_name) == len(GGML_TYPES)
    assert all(by_name[name] == form.dtype for name, form in FORMATS.items())


def test_metadata_and_tensors_equal_the_peer(small: Path) -> None:
    with GGUF.open(small) as got:
        assert_equals_peer(got, small)
        assert (got.architecture, got.version, got.paths) == ("llama", 3, (small,))
        assert isinstance(got.metadata["a.ints"], np.ndarray) and isinstance(got.metadata["a.strings"], list)
        assert got.metadata["a.bool"] is True and got.metadata["a.float32"] == float(np.float32(0.1))
        assert got.metadata.get("a.nothing") is None and "a.nothing" not in got.metadata
        assert got.tensors["cube"].shape == (2, 3, 5)
        exact = got.data("f32")
        assert np.abs(decode(got.data("q8_0"), "q8_0") - exact).max() < 0.02
        assert np.allclose(got.data("bf16").astype(np.float32), exact, rtol=2**-8, atol=0)


def test_opening_decodes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    tokens = [f"token number {i}" for i in range(50_000)]
    writer = peer.GGUFWriter(path, "llama")
    writer.add_array("tokens", tokens)
    writer.add_array("scores", np.linspace(0, 1, 50_000).tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tracemalloc.start()
    try:
        got = GGUF.open(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert got.metadata["tokens"] == tokens and got.metadata["tokens"] is got.metadata["tokens"]
    assert np.array_equal(got.metadata["scores"], np.linspace(0, 1, 50_000).astype(np.float32))


def test_closing_ends_access_but_keeps_arrays(small: Path) -> None:
    with GGUF.open(small) as got:
        kept, bool_value = got.data("i32"), got.metadata["a.bool"]
    assert np.array_equal(kept, np.arange(5)) and bool_value is True
    with pytest.raises(InputError, match=r"small.gguf is closed"):
        got.data("i32")
    with pytest.raises(InputError, match=r"small.gguf is closed"):
        got.metadata["a.strings"]


def test_an_unknown_tensor_name_lists_near_ones(small: Path) -> None:
    with GGUF.open(small) as got, pytest.raises(UnknownNameError, match=r"no tensor 'q4_1'; near: .*q4_0"):
        got.data("q4_1")


def shards(folder: Path) -> list[Path]:
    write_small(folder / "model.gguf", split_max_tensors=4)
    return sorted(folder.glob("model-*.gguf"))


def test_any_part_opens_a_split_model(tmp_path: Path) -> None:
    parts = shards(tmp_path)
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = tmp_path / "whole.gguf"
    write_small(whole)
    for part in parts:
        with GGUF.open(part) as got, GGUF.open(whole) as want:
            assert got.paths == tuple(parts) and got.metadata["a.string"] == want.metadata["a.string"]
            assert list(got.tensors) == list(want.tensors)
            for index, path in enumerate(parts):
                reader = peer.GGUFReader(path)
                assert_same_tensors(got, reader)
                assert {got.tensors[each.name].file_index for each in reader.tensors} == {index}
            assert all(np.array_equal(got.data(name), want.data(name)) for name in want.tensors)


def test_split_models_that_are_not_whole(tmp_path: Path) -> None:
    first, second, third = shards(tmp_path)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match=r"one of 3 parts wants a name like x-00001-of-00003.gguf \(byte \d+\)"):
        GGUF.open(renamed)
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(FormatError, match=r"one of 3 parts; .*model-00002-of-00003.gguf is missing"):
        GGUF.open(third)
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match=r"model-00002-of-00003.gguf wants split.no 1 and split.count 3; got 0 and 3"):
        GGUF.open(first)
    second.write_bytes(content)
    whole = first.read_bytes()
    key = b"split.tensors.count"
    at = whole.index(key) + len(key) + 4
    first.write_bytes(whole[:at] + struct.pack("<i", 8) + whole[at + 4 :])
    with pytest.raises(FormatError, match=r"split.tensors.count is 8; the parts have 9 tensors"):
        GGUF.open(first)
    first.write_bytes(whole.replace(b"\x04\0\0\0\0\0\0\0cube", b"\x04\0\0\0\0\0\0\0q8_0"))
    second.write_bytes(content.replace(b"\x04\0\0\0\0\0\0\0cube", b"\x04\0\0\0\0\0\0\0q8_0"))
    with pytest.raises(FormatError, match=r"tensor 'q8_0' is in an earlier part as well"):
        GGUF.open(first)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*nowhere.gguf"):
        GGUF.open(tmp_path / "nowhere.gguf")
    with pytest.raises(InputError, match=r"is a folder or a device"):
        GGUF.open(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InputError, match=r"is a folder or a device"):
        GGUF.open(tmp_path / "pipe.gguf")
    with pytest.raises(InputError, match=r"cannot be read"):
        GGUF.open(tmp_path / ("x" * 300))
