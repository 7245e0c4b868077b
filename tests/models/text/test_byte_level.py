"""Byte-level BPE of short texts: the ids that the whole vocabulary gives."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tensorgraph.errors import FormatError
from tensorgraph.models.text.byte_level import LONGEST_PIECE, SHORT
from tensorgraph.models.text.tokenizer import Tokenizer
from tests.models.text.test_tokenizer import ANY_TEXT, VOCABULARIES, Metadata, byte_level, real_texts, vocabulary


@cache
def knowing_all_merges(name: str) -> Tokenizer:
    whole = Tokenizer.from_gguf(vocabulary(name))
    whole.encode("x" * (SHORT + 1))
    return whole


@settings(max_examples=15)
@pytest.mark.parametrize("name", [name for name in VOCABULARIES if name != "llama-spm"])
@given(data=st.data())
def test_short_texts_get_the_ids_that_all_merges_give(name: str, data: st.DataObject) -> None:
    parts = st.one_of(st.sampled_from(real_texts(name)), st.sampled_from(vocabulary(name)["tokenizer.ggml.tokens"]), ANY_TEXT)
    texts = data.draw(st.lists(st.lists(parts, max_size=4).map("".join), min_size=1, max_size=3))
    short = Tokenizer.from_gguf(vocabulary(name))
    for text in texts:
        assert short.encode(text, parse_special=True) == knowing_all_merges(name).encode(text, parse_special=True)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@cache
def with_a_gap() -> Metadata:
    """All letters but q and what two or three of them make, in no particular order."""
    letters = [letter for letter in LETTERS if letter != "q"]
    pairs = [(a, b) for a in letters for b in letters]
    merges = [*pairs, *((a + b, c) for a, b in pairs for c in letters)]
    random.Random(0).shuffle(merges)
    tokens = [*letters, "Ġ", *dict.fromkeys(a + b for a, b in merges)]
    return byte_level(tokens=tokens, token_type=[1] * len(tokens), merges=[f"{a} {b}" for a, b in merges])


@cache
def whole_with_a_gap() -> Tokenizer:
    whole = Tokenizer.from_gguf(with_a_gap())
    whole.encode("x" * (SHORT + 1))
    return whole


@settings(max_examples=100)
@given(text=st.text(st.sampled_from(LETTERS[:4] + "q "), max_size=14))
@example(text="abqc")
def test_neighbours_of_a_character_that_is_not_there_merge(text: str) -> None:
    assert Tokenizer.from_gguf(with_a_gap()).encode(text) == whole_with_a_gap().encode(text)


def test_a_bad_one_of_many_merges_is_refused_when_it_is_first_needed() -> None:
    letters = [chr(ord("a") + i) for i in range(26)]
    pairs = [(a, b) for a in letters for b in letters]
    merges = [f"{a} {b}" for a, b in pairs] + [f"{a}{b} {c}" for a, b in pairs for c in letters]
    tokens = letters + [merge.replace(" ", "") for merge in merges]
    many = byte_level(tokens=tokens, token_type=[1] * len(tokens), merges=[*merges, "no such"])
    late = Tokenizer.from_gguf(many)
    assert late.encode("abcab") == [tokens.index("abc"), tokens.index("ab")]
    assert late.encode("a" * LONGEST_PIECE) == [tokens.index("aa")] * (LONGEST_PIECE // 2)
    with pytest.raises(FormatError, match=rf"merges\"\[{len(merges)}\]; got 'no such'"):
        late.encode("a" * (LONGEST_PIECE + 1))
