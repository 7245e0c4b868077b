"""Checks of encoders and their texts for `planting`, as `planted_checks` has them of decoders."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tensorgraph.models import load
from tensorgraph.models.text.model import load_tokenizer
from tests.models import encoder_file, test_bert, tiny
from tests.models.text import test_wordpiece


def alone() -> None:
    test_bert.test_hidden_states("reference")


def together() -> None:
    test_bert.test_a_ragged_batch("reference")


def old_names() -> None:
    with TemporaryDirectory() as folder:
        test_bert.test_other_names_of_published_tensors(lambda name: f"bert.{name}", Path(folder))


def vectors() -> None:
    """Three texts in steps of a token at most, by each pooling; lengths; a text that is cut."""
    stored = tiny.reference("bert")
    with TemporaryDirectory() as folder, load(encoder_file.write(Path(folder) / "a.gguf"), backend="reference") as model:
        ids, rows = ([stored[f"{name}/{i}"] for i in (1, 0, 1)] for name in ("ids", "hidden"))
        wanted = {"mean": lambda x: x[-1].mean(0), "cls": lambda x: x[-1][0], "last": lambda x: x[-1][-1]}
        for pooling, of in wanted.items():
            want = np.stack([of(states.astype(np.float64)) for states in rows])
            found = model.embed(ids, pooling=pooling, normalize=False, batch=1)  # type: ignore[arg-type]
            assert tiny.nmse(found, want) <= 1e-9, pooling
            found = model.embed(ids, pooling=pooling)  # type: ignore[arg-type]
            assert tiny.nmse(found, want / np.linalg.norm(want, axis=1, keepdims=True)) <= 1e-9, pooling
        assert model.pooling == "mean"
        cut = model.embed([" ".join(["w1"] * 40)], truncate=True)
        np.testing.assert_array_equal(cut, model.embed([[2, *[6] * 30, 3]]))


def words() -> None:
    """Ids by GGUF's vocabulary and by MiniLM's files, and words back."""
    for chosen in (test_wordpiece.tokenizer("gguf"), test_wordpiece.tokenizer("tokenizer.json")):
        test_wordpiece.test_texts_are_encoded_as_llama_cpps_vectors_say(chosen)
        test_wordpiece.test_sentences_are_encoded_as_transformers_does(chosen)
        test_wordpiece.test_words_come_back(chosen)
        test_wordpiece.test_special_tokens_are_parsed_only_on_request(chosen)
    test_wordpiece.test_a_vocabulary_with_capital_letters_keeps_them()


def files_of_words() -> None:
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        test_wordpiece.test_a_list_of_words(Path(first))
        test_wordpiece.test_a_tokenizer_json_is_preferred_and_its_padding_left_out(Path(second))
        assert load_tokenizer(first).eos_id is None
