"""`tokenizer.model`, a file of the sentencepiece library: its pieces and settings, as a GGUF file's metadata says them.

The file is one protobuf message. Every read lies in it, and what is made of it is bounded by its size.
Source: sentencepiece_model.proto, for the numbers of the fields.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorgraph.errors import FormatError, InputError, UnsupportedError
from tensorgraph.models.text.json_file import read_if_there
from tensorgraph.models.text.sentencepiece import SPACE
from tensorgraph.models.text.vocabulary import Kind

PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
MODEL_TYPE, UNIGRAM, BPE, SPACE_ENDS_WORDS, NAMED_IDS = 3, 1, 2, 24, {"bos": (41, 1), "eos": (42, 2)}
CHARACTER_MAP, SPACE_PREFIX, SINGLE_SPACES, MARKED_SPACES = 2, 3, 4, 5
_LENGTHS = {1: 8, 5: 4}  # bytes of a value, by how it is stored
_KINDS = frozenset(kind.value for kind in Kind)
_LATER = -1000.0  # the score of a token that no piece merges into


@dataclass(frozen=True)
class File:
    """The bytes of the file; messages and texts are slices of them."""

    path: Path
    content: bytes

    def fields(self, message: slice) -> Iterator[tuple[int, int | slice]]:
        """The fields of a message, in their order.

        Raises: FormatError where it is none.
        """
        at, end = message.start, message.stop
        while at < end:
            start = at
            key, at = self._number(at, end)
            number, stored = key >> 3, key & 7
            if stored == 0:
                value, at = self._number(at, end)
                yield number, value
                continue
            if stored == 2:
                length, at = self._number(at, end)
            else:
                length = _LENGTHS.get(stored, end)
            if length > end - at:
                raise self.error(f"field {number} is stored as {stored} in {end - at} bytes that are left", start)
            yield number, slice(at, at + length)
            at += length

    def error(self, what: str, at: int) -> FormatError:
        return FormatError(f"[tokenizer] {self.path}, byte {at}: {what}")

    def _number(self, at: int, end: int) -> tuple[int, int]:
        """A number in 7 bits a byte, at most 64 in all, and where it ends."""
        if at < end and (byte := self.content[at]) < 128:  # nearly always
            return byte, at + 1
        value = 0
        for i in range(at, min(at + 10, end)):
            byte = self.content[i]
            value |= (byte & 127) << 7 * (i - at)
            if byte < 128:
                return value, i + 1
        raise self.error("a number does not end", at)


def read_sentencepiece_model(path: Path) -> dict[str, Any]:
    """What the file, and a `tokenizer_config.json` and `added_tokens.json` beside it, say of the vocabulary.

    Raises: InputError where there is no such file; FormatError where one is damaged; UnsupportedError for another algorithm than
    BPE, or texts that are changed before they are cut.
    """
    if not path.is_file():
        raise InputError(f"[tokenizer] there is no file {path}")
    file = File(path, path.read_bytes())
    pieces: dict[str, tuple[float, int]] = {}
    settings: dict[int, dict[int, int | slice]] = {TRAINER: {}, NORMALIZER: {}}
    for number, part in file.fields(slice(0, len(file.content))):
        if isinstance(part, int):
            continue
        if number == PIECES:
            text, score, kind = _piece(file, part)
            if text in pieces:
                raise file.error(f"wanted each piece once; {text!r:.80} is there twice", part.start)
            pieces[text] = score, kind
        elif number in settings:
            settings[number].update(file.fields(part))
    trainer, normalizer = settings[TRAINER], settings[NORMALIZER]
    _check_supported(trainer, normalizer, path)
    texts, scores, kinds = list(pieces), [score for score, _ in pieces.values()], [kind for _, kind in pieces.values()]
    config = read_if_there(path.with_name("tokenizer_config.json"), "tokenizer")
    for i, text, special in _added_tokens(config, path):
        if i > len(texts):
            wanted = f"ids of added tokens beside {path} from {len(texts)} on, without a gap"
            raise FormatError(f"[tokenizer] wanted {wanted}; got {i}, {text!r:.80}")
        if i == len(texts):
            texts.append(text)
            scores.append(_LATER)
            kinds.append(Kind.USER_DEFINED.value)
        if kinds[i] != Kind.UNKNOWN:
            texts[i], kinds[i] = text, Kind.CONTROL.value if special else Kind.USER_DEFINED.value
    for i, kind in enumerate(kinds):
        if kind == Kind.USER_DEFINED:  # these are looked for in the text as it is given
            texts[i] = texts[i].replace(SPACE, " ")
    said = {
        "model": "llama",
        "tokens": texts,
        "scores": scores,
        "token_type": kinds,
        "unknown_token_id": kinds.index(Kind.UNKNOWN) if Kind.UNKNOWN in kinds else None,
        "add_space_prefix": _is_set(normalizer, SPACE_PREFIX, True),
        **_special(config, texts, kinds, trainer),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()}


def _piece(file: File, piece: slice) -> tuple[str, float, int]:
    text, score, kind = b"", 0.0, Kind.NORMAL.value
    for number, value in file.fields(piece):
        if isinstance(value, int):
            kind = value if number == KIND else kind
        elif number == TEXT:
            text = file.content[value]
        elif number == SCORE and value.stop - value.start == 4:
            (score,) = struct.unpack_from("<f", file.content, value.start)
    try:
        spelled = text.decode()
    except UnicodeDecodeError:
        spelled = ""
    if not spelled or not math.isfinite(score) or kind not in _KINDS:
        wanted = "wanted a piece of a text, a score and a kind"
        raise file.error(f"{wanted}; got {text!r:.80}, {score}, {kind}", piece.start)
    return spelled, score, kind


def _check_supported(trainer: Mapping[int, int | slice], normalizer: Mapping[int, int | slice], path: Path) -> None:
    if (kind := trainer.get(MODEL_TYPE, UNIGRAM)) != BPE:
        raise UnsupportedError(f"[tokenizer] the kinds that are there: BPE, type {BPE}; {path} is of type {kind!r:.20}")
    changes = {
        "replaces characters": _is_set(normalizer, CHARACTER_MAP, False),
        "makes one space of several": _is_set(normalizer, SINGLE_SPACES, True),
        "does not mark spaces": not _is_set(normalizer, MARKED_SPACES, True),
        "has spaces at the end of words": _is_set(trainer, SPACE_ENDS_WORDS, False),
    }
    if found := [what for what, it_does in changes.items() if it_does]:
        raise UnsupportedError(f"[tokenizer] wanted pieces of the text as it is; {path} {', '.join(found)}")


def _is_set(settings: Mapping[int, int | slice], number: int, default: bool) -> bool:
    """Whether a flag is set, or bytes are there."""
    value = settings.get(number, default)
    return value.start < value.stop if isinstance(value, slice) else bool(value)


def _special(
    config: Mapping[str, Any], texts: Sequence[str], kinds: Sequence[int], trainer: Mapping[int, int | slice]
) -> dict[str, Any]:
    """The tokens that begin and end a sequence, and whether they are put around a text: as configured, else as trained."""
    ids, found = {text: i for i, text in enumerate(texts)}, {}
    for name, (field, default) in NAMED_IDS.items():
        token, trained = config.get(f"{name}_token"), trainer.get(field, default)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            found[f"{name}_token_id"] = ids[text]
        elif isinstance(trained, int) and trained < len(texts) and kinds[trained] == Kind.CONTROL:  # none is 2 ** 64 - 1
            found[f"{name}_token_id"] = trained
        added = config.get(f"add_{name}_token")
        if isinstance(added, bool):
            found[f"add_{name}_token"] = added
    return found


def _added_tokens(config: Mapping[str, Any], path: Path) -> list[tuple[int, str, bool]]:
    """Id, text and whether it is a special one, of each token that was added after training, by id."""
    given: list[tuple[Any, Any, bool]] = []
    given += [(i, text, False) for text, i in read_if_there(path.with_name("added_tokens.json"), "tokenizer").items()]
    listed = config.get("added_tokens_decoder")
    for i, token in listed.items() if isinstance(listed, dict) else ():
        about = token if isinstance(token, dict) else {}
        number = int(i) if i.isascii() and i.isdigit() and len(i) < 10 else None
        given.append((number, about.get("content"), about.get("special") is True))
    found: dict[int, tuple[str, bool]] = {}
    for i, text, special in given:
        if type(i) is not int or i < 0 or not isinstance(text, str) or not text:
            raise FormatError(f"[tokenizer] wanted added tokens beside {path} as a text and its id; got {text!r:.80}, {i!r:.80}")
        found[i] = text, special
    return [(i, text, special) for i, (text, special) in sorted(found.items())]
