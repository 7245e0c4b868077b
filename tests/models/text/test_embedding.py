"""Vectors of texts: pooling, lengths, batches, what files say of them, decoders, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions
from tensorgraph.errors import FormatError, InputError, TensorGraphError, UnsupportedError
from tensorgraph.models import TextModel, load
from tensorgraph.models.text.embedding import groups
from tests.models import encoder_file, tiny
from tests.models.text.test_checkpoint import folder_of
from tests.reference import reference_path


def ids(i: int) -> list[int]:
    found: list[int] = tiny.reference("bert")[f"ids/{i}"].tolist()
    return found


EXACT = CompileOptions(exact=True)


def rows(i: int) -> tiny.Array:
    """Hidden states after the last layer, by transformers in float64."""
    return tiny.reference("bert")[f"hidden/{i}"][-1].astype(np.float64)


@pytest.fixture(params=tiny.BACKENDS)
def encoder(request: pytest.FixtureRequest) -> Iterator[TextModel]:
    with load(tiny.folder("bert"), backend=request.param, options=EXACT) as model:
        yield model


@pytest.fixture
def worded(tmp_path: Path) -> Iterator[TextModel]:
    """With a vocabulary: `wN` is token N + 5."""
    with load(encoder_file.write(tmp_path / "bert.gguf"), backend="reference") as model:
        yield model


POOLED = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}


@pytest.mark.parametrize("pooling", POOLED)
def test_pooling(encoder: TextModel, pooling: Any) -> None:
    """Of two texts in one step, as they are and with length 1."""
    wanted = np.stack([POOLED[pooling](rows(i)) for i in (1, 0)])
    found = encoder.embed([ids(1), ids(0)], pooling=pooling, normalize=False)
    assert found.dtype == np.float32 and tiny.nmse(found, wanted) <= 1e-9
    unit = encoder.embed([ids(1), ids(0)], pooling=pooling)
    assert tiny.nmse(unit, wanted / np.linalg.norm(wanted, axis=1, keepdims=True)) <= 1e-9
    assert encoder.engine.stats.steps == 2


def test_the_mean_is_what_files_without_a_word_mean(encoder: TextModel) -> None:
    assert encoder.pooling == "mean"
    assert tiny.nmse(encoder.embed([ids(1)], normalize=False)[0], rows(1).mean(0)) <= 1e-9


def test_a_vector_for_each_token(encoder: TextModel) -> None:
    found = encoder.embed_tokens([ids(0), np.array(ids(1))])
    for i in range(2):
        assert found[i].dtype == np.float32 and tiny.nmse(found[i], rows(i)) <= 1e-9
    (unit,) = encoder.embed_tokens([ids(1)], normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(("batch", "steps"), [(1, 6), (42, 6), (54, 3), (86, 2), (512, 1)])
def test_texts_are_never_cut_into_steps(encoder: TextModel, batch: int, steps: int) -> None:
    """Texts of 32, 11, 32, 11, 32 and 11 tokens, in order, as many to a step as fit."""
    found = encoder.embed([ids(i % 2) for i in range(6)], batch=batch, normalize=False)
    assert encoder.engine.stats.steps == steps
    for i, vector in enumerate(found):
        assert tiny.nmse(vector, rows(i % 2).mean(0)) <= 1e-9
    assert len(encoder.engine.cache) == 1, "one plan for any number of texts"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 20), st.integers(1, 5))
def test_groups(lengths: list[int], tokens: int, most: int) -> None:
    """All in order, none over its bounds but one that is longer by itself, and none that the one before had room for."""
    found = [*groups(lengths, tokens, most)]
    assert [i for group in found for i in group] == [*range(len(lengths))]
    sums = [sum(lengths[i] for i in group) for group in found]
    assert all(len(g) <= most and (n <= tokens or len(g) == 1) for g, n in zip(found, sums, strict=True))
    for group, n, after in zip(found, sums, found[1:], strict=False):
        assert len(group) == most or n + lengths[after.start] > tokens


def test_no_texts(encoder: TextModel) -> None:
    assert encoder.embed([]).shape == (0, 32) and encoder.embed_tokens([]) == []


def test_texts_go_through_the_tokenizer(worded: TextModel) -> None:
    texts = ["w7 w3 W58", "", "w1 what"]
    assert [worded.tokenizer.encode(text) for text in texts] == [[2, 12, 8, 63, 3], [2, 3], [2, 6, 1, 3]]
    by_ids = worded.embed([[2, 12, 8, 63, 3], [2, 3], [2, 6, 1, 3]])
    np.testing.assert_array_equal(worded.embed(texts), by_ids)


def test_long_texts(worded: TextModel) -> None:
    words = [f"w{i % 50}" for i in range(40)]
    held = [2, *(i % 50 + 5 for i in range(30)), 3]
    assert worded.embed([" ".join(words[:30])]).shape == (1, 32)
    with pytest.raises(InputError, match=r"this model holds 32 tokens; number 2 has 33 \(truncate cuts it\)"):
        worded.embed(["w1", " ".join(words[:31])])
    cut = worded.embed([" ".join(words), [*held, 9, 9]], truncate=True)
    np.testing.assert_array_equal(cut, worded.embed([held, held]))


def decoder(architecture: str) -> Path:
    folder = architecture in tiny.FOLDERS
    return tiny.folder(architecture) if folder else reference_path(f"{architecture}/{architecture}-f32.gguf")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_decoders_give_their_last_norm(architecture: str) -> None:
    """Beside others, of one token and of a few: later tokens change nothing before them."""
    stored = tiny.reference(architecture)
    tokens, at = stored["input_ids"].tolist(), stored["hidden_pos"]
    with load(decoder(architecture), kv_type="f32", options=EXACT) as model:
        one, few, whole = model.embed_tokens([tokens[:1], tokens[:3], tokens])
    assert tiny.nmse(whole[at], stored["hidden_norm"]) <= tiny.bound(architecture)
    assert tiny.nmse(few, whole[:3]) <= 1e-9 and tiny.nmse(one, whole[:1]) <= 1e-9


@tiny.on_every_backend
def test_a_decoder_is_pooled_over_all_of_its_chunks(backend: str) -> None:
    stored = tiny.reference("llama")
    tokens, at = stored["input_ids"].tolist(), stored["hidden_pos"]
    with load(decoder("llama"), backend=backend, kv_type="f32") as model:
        long, short = model.embed_tokens([tokens, tokens[:9]], batch=50)
        assert tiny.nmse(long[at], stored["hidden_norm"]) <= 1e-9 and tiny.nmse(short, long[:9]) <= 1e-9
        means = model.embed([tokens[:9], tokens[:5], tokens], normalize=False, batch=50)
        for mean, n in zip(means, (9, 5, len(tokens)), strict=True):
            assert tiny.nmse(mean, long[:n].mean(0)) <= 1e-9
        assert tiny.nmse(model.embed([tokens], pooling="last", normalize=False)[0], long[-1]) <= 1e-9


@pytest.mark.parametrize(
    ("number", "pooling"), [(None, "mean"), (0, "none"), (1, "mean"), (2, "cls"), (3, "last"), (4, None), (5, None), ("2", None)]
)
def test_what_a_gguf_file_says_of_pooling(number: Any, pooling: str | None, tmp_path: Path) -> None:
    with load(encoder_file.write(tmp_path / "a.gguf", **{"bert.pooling_type": number}), backend="reference") as model:
        if pooling is None:
            with pytest.raises(TensorGraphError, match=r"scores of pairs|wanted a number from 0 to 4 in 'bert.pooling_type'"):
                model.embed([ids(1)])
        else:
            assert model.pooling == pooling
        assert model.embed([ids(1)], pooling="cls").shape == (1, 32)


MODULES = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]


@pytest.mark.parametrize(
    ("said", "modules", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, MODULES, "cls"),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 32}, MODULES[:2], "last"),
        ({"pooling_mode_mean_tokens": True}, None, "mean"),
        ({"pooling_mode": "lasttoken"}, MODULES, "last"),
        (None, MODULES[:1], "mean"),
    ],
)
def test_what_a_folder_says_of_pooling(said: Any, modules: Any, pooling: str, tmp_path: Path) -> None:
    describe(tmp_path, said, modules)
    with load(tmp_path, backend="reference") as model:
        assert model.pooling == pooling


def describe(folder: Path, said: Any, modules: Any) -> None:
    folder_of("bert", folder)
    if said is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("said", "modules", "error", "message"),
    [
        ({"pooling_mode_max_tokens": True}, MODULES, UnsupportedError, "pools by max_tokens, which is not there"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, None, UnsupportedError, "max_tokens, cls_token"),
        ({"pooling_mode": "weightedmean"}, None, UnsupportedError, "pools by weightedmean"),
        (None, [*MODULES, {"type": "sentence_transformers.models.Dense"}], UnsupportedError, "the modules Dense, which"),
        (None, {"a": 1}, FormatError, "wanted a list of modules"),
        (None, [{"idx": 0}], FormatError, "wanted a list of modules"),
        ([], None, FormatError, "JSON object in .*config.json; got list"),
    ],
)
def test_what_a_folder_asks_for_and_is_not_there(
    said: Any, modules: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    describe(tmp_path, said, modules)
    with load(tmp_path, backend="reference") as model:
        with pytest.raises(error, match=message):
            model.embed([ids(1)])
        assert model.embed([ids(1)], pooling="mean").shape == (1, 32)


@pytest.mark.parametrize(
    ("texts", "options", "error", "said"),
    [
        ("a text", {}, InputError, "wanted a list of texts; got one text, 'a text'"),
        ([[2, 3], []], {}, InputError, "wanted texts of at least one token; number 2 has none"),
        ([b"bytes"], {}, InputError, "wanted texts, or lists of token ids; number 1 is bytes"),
        ([3], {}, InputError, "wanted texts, or lists of token ids; number 1 is int"),
        ([[2, 64]], {}, InputError, r"token id 64 \(number 1\) is outside the vocabulary of 64"),
        ([[2.5]], {}, InputError, "at least one token id; got float64"),
        ([[2, 3]], {"batch": 0}, InputError, "wanted a batch of at least 1 token; got 0"),
        ([[2, 3]], {"pooling": "max"}, InputError, "wanted pooling mean, cls, last or none; got 'max'"),
        ([[2, 3]], {"pooling": "none"}, InputError, "`embed_tokens` gives a vector for each token"),
        ([[2, 3]], {"pooling": "rank"}, UnsupportedError, "scores of pairs of texts, which are not there"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    texts: Any, options: dict[str, Any], error: type[Exception], said: str, worded: TextModel
) -> None:
    with pytest.raises(error, match=said):
        worded.embed(texts, **options)
    assert worded.embed([[2, 3]]).shape == (1, 32)


def test_an_encoder_generates_nothing(worded: TextModel) -> None:
    with pytest.raises(UnsupportedError, match=r"\[session\] bert is an encoder: it generates no text"):
        worded.session()
