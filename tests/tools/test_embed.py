"""`tensorgraph embed`: tables of cosines, vectors as JSON, where texts come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.models.text.model import TextModel, load
from tensorgraph.models.text.packaged import PACKAGED
from tests.models import encoder_file, tiny
from tests.reference import reference_path
from tests.tools.commands import as_json, gguf, ok, refused, tg

TEXTS = ["w1 w2 w3", "w50 w1", "", "w9 w9 w9 w9"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The tiny encoder, to whose vocabulary `w0`, `w1`, ... belong."""
    return encoder_file.write(tmp_path / "bert.gguf")


def vectors(file: Path, **options: Any) -> tiny.Array:
    """By the Python API."""
    with load(file) as model:
        return model.embed(TEXTS, **options)


def test_vectors(file: Path) -> None:
    found = as_json("embed", file, *TEXTS)
    expected = {"dimensions": 32, "pooling": "mean", "normalized": True, "texts": TEXTS, "n_tokens": [5, 4, 2, 6]}
    assert {key: found[key] for key in expected} == expected and set(found) == {*expected, "vectors"}
    np.testing.assert_array_equal(np.array(found["vectors"], np.float32), vectors(file))


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_pooling_length_and_ids(file: Path, pooling: Any) -> None:
    found = as_json("embed", file, *TEXTS, "--pooling", pooling, "--no-normalize", "--tokens", "--batch", 1)
    assert (found["pooling"], found["normalized"]) == (pooling, False) and found["ids"][1] == [2, 55, 6, 3]
    got = np.array(found["vectors"], np.float32)
    assert tiny.nmse(got, vectors(file, pooling=pooling, normalize=False)) <= 1e-12


def test_a_vector_for_each_token(file: Path) -> None:
    found = as_json("embed", file, *TEXTS, "--pooling", "none")
    with load(file) as model:
        for got, want in zip(found["vectors"], model.embed_tokens(TEXTS, normalize=True), strict=True):
            np.testing.assert_array_equal(np.array(got, np.float32), want)


def test_where_texts_come_from(file: Path, tmp_path: Path) -> None:
    """In the order of the command line, those of a file last; an empty line is an empty text."""
    lines, listed = "w3\n\nw4 w5", tmp_path / "texts.txt"
    listed.write_text("w7\nw8\n")
    for given, stdin, wanted in (
        (("w1", "-", "w2"), lines, ["w1", "w3", "", "w4 w5", "w2"]),
        ((), lines + "\n", ["w3", "", "w4 w5"]),
        (("--file", listed), lines, ["w7", "w8"]),
        (("-", "-f", listed), "w1\r\nw2\r\n", ["w1", "w2", "w7", "w8"]),
        (("w1", "-"), "", ["w1"]),
    ):
        assert as_json("embed", file, *given, stdin=stdin)["texts"] == wanted


def table(text: str) -> list[list[str]]:
    """Head, then the cells of each row; none of these texts has a space."""
    head, _, body = text.partition("\n\n")
    return [[head], *(line.split() for line in body.splitlines())]


def test_few_texts_are_compared_each_with_each(file: Path) -> None:
    few = ["w1", "w2", "w9,w9"]
    with load(file) as model:
        unit = model.embed(few).astype(np.float64)
    (head,), columns, *rows = table(ok("embed", file, *few))
    assert head == "32 dimensions a text, pooling mean; cosines" and columns == ["text", "tokens", "1", "2", "3"]
    for i, (number, text, tokens, *cosines) in enumerate(rows):
        assert (number, text, tokens) == (str(i + 1), repr(few[i]), ("3", "3", "5")[i])
        np.testing.assert_allclose([float(c) for c in cosines], unit @ unit[i], atol=6e-5)
    assert len(rows) == 3


def test_of_many_texts_each_has_its_nearest(file: Path) -> None:
    many = [f"w{i}" for i in range(20)]
    with load(file) as model:
        unit = model.embed(many).astype(np.float64)
    cosines = unit @ unit.T - 2 * np.eye(20)
    (head,), columns, *rows = table(ok("embed", file, *many))
    assert head.endswith("pooling mean; each text's nearest") and columns == ["text", "nearest", "tokens", "cosine"]
    for i, row in enumerate(rows):
        n = int(cosines[i].argmax())
        assert row == [str(i + 1), f"'w{i}'", str(n + 1), f"'w{n}'", "3", f"{cosines[i, n]:.4f}"]
    assert len(rows) == 20


