"""`tokenizer.model`: the ids that the sentencepiece library and llama.cpp give, settings and added tokens, and damage refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.errors import FormatError, InputError, UnsupportedError
from tensorgraph.models import load
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.model import load_tokenizer
from tensorgraph.models.text.sentencepiece_model import read_sentencepiece_model
from tensorgraph.models.text.tokenizer import Tokenizer
from tests.models import tiny
from tests.models.text.test_tokenizer import real_texts, vocabulary
from tests.reference import reference_path

Piece = tuple[str, float, int]
AS_LLAMA = {"trainer": {3: 2}, "normalizer": {1: b"identity", 4: 0}}
BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
SPECIAL = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
PIECES: list[Piece] = [*SPECIAL, *BYTES, ("▁", -3.0, 1), ("a", -2.0, 1), ("▁a", -1.0, 1)]


def number(value: int) -> bytes:
    value %= 1 << 64
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)


def field(n: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message: a number, a float32, or bytes."""
    if isinstance(value, float):
        return number(n << 3 | 5) + struct.pack("<f", value)
    return number(n << 3) + number(value) if isinstance(value, int) else number(n << 3 | 2) + number(len(value)) + value


def message(fields: dict[int, int | float | bytes]) -> bytes:
    return b"".join(field(n, value) for n, value in fields.items())


def content(pieces: Iterable[Piece], trainer: dict[int, Any] | None = None, normalizer: dict[int, Any] | None = None) -> bytes:
    """A file as the library writes it: what has its default is left out, fields that are not read here are there too."""
    parts = []
    for text, score, kind in pieces:
        parts.append(field(1, message({1: text.encode(), 2: score, **({} if kind == 1 else {3: kind})})))
    parts.append(field(2, message({1: b"corpus.txt", 4: len(parts), 10: 0.9995, **AS_LLAMA["trainer"], **(trainer or {})})))
    parts.append(field(3, message({**AS_LLAMA["normalizer"], **(normalizer or {})})))
    return b"".join(parts) + field(5, b"")


def write(folder: Path, file: bytes, **beside: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(file)
    for name, said in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(said))
    return folder


def test_a_published_folder_encodes_as_the_sentencepiece_library_does() -> None:
    """The file is the library's own, of a model with a space for no text, and ids of byte tokens after special ones."""
    folder = tiny.folder("gemma3", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
    cases = json.loads(reference_path("gemma3/tokenizer_ref.json").read_text())["cases"]
    with load(folder) as model:
        found = model.tokenizer
    assert len(cases) == 203
    for case in cases:
        assert found.encode(case["text"], add_special=False) == case["ids"], case["text"]
        assert found.encode(case["text"]) == [2, *case["ids"]]
        assert found.decode(case["ids"]) == case["text"]
    assert (found.bos_id, found.eos_id, found.eog_ids, found.vocab_size) == (2, 1, {1}, 512)


def test_it_says_what_the_converted_file_says() -> None:
    path = tiny.folder("gemma3", "tokenizer.model", "tokenizer_config.json") / "tokenizer.model"
    found = read_sentencepiece_model(path)
    with GGUF.open(reference_path("gemma3/gemma3-f32.gguf")) as file:
        for key, value in found.items():
            if not key.endswith("unknown_token_id"):  # which that file leaves out
                assert np.array_equal(value, file.metadata[key]), key
    assert found["tokenizer.ggml.unknown_token_id"] == 3


def test_a_real_vocabulary_encodes_as_llama_cpp_does(tmp_path: Path) -> None:
    """Llama 2's, written into a file like the one that it came from."""
    known = {key.removeprefix("tokenizer.ggml."): value for key, value in vocabulary("llama-spm").items()}
    columns = (known["tokens"], map(float, known["scores"]), map(int, known["token_type"]))
    found = load_tokenizer(write(tmp_path, content(zip(*columns, strict=True), {35: 1})))
    lines = reference_path("vocab/ggml-vocab-llama-spm.gguf.out").read_text().split("\n")
    texts = real_texts("llama-spm")
    assert len(texts) == 47
    for text, line in zip(texts, lines, strict=False):
        ids = [int(i) for i in line.split()]
        assert found.encode(text, add_special=False) == ids, text
        assert found.decode(ids) == text
    assert (found.bos_id, found.eos_id, found.vocab_size, found.encode("")) == (1, 2, 32000, [1])


def spelled(found: Tokenizer, text: str, **how: bool) -> list[str]:
    return [found.token(i) for i in found.encode(text, **how)]


def test_settings_are_the_files_or_their_defaults(tmp_path: Path) -> None:
    assert spelled(load_tokenizer(write(tmp_path, content(PIECES))), "a a") == ["<s>", "▁a", "▁a"]
    assert spelled(load_tokenizer(write(tmp_path, content(PIECES, None, {3: 0}))), "a a") == ["<s>", "a", "▁a"]
    found = load_tokenizer(write(tmp_path, content(PIECES, {41: -1, 42: -1})))
    assert (found.bos_id, found.eos_id, found.eog_ids) == (None, None, {2}) and spelled(found, "a") == ["▁a"]
    found = load_tokenizer(write(tmp_path, content(PIECES, {41: 2, 42: 1})))
    assert (found.bos_id, found.eos_id) == (2, 1)
    found = load_tokenizer(write(tmp_path, content(PIECES, {41: 260, 42: 900})))
    assert (found.bos_id, found.eos_id) == (None, None), "neither an ordinary token nor none at all begins a sequence"


def test_files_beside_it_are_heard(tmp_path: Path) -> None:
    said = {"bos_token": {"content": "</s>"}, "eos_token": "<s>", "add_bos_token": False, "add_eos_token": True}
    ends = {"eos_token_id": [1, 0, 999]}
    found = load_tokenizer(write(tmp_path, content(PIECES), tokenizer_config=said, generation_config=ends))
    assert (found.bos_id, found.eos_id, found.eog_ids) == (2, 1, {0, 1, 2}) and spelled(found, "a") == ["▁a", "<s>"]
    decoder = {"263": {"content": "<b >", "special": False}, "0": {"content": "<unk>", "special": True}}
    decoder |= {"260": {"content": "a", "special": False}, "262": {"content": "<turn>", "special": True}}
    said = {"added_tokens_decoder": decoder, "eos_token": "<turn>", "add_eos_token": True}
    found = load_tokenizer(write(tmp_path, content(PIECES), added_tokens={"<old>": 262, "<x>": 264}, tokenizer_config=said))
    assert (found.eos_id, found.vocab_size, found.is_special(262), found.is_special(0)) == (262, 265, True, True)
    assert spelled(found, "<b >a<turn>", add_special=False)[:2] == ["<b >", "a"] and 262 not in found.encode("<turn>")[:-1]
    assert spelled(found, "<turn><x>", parse_special=True) == ["<s>", "<turn>", "<x>", "<turn>"]
    assert found.decode([263, 260]) == "<b >a"


def test_tokens_added_by_hand_are_found_with_their_spaces(tmp_path: Path) -> None:
    found = load_tokenizer(write(tmp_path, content([*PIECES, ("▁▁▁", 0.0, 4), ("<b▁>", 0.0, 4)], None, {3: 0})))
    assert found.encode("a   a<b >", add_special=False) == [260, 262, 260, 263]
    assert found.decode([260, 262, 260, 263]) == "a   a<b >"


def test_a_tokenizer_json_is_preferred(tmp_path: Path) -> None:
    write(tmp_path, content(PIECES))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="tokenizer.json is not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (content(PIECES, {3: 1}), "the kinds that are there: BPE, type 2; .*tokenizer.model is of type 1"),
        (content(PIECES, {24: 1}), "has spaces at the end of words"),
        (content(PIECES, None, {2: b"abc"}), "replaces characters"),
        (content(PIECES, None, {4: 1, 5: 0}), "makes one space of several, does not mark spaces"),
        (b"", "is of type 1"),
    ],
)
def test_what_would_be_encoded_otherwise_is_refused(file: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=said):
        load_tokenizer(write(tmp_path, file))


