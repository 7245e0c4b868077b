"""Embeddings: hidden states of all tokens of texts, and one vector for each text, pooled from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tensorgraph.errors import FormatError, InputError, UnsupportedError
from tensorgraph.models.architecture import HIDDEN
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.json_file import content_of, read_if_there
from tensorgraph.session import Session

if TYPE_CHECKING:
    from tensorgraph.models.text.checkpoint import Checkpoint
    from tensorgraph.models.text.model import TextModel

Pooling = Literal["mean", "cls", "last", "none"]
Text = str | Sequence[int] | np.ndarray
"""A text, or the ids of its tokens."""

_OF_GGUF = ("none", "mean", "cls", "last", "rank")  # by number
_OF_FOLDERS = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls", "lasttoken": "last"}
_MODE = "pooling_mode_"
_MODULES = ("Transformer", "Pooling", "Normalize")
_MOST_SEQUENCES = 32  # of a decoder, in one step
_SHORTEST = 1e-12  # what a vector's length is taken for at least


def as_pooling(name: object) -> Pooling:
    """A way of pooling by its name.

    Raises: UnsupportedError, InputError: there is none of this name.
    """
    if name == "rank":
        raise UnsupportedError("[embed] pooling rank gives scores of pairs of texts, which are not there; give mean, cls or last")
    if name not in get_args(Pooling):
        raise InputError(f"[embed] wanted pooling mean, cls, last or none; got {name!r}")
    return name  # type: ignore[return-value]


def declared_pooling(file: GGUF | Checkpoint) -> Pooling:
    """How a model's files say that its vectors are made; the mean where they do not say it.

    Raises: FormatError, UnsupportedError: they say something else.
    """
    if not isinstance(file, GGUF):
        return _of_folder(file.folder)
    key = f"{file.architecture}.pooling_type"
    number = file.metadata.get(key, 1)
    if not isinstance(number, int) or not 0 <= number < len(_OF_GGUF):
        raise FormatError(f"[embed] wanted a number from 0 to {len(_OF_GGUF) - 1} in {key!r}; got {number!r}")
    return as_pooling(_OF_GGUF[number])


def _of_folder(folder: Path) -> Pooling:
    """As sentence-transformers writes it."""
    if (folder / "modules.json").is_file():
        _check_modules(folder / "modules.json")
    said = read_if_there(folder / "1_Pooling" / "config.json", "embed")
    modes = [key.removeprefix(_MODE) for key, value in said.items() if key.startswith(_MODE) and value is True] or ["mean"]
    modes = [said["pooling_mode"]] if isinstance(said.get("pooling_mode"), str) else modes
    if len(modes) > 1 or modes[0] not in _OF_FOLDERS:
        raise UnsupportedError(f"[embed] {folder} pools by {', '.join(modes)}, which is not there; give mean, cls or last")
    return as_pooling(_OF_FOLDERS[modes[0]])


def _check_modules(path: Path) -> None:
    """Raises: UnsupportedError where a vector goes through more than pooling; FormatError where the file is something else."""
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(content_of(path, "embed"))]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FormatError(f"[embed] wanted a list of modules, each with its type, in {path}") from None
    others = [kind for kind in kinds if kind not in _MODULES]
    if others:
        wanted = "name a pooling to leave them out"
        raise UnsupportedError(f"[embed] {path} asks for the modules {', '.join(others)}, which are not there; {wanted}")


def encode(model: TextModel, texts: Sequence[Text], *, truncate: bool) -> list[list[int]]:
    """The ids of each text, checked; `truncate` cuts those that are too long, before what ends a sequence.

    Raises: InputError: a text has no token, or more than the model has positions for.
    """
    if isinstance(texts, str | bytes):
        raise InputError(f"[embed] wanted a list of texts; got one text, {texts[:40]!r}")
    found, most = [], model.model.context
    for number, text in enumerate(texts, 1):
        if isinstance(text, bytes) or not isinstance(text, Sequence | np.ndarray):
            raise InputError(f"[embed] wanted texts, or lists of token ids; number {number} is {type(text).__name__}")
        ids = model.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if not ids:
            raise InputError(f"[embed] wanted texts of at least one token; number {number} has none")
        if len(ids) > most and not truncate:
            raise InputError(f"[embed] this model holds {most} tokens; number {number} has {len(ids)} (truncate cuts it)")
        if len(ids) > most:
            end = model.tokenizer.suffix if isinstance(text, str) else []
            ids = [*ids[: most - len(end)], *end]
        found.append(ids)
    return found


def hidden_states(model: TextModel, sequences: Sequence[Sequence[int]], *, batch: int) -> Iterator[np.ndarray]:
    """The hidden states of each sequence of ids after the last norm, in order; steps take `batch` tokens, or a longer sequence.

    Shapes: -> [n, D] each.
    """
    if batch < 1:
        raise InputError(f"[embed] wanted a batch of at least 1 token; got {batch}")
    if not sequences:
        return
    longest = 1 << (max(map(len, sequences)) - 1).bit_length()  # so that few plans serve all texts
    context = min(longest, model.model.context)
    step = max(batch, context) if model.model.encodes else batch
    most = len(sequences) if model.model.encodes else _MOST_SEQUENCES
    with Session(model.engine, context=context, step_tokens=step) as store:
        for group in groups([len(ids) for ids in sequences], step, most):
            work = [(store.sibling(), sequences[i]) for i in group]
            try:
                for found in Session.batch(work, outputs=(HIDDEN,), all_logits=True):
                    yield np.array(found[HIDDEN])
            finally:
                for session, _ in work:
                    session.close()


def groups(lengths: Sequence[int], tokens: int, most: int) -> Iterator[range]:
    """Neighbouring sequences, at most so many and of so many tokens together, or one that is longer."""
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and (total + length > tokens or i - start == most):
            yield range(start, i)
            start, total = i, 0
        total += length
    yield range(start, len(lengths))


def pooled(rows: np.ndarray, pooling: Pooling) -> np.ndarray:
    """One vector of the hidden states of a text, in float64. Shapes: [n, D] -> [D]."""
    found: np.ndarray = rows.mean(0, dtype=np.float64) if pooling == "mean" else rows[0 if pooling == "cls" else -1]
    return found.astype(np.float64)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1. Shapes: [..., D] -> [..., D]."""
    wide = vectors.astype(np.float64)
    scaled: np.ndarray = wide / np.maximum(np.sqrt((wide * wide).sum(-1, keepdims=True)), _SHORTEST)
    return scaled


def embed(rows: Iterator[np.ndarray], pooling: Pooling, *, normalize: bool) -> Iterator[np.ndarray]:
    """The vector of each text, of its hidden states; with pooling `none` of each token. Shapes: [n, D] -> [D] or [n, D]."""
    for states in rows:
        vector: Any = states if pooling == "none" else pooled(states, pooling)
        yield (normalized(vector) if normalize else vector).astype(np.float32)
