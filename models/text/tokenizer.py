"""Text to token ids and back, for the vocabularies that GGUF files and `tokenizer.json` files carry."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorgraph.errors import FormatError, InputError, UnsupportedError
from tensorgraph.models.text.byte_level import ByteLevelBPE
from tensorgraph.models.text.json_file import ends_of_generation
from tensorgraph.models.text.pretokenizers import pre_tokenizer
from tensorgraph.models.text.sentencepiece import SentencePieceBPE
from tensorgraph.models.text.sentencepiece_model import read_sentencepiece_model
from tensorgraph.models.text.tokenizer_json import read_tokenizer_json
from tensorgraph.models.text.vocabulary import Kind, Vocabulary, flag, special_ids
from tensorgraph.models.text.wordpiece import WordPiece, of_gguf, read_vocab_txt

KINDS = "gpt2 (byte-level BPE), llama (SentencePiece-style BPE), bert (WordPiece)"


class Codec(Protocol):
    """How one vocabulary turns text into ids and an id into bytes."""

    space_prefix: bool

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text; the spelling of a special token is that token only with `parse_special`."""

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an ordinary token stands for."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: number of tokens.
        bos_id, eos_id: the ids that begin and end a sequence, or None.
        eog_ids: every id that ends a generation.
        suffix: what `add_special` puts after a text.
    """

    def __init__(self, codec: Codec, vocabulary: Vocabulary, prefix: list[int], suffix: list[int]) -> None:
        """Join a codec and its vocabulary; `prefix` and `suffix` are what `add_special` puts around a text."""
        self._codec, self._vocabulary, self._prefix, self.suffix = codec, vocabulary, prefix, suffix
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.eog_ids = vocabulary.bos_id, vocabulary.eos_id, vocabulary.eog_ids

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file's metadata describes.

        Raises: FormatError where entries are missing or do not fit; UnsupportedError for another kind of vocabulary;
        UnknownNameError for a pre-tokenizer that is not known.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if not isinstance(kind, str) or kind not in ("gpt2", "llama", "bert"):
            raise UnsupportedError(f'[tokenizer] the kinds that are there: {KINDS}; "tokenizer.ggml.model" is {kind!r}')
        vocabulary = Vocabulary.from_gguf(metadata)
        if kind == "bert":
            return cls._of_words(*of_gguf(metadata, vocabulary))
        model: ByteLevelBPE | SentencePieceBPE
        if kind == "gpt2":
            rules = pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
            model, add_bos = ByteLevelBPE(metadata, vocabulary, rules), rules.add_bos
        else:
            model, add_bos = SentencePieceBPE(metadata, vocabulary), True
        prefix = _added(metadata, "bos", vocabulary.bos_id, add_bos)
        suffix = _added(metadata, "eos", vocabulary.eos_id, False)
        return cls(_CuttingCodec(model, vocabulary), vocabulary, prefix, suffix)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Build the tokenizer that a `tokenizer.json` describes.

        The files `tokenizer_config.json` and `generation_config.json` beside it, where they exist, name the tokens that
        begin and end a sequence.

        Raises: InputError where there is no such file; FormatError where it is damaged; UnsupportedError for another
        kind of vocabulary.
        """
        return cls(*read_tokenizer_json(Path(path)))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Build the tokenizer of a published folder: of `tokenizer.json`, else of `tokenizer.model`, else of `vocab.txt`.

        Raises: as `from_file`.
        """
        json_file, pieces, words = (folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"))
        if json_file.is_file():
            return cls.from_file(json_file)
        if pieces.is_file():
            made = cls.from_gguf(read_sentencepiece_model(pieces))
            made.eog_ids |= ends_of_generation(folder, made.vocab_size)
            return made
        return cls._of_words(*read_vocab_txt(words)) if words.is_file() else cls.from_file(json_file)

    @classmethod
    def _of_words(cls, model: WordPiece, vocabulary: Vocabulary, prefix: list[int], suffix: list[int]) -> Tokenizer:
        return cls(_CuttingCodec(model, vocabulary), vocabulary, prefix, suffix)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text.

        `add_special` puts BOS before and EOS after it where the vocabulary asks for them. With `parse_special` the
        spelling of a control token such as `<|im_end|>` becomes that token; without, it is ordinary text.

        Raises: InputError where the text holds half a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"[encode] wanted Unicode text; got half a surrogate pair, {text[error.start]!r} at {error.start}"
            raise InputError(message) from None
        ids = self._codec.encode(text, parse_special)
        return [*self._prefix, *ids, *self.suffix] if add_special else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises: InputError for an id outside the vocabulary.
        """
        stream = Detokenizer(self, skip_special=skip_special, at_start=True)
        return "".join([stream.add(token_id) for token_id in ids]) + stream.finish()

    def token(self, token_id: int) -> str:
        """The text by which the vocabulary lists a token.

        Raises: InputError for an id outside the vocabulary.
        """
        return self._vocabulary.tokens[self._checked(token_id)]

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token or stands for unknown text.

        Raises: InputError for an id outside the vocabulary.
        """
        return self._vocabulary.kinds[self._checked(token_id)] in (Kind.CONTROL, Kind.UNKNOWN)

    def piece(self, token_id: int, *, after_special: bool) -> tuple[bytes, bool]:
        """The bytes of a token, and whether it stands for its own spelling (special or added by hand).

        A vocabulary that starts texts with a space takes that space away again `after_special`.

        Raises: InputError for an id outside the vocabulary.
        """
        kind = self._vocabulary.kinds[self._checked(token_id)]
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
            return self._vocabulary.tokens[token_id].encode(), True
        data = self._codec.bytes_of(token_id)
        return data[1:] if after_special and self._codec.space_prefix and data[:1] == b" " else data, False

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise InputError(f"[tokenizer] wanted a token id below {self.vocab_size}; got {token_id}")
        return token_id


class Detokenizer:
    """Turns ids into text as they come, and never emits half a UTF-8 character.

    With `at_start` the ids are the start of a text, otherwise they go on after one (as a generation does).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False, at_start: bool = False) -> None:
        """Start a stream."""
        self._tokenizer, self._skip_special, self._after_special = tokenizer, skip_special, at_start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished.

        Raises: InputError for an id outside the vocabulary.
        """
        data, self._after_special = self._tokenizer.piece(token_id, after_special=self._after_special)
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class _CuttingCodec:
    """Cuts special tokens out of a text and hands the stretches between them to the vocabulary's model."""

    def __init__(self, model: ByteLevelBPE | SentencePieceBPE | WordPiece, vocabulary: Vocabulary) -> None:
        self._model, self.space_prefix, self.bytes_of = model, model.space_prefix, model.bytes_of
        special = frozenset(kind.value for kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED))
        tokens, kinds = vocabulary.tokens, vocabulary.kinds
        self._ids = {tokens[i]: i for i in special_ids(kinds) if kinds[i] in special and tokens[i]}
        added = [token for token, i in self._ids.items() if kinds[i] == Kind.USER_DEFINED]
        self._patterns = {False: _any_of(added), True: _any_of(list(self._ids))}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text; a token that was added by hand is always recognised by its spelling."""
        pattern = self._patterns[parse_special]
        parts = pattern.split(text) if pattern else [text]  # special tokens are every second one
        encoded = self._model.encode([" " + part if part and self.space_prefix else part for part in parts[::2]])
        ids = encoded[0]
        for special, after in zip(parts[1::2], encoded[1:], strict=True):
            ids += [self._ids[special], *after]
        return ids


def _any_of(tokens: list[str]) -> re.Pattern[str] | None:
    """A pattern with one group that finds the leftmost token, the longest of several."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if tokens else None


def _added(metadata: Mapping[str, Any], name: str, token_id: int | None, default: bool) -> list[int]:
    key = f"tokenizer.ggml.add_{name}_token"
    if not flag(metadata, key, default):
        return []
    if token_id is None:
        if key in metadata:
            raise FormatError(f'[tokenizer] "{key}" is set; wanted "tokenizer.ggml.{name}_token_id" with it')
        return []
    return [token_id]