def test_one_text_shows_how_its_vector_begins(file: Path) -> None:
    with load(file) as model:
        want = model.embed(["w1"])[0]
    (head,), _, row = table(ok("embed", file, "w1"))
    assert head == "32 dimensions a text, pooling mean"
    assert row == ["1", "'w1'", *(f"{x:.5f}" for x in want[:6]), "...", "3"]
    (head,), _, *rows = table(ok("embed", file, "w1", "w2", "--pooling", "none"))
    assert head == "32 dimensions a token, pooling none" and [row[0] for row in rows] == ["1", "2"]


def test_ids_come_first(file: Path) -> None:
    assert ok("embed", file, "w1", "w2", "--tokens").startswith("1  2 6 3\n2  2 7 3\n\n32 dimensions")


def test_long_texts(file: Path) -> None:
    long = " ".join(["w1"] * 31)
    assert "holds 32 tokens; number 2 has 33 (truncate cuts it)" in refused("embed", file, "w1", long)
    assert as_json("embed", file, "w1", long, "--truncate")["n_tokens"] == [3, 32]


def test_every_option_of_loading_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def recording(path: Any, **given: Any) -> TextModel:
        asked.append(given)
        return load(path, **given)

    monkeypatch.setattr("tensorgraph.models.text.model.load", recording)
    ok("embed", file, "w1")
    ok("embed", file, "w1", "--exact", "-t", 2, "--backend", "reference,cpu")
    default, chosen = asked
    assert (default["backend"], default["threads"], default["options"].exact) == ("cpu", "auto", False)
    assert (chosen["backend"], chosen["threads"], chosen["options"].exact) == ("reference,cpu", 2, True)


def test_a_decoder_too(tmp_path: Path) -> None:
    found = as_json("embed", gguf("llama"), "a house", "a wood", "--no-normalize")
    with load(gguf("llama")) as model:
        np.testing.assert_array_equal(np.array(found["vectors"], np.float32), model.embed(["a house", "a wood"], normalize=False))


def test_sentences_by_their_packaged_model() -> None:
    sentences = json.loads(reference_path("real_minilm/sentences.json").read_text())
    found = as_json("embed", "minilm", "--tokens", stdin="\n".join(sentences))
    with np.load(reference_path("real_minilm/reference.npz")) as stored:
        want = stored["embeddings"].astype(np.float64)
        assert found["ids"] == [stored[f"ids/{i}"].tolist() for i in range(20)]
    got = np.array(found["vectors"])
    cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosines.min() >= 0.999999 and found["texts"] == sentences


@pytest.mark.parametrize(
    ("given", "stdin", "said"),
    [
        (("-", "-"), "a", "stdin is read once; got - twice"),
        ((), "", "wanted texts: TEXT ..., --file FILE, or -"),
        (("w1", "--pooling", "max"), None, "wanted pooling mean, cls, last or none; got 'max'"),
        (("w1", "--pooling", "rank"), None, "scores of pairs of texts, which are not there"),
        (("w1", "--file", "none.txt"), None, "none.txt"),
        (("w1", "-t", 0), None, "wanted a number from 1 to 1024"),
        (("w1", "--backend", "abacus"), None, "'abacus'"),
    ],
)
def test_what_cannot_be_is_a_sentence(given: tuple[object, ...], stdin: str | None, said: str, file: Path) -> None:
    assert said in refused("embed", file, *given, stdin=stdin)


def test_a_file_that_is_no_text(file: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "bytes is no UTF-8" in refused("embed", file, "--file", tmp_path / "bytes")


@pytest.mark.parametrize("command", [("run", "-p", "x"), ("bench", "-p", 8, "-n", 0), ("profile", "-p", 8, "-n", 0)])
def test_commands_that_generate_refuse_an_encoder(command: tuple[object, ...], file: Path) -> None:
    assert "bert is an encoder: it generates no text" in refused(command[0], file, *command[1:])


def test_an_encoder_is_planned_and_described(file: Path) -> None:
    planned = as_json("plan", file, "--tokens", 32)
    assert planned["architecture"] == "bert" and planned["state"]["streams"] == 0 and planned["steps"][0]["tokens"] == 32
    assert ok("inspect", file, "--state") == "no state: nothing outlives a step\n"
    assert ok("tokenize", file, "w1 w2").splitlines()[1] == "6\t' w1'" and tg("plan", "minilm", "--json").exit_code == 0


@pytest.mark.parametrize("arguments", [("embed", "minilm", "-"), ("run", "smollm2", "-p", "-"), ("tokenize", "smollm2", "-")])
def test_stdin_that_is_no_text(arguments: tuple[str, ...]) -> None:
    assert f"[{arguments[0]}] stdin is no UTF-8" in refused(*arguments, stdin=b"a\xff\n")


def test_help_names_every_packaged_model() -> None:
    for command in ("run", "embed", "plan"):
        text = " ".join(ok(command, "--help").split())
        assert all(name in text for name in PACKAGED)
