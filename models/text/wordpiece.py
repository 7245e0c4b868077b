"""WordPiece: text becomes plain words and signs, and each word the longest tokens of the vocabulary that it begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from tensorgraph.errors import FormatError
from tensorgraph.models.text.json_file import content_of, read_if_there
from tensorgraph.models.text.sentencepiece import SPACE
from tensorgraph.models.text.vocabulary import Kind, Vocabulary, flag, token_id

INNER = "##"
"""How a token that goes on with a word is spelled."""
NAMED = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""How tokens are spelled that stand for no text, where a file does not say it."""
SAID = {"lowercase": "do_lower_case", "strip_accents": "strip_accents", "chinese": "tokenize_chinese_chars"}
"""What a `tokenizer_config.json` says of how text is cleaned."""
_LONGEST_WORD = 100  # characters; longer ones are unknown
_NO_SPACE_BEFORE = frozenset(".,!?")


class WordPiece:
    """Ordinary text to ids and back.

    Text is cleaned of control characters, and each Chinese character and each sign is a word; a vocabulary without capital
    letters takes small letters without accents. So decoding gives words with one space between them, not the text itself.
    """

    space_prefix = True

    def __init__(
        self,
        spelled: Sequence[str],
        vocabulary: Vocabulary,
        *,
        lowercase: bool | None = None,
        strip_accents: bool | None = None,
        chinese: bool = True,
    ) -> None:
        """`spelled` is the vocabulary with `##` before what goes on with a word.

        Args:
            lowercase: make letters small; as those of the vocabulary say where None.
            strip_accents: take accents off; where None, if letters are made small.
            chinese: each Chinese character is a word.

        Raises: FormatError where it has no token for unknown words.
        """
        unknown = vocabulary.unknown_id
        if unknown is None:
            raise FormatError("[tokenizer] wanted a token for unknown words, [UNK] or the one that the file names; got none")
        self._bytes = [bytes_of_piece(token) for token in spelled]
        ordinary = {token: i for i, token in enumerate(spelled) if vocabulary.kinds[i] != Kind.CONTROL}
        if lowercase is None:
            lowercase = not any(token != token.lower() for token in ordinary if not _is_named(token))
        ids = {**ordinary, spelled[unknown]: unknown}
        self._encoder = tokenizers.Tokenizer(
            models.WordPiece(
                ids, unk_token=spelled[unknown], continuing_subword_prefix=INNER, max_input_chars_per_word=_LONGEST_WORD
            )
        )
        self._encoder.normalizer = normalizers.BertNormalizer(
            lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
        )
        self._encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, stretches: Sequence[str]) -> list[list[int]]:
        """Ids of each of several stretches of ordinary text."""
        return [self._encoder.encode(text, add_special_tokens=False).ids for text in stretches]

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an ordinary token stands for."""
        return self._bytes[token_id]


def bytes_of_piece(token: str) -> bytes:
    """What a token of a WordPiece vocabulary stands for: after a space, unless it goes on with a word or ends a clause."""
    if token.startswith(INNER) and token != INNER:
        return token[len(INNER) :].encode()
    return token.encode() if token in _NO_SPACE_BEFORE else f" {token}".encode()


def of_gguf(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[WordPiece, Vocabulary, list[int], list[int]]:
    """Model, vocabulary and the ids put before and after a text, of a GGUF file: [CLS] and [SEP] unless it says otherwise.

    Its tokens have a mark where a word begins, and none where one goes on.

    Raises: FormatError where an id does not fit.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}

    def found(name: str, *keys: str) -> int | None:
        given = (token_id(metadata, key, len(vocabulary.tokens)) for key in keys)
        return next((i for i in given if i is not None), ids.get(NAMED[name]))

    first, last = found("cls", "cls", "bos"), found("sep", "seperator", "eos")
    vocabulary = replace(vocabulary, bos_id=first, eos_id=last, unknown_id=found("unk", "unknown"))
    each = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    spelled = [token if kind == Kind.CONTROL or _is_named(token) else _spelled(token) for token, kind in each]
    begins = flag(metadata, "tokenizer.ggml.add_bos_token", True)
    ends = flag(metadata, "tokenizer.ggml.add_sep_token", flag(metadata, "tokenizer.ggml.add_eos_token", True))
    around = [[i] if i is not None and added else [] for i, added in ((first, begins), (last, ends))]
    return WordPiece(spelled, vocabulary), vocabulary, around[0], around[1]


def read_vocab_txt(path: Path) -> tuple[WordPiece, Vocabulary, list[int], list[int]]:
    """The same of a `vocab.txt`, a token a line, and of a `tokenizer_config.json` beside it, where there is one.

    Raises: InputError where there is no such file; FormatError where it has no token for unknown words.
    """
    tokens = content_of(path, "tokenizer").removesuffix("\n").split("\n")
    config = read_if_there(path.with_name("tokenizer_config.json"), "tokenizer")
    ids = {token: i for i, token in enumerate(tokens)}
    named = {name: ids.get(_text(config.get(f"{name}_token"), default)) for name, default in NAMED.items()}
    kinds = [Kind.NORMAL.value] * len(tokens)
    for i in named.values():
        if i is not None:
            kinds[i] = Kind.CONTROL.value
    first, last = named["cls"], named["sep"]
    vocabulary = Vocabulary(tokens, kinds, first, last, named["unk"], frozenset())
    said: dict[str, Any] = {ours: config[name] for ours, name in SAID.items() if isinstance(config.get(name), bool)}
    model = WordPiece(tokens, vocabulary, **said)
    return model, vocabulary, [] if first is None else [first], [] if last is None else [last]


def _text(token: Any, default: str) -> str:
    """A token of a configuration: its text, or an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else default


def _spelled(token: str) -> str:
    """A token of a GGUF file with `##` where it goes on with a word, and nothing where one begins."""
    return token[1:] if token[:1] == SPACE and token != SPACE else INNER + token


def _is_named(token: str) -> bool:
    """Whether a token is one like `[MASK]` or `[unused7]`."""
    return len(token) > 2 and token[0] == "[" and token[-1] == "]"
