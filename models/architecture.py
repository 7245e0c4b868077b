"""Architectures, and models: an architecture with a configuration and the weights of a file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tensorgraph import registry
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.engine import LOGITS
from tensorgraph.errors import FormatError, UnknownNameError, UnsupportedError
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph
from tensorgraph.models.builder import AssumedWeights, Builder, FileWeights, WeightCatalog
from tensorgraph.models.config import as_gguf, read_gguf, read_json
from tensorgraph.models.early_rows import choose_early
from tensorgraph.models.names import Made
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.state import StateSpec

if TYPE_CHECKING:
    from tensorgraph.models.text.checkpoint import Checkpoint

Metadata = Mapping[str, Any]
HIDDEN = "norm"
"""The node of hidden states after the last norm, [O, D], in every architecture."""
TYPES = "tokenizer.ggml.token_type_count"
"""Among the vocabulary's metadata, but the size of a weight."""


class Architecture:
    """What a model file declares: its configuration, its state streams, its graph.

    Args:
        name: `general.architecture` in GGUF files; `also` gives further names.
        config: a dataclass whose fields are spelled as published.
        states: the configuration's state streams by name.
        build: the graph of one step.
        published: names in config.json's `architectures`.
        extra: fields that need more than a key of the metadata: `fn(metadata) -> {field: value}`.
        more: the metadata that is not one field's: `fn(config) -> {key: value}`; keys are without the architecture's prefix
            unless they are the vocabulary's.
        names: of which tensors of a published checkpoint the weights are made.
        optional: ends of the names of the optional weights that each of its models has.
        result: the output of its graph: logits, or of an encoder `HIDDEN`.
    """

    def __init__(
        self,
        name: str,
        *,
        config: type[Any],
        states: Callable[[Any], Mapping[str, StateSpec]],
        build: Callable[[Builder, Any], Graph],
        published: tuple[str, ...] = (),
        also: tuple[str, ...] = (),
        extra: Callable[[Metadata], dict[str, Any]] | None = None,
        more: Callable[[Any], dict[str, Any]] | None = None,
        names: Callable[[Any], Mapping[str, Made]] | None = None,
        optional: tuple[str, ...] = (),
        result: str = LOGITS,
    ) -> None:
        self.name, self.config, self.states, self.build = name, config, states, build
        self.published, self.names, self.result = published, names, result
        self.extra, self.more, self.optional = extra, more, optional
        if not sys._getframe(1).f_globals["__name__"].startswith(f"{__package__}."):
            importlib.import_module(f"{__package__}.all_files")  # one of our names is refused here, not when ours is wanted
        for known in (name, *also):
            registry.architectures.add(known, self)


class WeightFile(Protocol):
    """What weights are read from: an open `GGUF` or `Checkpoint`."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By name what has a `shape` in NumPy order and a `dtype`."""

    def data(self, name: str) -> np.ndarray: ...

    def close(self) -> None: ...


