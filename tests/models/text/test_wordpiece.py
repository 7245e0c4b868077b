"""WordPiece vocabularies: the ids that other implementations give, from each kind of file; words back; damage refused."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings

from tensorgraph.errors import FormatError, InputError
from tensorgraph.models import find_packaged
from tensorgraph.models.text.model import load_tokenizer
from tensorgraph.models.text.tokenizer import Detokenizer, Tokenizer
from tests.models.text.test_tokenizer import ANY_TEXT, real_texts, vocabulary
from tests.reference import reference_path

SOURCES = ("gguf", "tokenizer.json", "vocab.txt")
"""The first is BGE's vocabulary, the others MiniLM's: both took BERT's."""


@cache
def tokenizer(source: str) -> Tokenizer:
    return Tokenizer.from_gguf(vocabulary("bert-bge")) if source == "gguf" else load_tokenizer("minilm")


@pytest.fixture(params=SOURCES)
def chosen(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param != "vocab.txt":
        return tokenizer(request.param)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(find_packaged("minilm") / name, tmp_path)
    return load_tokenizer(tmp_path)


def test_texts_are_encoded_as_llama_cpps_vectors_say(chosen: Tokenizer) -> None:
    texts = real_texts("bert-bge")
    lines = reference_path("vocab/ggml-vocab-bert-bge.gguf.out").read_text().split("\n")
    assert len(texts) == 47
    for text, line in zip(texts, lines, strict=False):
        assert chosen.encode(text, add_special=False) == [int(i) for i in line.split()], text


def test_sentences_are_encoded_as_transformers_does(chosen: Tokenizer) -> None:
    sentences = json.loads(reference_path("real_minilm/sentences.json").read_text())
    with np.load(reference_path("real_minilm/reference.npz")) as stored:
        for i, sentence in enumerate(sentences):
            assert chosen.encode(sentence) == stored[f"ids/{i}"].tolist(), sentence
    assert len(sentences) == 20 and (chosen.bos_id, chosen.eos_id, chosen.vocab_size) == (101, 102, 30522)


@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_any_text_is_encoded_alike(text: str) -> None:
    """By the vocabulary of the GGUF file, and by the library as the published file says."""
    ids = tokenizer("gguf").encode(text)
    assert ids == tokenizer("tokenizer.json").encode(text)
    stream = Detokenizer(tokenizer("gguf"), at_start=True)
    assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer("tokenizer.json").decode(ids)


def test_words_come_back(chosen: Tokenizer) -> None:
    ids = chosen.encode("Embeddings: UNBELIEVABLY naïve, isn't it?")
    assert chosen.decode(ids) == "[CLS]embeddings : unbelievably naive, isn ' t it?[SEP]"
    assert chosen.decode(ids, skip_special=True) == "embeddings : unbelievably naive, isn ' t it?"


def test_words_come_back_as_the_library_joins_them() -> None:
    made = tokenizer("tokenizer.json")
    for text in real_texts("bert-bge"):
        ids = made.encode(text, add_special=False)
        joined = tokenizers.decoders.WordPiece(cleanup=False).decode([made.token(i) for i in ids])
        for sign in ".,!?":
            joined = joined.replace(f" {sign}", sign)
        assert made.decode(ids) == joined.replace(" [UNK]", "[UNK]").replace("[UNK] ", "[UNK]"), text


def test_special_tokens_are_parsed_only_on_request(chosen: Tokenizer) -> None:
    assert 103 not in chosen.encode("a [MASK] b") and 101 not in chosen.encode("[CLS]", add_special=False)
    assert chosen.encode("a [MASK] b", parse_special=True) == [101, 1037, 103, 1038, 102]
    assert chosen.is_special(100) and not chosen.is_special(1037)
    assert chosen.encode("a" * 101, add_special=False) == [100], "the longest word that is looked at has 100 characters"
    assert 100 not in chosen.encode("a" * 100)


def words(**extra: Any) -> dict[str, Any]:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁a", "▁ab", "b", "▁▁", "▁", "c"]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 1, 1, 1, 1, 1],
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


def test_what_a_file_does_not_say_is_found_by_its_spelling() -> None:
    made = Tokenizer.from_gguf(words())
    assert (made.bos_id, made.eos_id) == (2, 3)
    assert made.encode("abb a x ac") == [2, 5, 6, 4, 1, 4, 9, 3]
    assert made.encode("▁ a▁", add_special=False) == [7, 4, 8], "a mark that is a character of the text"
    assert Tokenizer.from_gguf(words(cls_token_id=4, seperator_token_id=5, unknown_token_id=6)).encode("x") == [4, 6, 5]
    assert Tokenizer.from_gguf(words(bos_token_id=4, eos_token_id=5)).encode("x") == [4, 1, 5]


@pytest.mark.parametrize(
    ("extra", "ids"),
    [
        ({"add_bos_token": False}, [4, 3]),
        ({"add_eos_token": False}, [2, 4]),
        ({"add_eos_token": False, "add_sep_token": True}, [2, 4, 3]),
        ({"add_bos_token": False, "add_sep_token": False}, [4]),
    ],
)
def test_what_is_put_around_a_text(extra: dict[str, bool], ids: list[int]) -> None:
    assert Tokenizer.from_gguf(words(**extra)).encode("a") == ids


def test_a_vocabulary_with_capital_letters_keeps_them() -> None:
    small = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁a", "▁b", "é", "▁c", "▁d", "▁e"]
    cased = [*small[:-1], "▁B"]
    assert Tokenizer.from_gguf(words(tokens=cased)).encode("B b aé A", add_special=False) == [9, 5, 4, 6, 1]
    assert Tokenizer.from_gguf(words(tokens=small)).encode("B b é A", add_special=False) == [5, 5, 9, 4]


def write_words(folder: Path, lines: list[str], config: dict[str, Any] | None = None) -> Path:
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_list_of_words(tmp_path: Path) -> None:
    """Special tokens as the configuration names them, and letters as it says."""
    lines = ["<unk>", "<s>", "</s>", "b", "B", "##b", "[CLS]"]
    config = {"unk_token": "<unk>", "cls_token": {"content": "<s>"}, "sep_token": "</s>", "do_lower_case": False}
    made = load_tokenizer(write_words(tmp_path, lines, config))
    assert made.encode("b Bb x") == [1, 3, 4, 5, 0, 2] and made.is_special(1) and not made.is_special(6)
    made = load_tokenizer(write_words(tmp_path, lines, config | {"do_lower_case": True}))
    assert made.encode("b Bb", add_special=False) == [3, 3, 5]
    plain = load_tokenizer(write_words(tmp_path, ["[UNK]", "b", "[CLS]"], {}))
    assert plain.encode("B c") == [2, 1, 0]


def test_a_tokenizer_json_is_preferred_and_its_padding_left_out(tmp_path: Path) -> None:
    write_words(tmp_path, ["[UNK]", "b"])
    written = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"))
    written.enable_padding(length=9, pad_id=0, pad_token="[UNK]")
    written.enable_truncation(2)
    written.save(str(tmp_path / "tokenizer.json"))
    made = load_tokenizer(tmp_path)
    assert made.encode("aaaa") == [1, 2, 2, 2] and made.decode([1, 2, 1]) == "aa a"
    assert (made.bos_id, made.vocab_size) == (None, 3)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokenizer.ggml.model": "bert"}, 'wanted "tokenizer.ggml.tokens"'),
    "no unknown token": (words(tokens=list("abcdefghij")), r"a token for unknown words, \[UNK\]"),
    "cls too large": (words(cls_token_id=10), 'below 10 in "tokenizer.ggml.cls_token_id"; got 10'),
    "sep is text": (words(seperator_token_id="3"), "seperator_token_id.*got '3'"),
    "too few kinds": (words(token_type=[1]), "wanted 10 numbers"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_is_refused_with_a_sentence(name: str) -> None:
    metadata, message = DAMAGED[name]
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_gguf(metadata)


def test_folders_without_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wanted a tokenizer.json; there is no file"):
        load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match="a token for unknown words"):
        load_tokenizer(write_words(tmp_path, ["a", "b"]))
    with pytest.raises(FormatError, match="tokenizer_config.json is not JSON"):
        write_words(tmp_path, ["[UNK]", "b"])
        (tmp_path / "tokenizer_config.json").write_text("{")
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("said", "text", "words"),
    [
        ({}, "\u00dcber \u4e2d\u56fd", ["uber", "\u4e2d", "\u56fd"]),
        ({"strip_accents": False}, "\u00dcber", ["\u00fcber"]),
        ({"tokenize_chinese_chars": False}, "\u4e2d\u56fd", ["\u4e2d\u56fd"]),
        ({"do_lower_case": False}, "\u00dcber", ["\u00dcber"]),
        ({"do_lower_case": False, "strip_accents": True}, "\u00dcber", ["Uber"]),
    ],
)
def test_text_is_cleaned_as_a_folder_says(said: dict[str, bool], text: str, words: list[str], tmp_path: Path) -> None:
    known = ["[UNK]", "uber", "\u00fcber", "\u00dcber", "Uber", "\u4e2d", "\u56fd", "\u4e2d\u56fd"]
    chosen = Tokenizer.from_folder(write_words(tmp_path, known, {"do_lower_case": True} | said))
    assert [known[i] for i in chosen.encode(text, add_special=False)] == words


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"[UNK]": 0, "a": 300_000_000}, "wanted ids of tokens below"),
        ({"a": 0}, r"wanted a token for unknown words; .* has no '\[UNK\]'"),
    ],
)
def test_a_tokenizer_json_that_the_library_takes_and_fails_on_later(known: dict[str, int], said: str, tmp_path: Path) -> None:
    model = {"type": "WordPiece", "vocab": known, "unk_token": "[UNK]", "max_input_chars_per_word": 100}
    model["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(FormatError, match=said):
        Tokenizer.from_folder(tmp_path)