GOOD = content(PIECES)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "half a file": (GOOD[:100], "tokenizer.model, byte 96: field 1 is stored as 2 in 2 bytes that are left"),
    "a length of 2 ** 63": (GOOD + number(4 << 3 | 2) + number(1 << 63), "field 4 is stored as 2 in 0 bytes"),
    "a number without end": (GOOD + b"\xff" * 100, "a number does not end"),
    "a group": (GOOD + number(4 << 3 | 3), "field 4 is stored as 3"),
    "a number in the place of a piece, and an end too early": (GOOD + field(1, 7) + b"\x0a", "a number does not end"),
    "a piece of nothing": (GOOD + field(1, b""), r"a text, a score and a kind; got b'', 0.0, 1"),
    "a piece that is no text": (GOOD + field(1, field(1, b"\xff\xfe")), r"got b'\\xff\\xfe', 0.0, 1"),
    "a score that is none": (content([*PIECES, ("b", float("nan"), 1)]), "got b'b', nan, 1"),
    "an unknown kind": (content([*PIECES, ("b", 0.0, 7)]), "got b'b', 0.0, 7"),
    "a piece twice": (content([*PIECES, ("▁a", 0.0, 1)]), "'▁a' is there twice"),
    "a byte that is none": (content([*PIECES, ("b", 0.0, 6)]), "byte token 262; got 'b'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    file, said = DAMAGED[name]
    with pytest.raises(FormatError, match=said):
        load_tokenizer(write(tmp_path, file))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"added_tokens": {"<x>": 263}}, "from 262 on, without a gap; got 263, '<x>'"),
        ({"added_tokens": {"<x>": [1]}}, r"as a text and its id; got '<x>', \[1\]"),
        ({"added_tokens": {"<x>": -1}}, "got '<x>', -1"),
        ({"tokenizer_config": {"added_tokens_decoder": {"one": {"content": "x"}}}}, "got 'x', None"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": ""}}}}, "got '', 1"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": "x"}}}, "got None, 1"),
        ({"generation_config": [1]}, "wanted a JSON object"),
    ],
)
def test_files_beside_it_that_do_not_fit_are_refused(beside: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        load_tokenizer(write(tmp_path, GOOD, **beside))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file .*tokenizer.model"):
        read_sentencepiece_model(tmp_path / "tokenizer.model")


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_stands_in_it_is_read_or_refused_in_bounded_memory(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    file = bytearray(reference_path("gemma3/tokenizer.model").read_bytes()) if data.draw(st.booleans()) else bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 5))):
        at, new = data.draw(st.integers(0, len(file))), data.draw(st.binary(max_size=12))
        file[at : at + data.draw(st.sampled_from((0, 1, len(new), 1000)))] = new
    file = file[: data.draw(st.one_of(st.just(len(file)), st.integers(0, len(file))))]
    write(folder, bytes(file))
    tracemalloc.start()
    try:
        found = load_tokenizer(folder)
        assert found.vocab_size <= len(file) // 5
        found.decode(found.encode(" a<s>é" * 3, parse_special=True))
    except (FormatError, UnsupportedError) as error:
        assert "tokenizer" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200 * len(file) + 500_000