@dataclass
class Model:
    """An architecture, a configuration, and (unless it is only planned) weights.

    Attributes:
        file: the weights; None for a model that is only planned.
    """

    architecture: Architecture
    config: Any
    catalog: WeightCatalog
    file: WeightFile | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def context(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def encodes(self) -> bool:
        """Whether its tokens see those after them, so that a sequence takes one step, and gives no logits."""
        return self.architecture.result == HIDDEN

    def metadata(self) -> dict[str, Any]:
        """The configuration as a GGUF file says it, without the vocabulary; some fields may have no key there."""
        name, more = self.architecture.name, self.architecture.more
        found = {"general.architecture": name} | as_gguf(self.config, name)
        for key, value in (more(self.config) if more else {}).items():
            found[key if key.startswith("tokenizer.") else f"{name}.{key}"] = value
        return found

    def states(self) -> Mapping[str, StateSpec]:
        return self.architecture.states(self.config)

    def graph(self, extents: Extents, kv_dtype: DType, outputs: Sequence[str] | None = None) -> Graph:
        """The graph of one step of at most these extents; the rows whose logits are wanted are chosen as early as can be.

        Args:
            outputs: the names of nodes; the architecture's result where None.

        Raises: UnknownNameError: no node has a wanted name.
        """
        return choose_early(self.graph_as_written(extents, kv_dtype, outputs))

    def graph_as_written(self, extents: Extents, kv_dtype: DType, outputs: Sequence[str] | None = None) -> Graph:
        """The same as the model's file writes it: rows are chosen where it says so.

        Raises: UnknownNameError: no node has a wanted name.
        """
        outputs = (self.architecture.result,) if outputs is None else outputs
        built = self.architecture.build(Builder.begin(self.catalog, extents, kv_dtype, self.states()), self.config)
        return built.with_outputs({name: built.find(name) for name in outputs})

    def weight(self, name: str) -> np.ndarray:
        """A weight as the file holds it.

        Raises:
            UnknownNameError: the model has no such weight, or no weights.
        """
        if self.file is None or name not in self.file.tensors:
            raise UnknownNameError(f"[weight] {name} is missing" + ("" if self.file else ": this model has no weights"))
        return self.file.data(name)


def find_architecture(name: str) -> Architecture:
    """An architecture by a name that GGUF files give it. A file of this folder that has the name, `_` for `-`, is imported
    without the others.

    Raises: UnknownNameError: it is not there; the message lists those that are.
    """
    file = name.replace("-", "_")
    if name not in registry.architectures and file.isidentifier():
        own = f"{__package__}.{file}"
        if importlib.util.find_spec(own) is not None:
            importlib.import_module(own)
    found: Architecture = registry.architectures.get(name)
    return found


def model_from_gguf(file: GGUF) -> Model:
    """The model in an open file.

    Raises:
        UnknownNameError: its architecture is not there; the message lists those that are.
        FormatError: its metadata lacks what the architecture needs.
    """
    architecture = find_architecture(file.architecture)
    config = config_of_metadata(architecture, dict_with_vocabulary(file))
    return Model(architecture, config, _weights_of(file), file)


def config_of_metadata(architecture: Architecture, metadata: Metadata) -> Any:
    """The configuration that a GGUF file says.

    Raises: FormatError: it lacks what the architecture needs.
    """
    extra = architecture.extra(metadata) if architecture.extra else {}
    return read_gguf(architecture.config, metadata, metadata["general.architecture"], extra)


def model_from_checkpoint(file: Checkpoint) -> Model:
    """The model in an open folder, as published on a model hub.

    Raises:
        FormatError: config.json is no such configuration, or tensors do not fit. UnknownNameError: its architecture is not there.
        UnsupportedError: the names of its tensors are not known.
    """
    architecture = _published(file.config, file.folder / "config.json")
    if architecture.names is None:
        raise UnsupportedError(f"[architecture] {architecture.name} is read from GGUF files only, not from {file.folder}")
    config = read_json(architecture.config, file.config)
    file.name(architecture.names(config))
    return Model(architecture, config, _weights_of(file), file)


def _weights_of(file: WeightFile) -> FileWeights:
    return FileWeights({name: (tuple(info.shape), info.dtype) for name, info in file.tensors.items()})


def dict_with_vocabulary(file: GGUF) -> Metadata:
    """Metadata in which `ARCH.vocab_size` is always there: the embeddings have one row a token; without the vocabulary."""
    key = f"{file.architecture}.vocab_size"
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise FormatError("[config] the file has no token_embd.weight [vocab_size, hidden_size]")
    wanted = [k for k in file.metadata if not k.startswith("tokenizer.") or k == TYPES]
    return {**{k: file.metadata[k] for k in wanted}, key: embeddings.shape[0]}


def model_from_config(path: str | Path, dtype: DType | str = "f16") -> Model:
    """A model without weights from a published config.json, for plans; matrices are assumed to be of `dtype`.

    Raises:
        FormatError: the file is not such a configuration. UnknownNameError: its architecture is not there.
    """
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"[config] {path} is not a config.json: {error}") from error
    architecture = _published(given, path)
    head = () if given.get("tie_word_embeddings", False) else ("output.weight",)
    bias = ("exp_probs_b.bias",) if given.get("topk_method") == "noaux_tc" else ()
    present = (*head, *bias, *architecture.optional)
    return Model(architecture, read_json(architecture.config, given), AssumedWeights(as_dtype(dtype), present))


def _published(given: Any, path: str | Path) -> Architecture:
    """The architecture that a config.json names."""
    names = given.get("architectures") if isinstance(given, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise FormatError(f"[config] {path} must be an object with a list of names as 'architectures'; got {names!r}")
    known: dict[str, Architecture] = {}
    for name in registry.architectures:
        known |= dict.fromkeys(registry.architectures.get(name).published, registry.architectures.get(name))
    for name in names:
        if name in known:
            return known[name]
    raise UnknownNameError(f"[architecture] there is no {', '.join(names)}. Known: {', '.join(sorted(known))}")
