"""The shape of a file: a model's configuration as it was changed, and its tensors and metadata."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.dtypes import DType, f32, i32
from tensorgraph.errors import FormatError, InputError
from tensorgraph.extents import Extents
from tensorgraph.models import Model
from tensorgraph.models.architecture import config_of_metadata
from tensorgraph.models.builder import Wanted, WeightCatalog
from tensorgraph.models.config import keep_layers, read_json
from tensorgraph.models.text.gguf_writer import NewTensor
from tensorgraph.tools.synth.rules import TypeRules

FREQUENCIES = "rope_freqs.weight"
TIED = "tie_word_embeddings"
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """What is to be written.

    Attributes:
        given: contents that are not random.
    """

    model: Model
    metadata: Mapping[str, Any]
    tensors: tuple[NewTensor, ...]
    given: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class KeptWeights:
    """The weights that a model's layers have, of those that are kept; floats in f32.

    Attributes:
        of: those of the model that the shape is taken from.
        layers: the kept ones, by their numbers there.
        decided: of some optional weights, whether they are there.
    """

    of: WeightCatalog
    layers: tuple[int, ...]
    decided: Mapping[str, bool]

    def find(self, name: str, shape: tuple[int, ...], wanted: Wanted) -> tuple[tuple[int, ...], DType] | None:
        there = _LAYER.sub(lambda match: f"blk.{self.layers[int(match[1])]}.", name)
        if wanted == "optional" and not self.decided.get(name, self.of.find(there, shape, wanted) is not None):
            return None
        return shape, i32 if wanted == "table" else f32


def shape_of(
    model: Model, rules: TypeRules, *, layers: str | None = None, experts: int | None = None, changes: Sequence[str] = ()
) -> Shape:
    """A model's shape, with changed fields (`NAME=VALUE`), some of its layers and experts.

    Raises: InputError: the changes name no field, or no such layers. FormatError: they do not fit, or a file cannot say them.
    """
    config, n_layers = model.config, model.config.num_hidden_layers
    decided: dict[str, bool] = {}
    if changes:
        changed = with_changes(dataclasses.asdict(config), changes)
        config = read_json(type(config), changed)
        if changed.get(TIED) != getattr(model.config, TIED, None):
            decided["output.weight"] = not changed[TIED]
    kept = parse_layers(layers, config.num_hidden_layers) if layers else tuple(range(config.num_hidden_layers))
    config = keep_layers(config, kept)
    if experts is not None:
        config = _with_experts(config, experts)
    given = {} if (factors := _frequencies(model, config)) is None else {FREQUENCIES: factors}
    decided |= dict.fromkeys(given, True)
    like = tuple(min(i, n_layers - 1) for i in kept)  # there may be more than the model has
    shaped = Model(model.architecture, config, KeptWeights(model.catalog, like, decided))
    return Shape(shaped, metadata_of(shaped), tuple(_tensors(shaped, rules)), given)


def with_changes(fields: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A configuration's fields with others by `NAME=VALUE`, values as in JSON or texts; `NAME.NAME` is in an object.

    Raises: InputError.
    """
    names, found = [], dict(fields)
    for outer, value in fields.items():
        names += [f"{outer}.{inner}" for inner in value] if isinstance(value, dict) else [outer]
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise InputError(f"[synth] --set wants NAME=VALUE with a name of {', '.join(names)}; got {text!r}")
        try:
            given = json.loads(value)
        except ValueError:
            given = value
        outer, dot, inner = name.partition(".")
        found[outer] = {**found[outer], inner: given} if dot else given
    return found


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """`N`, the first N, or numbers and ranges, ends included, such as `0,3` or `2-5`.

    Raises: InputError: there are no such layers.
    """
    parts = re.findall(r"(\d+)(?:-(\d+))?", text) if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*,?", text) else []
    if text.isdigit():
        found = list(range(int(text)))
    else:
        found = [i for first, last in parts for i in range(int(first), int(last or first) + 1)]
    if not found or found != sorted(set(found)) or found[-1] >= n_layers:
        raise InputError(
            f"[synth] --layers wants a number N (the first N) or rising numbers and ranges, such as 0,2-5, of "
            f"{n_layers} layers; got {text!r}"
        )
    return tuple(found)


def _with_experts(config: Any, experts: int) -> Any:
    fields = [f.name for f in dataclasses.fields(config) if f.metadata.get("gguf") == "expert_count"]
    if not fields or not getattr(config, fields[0]):
        raise InputError("[synth] --experts is for mixtures of experts, which this model is not")
    return dataclasses.replace(config, **{fields[0]: experts})


def _frequencies(model: Model, config: Any) -> np.ndarray | None:
    """What divides rotary frequencies, where files hold it as a tensor: by the configuration, or as the model's file has it."""
    from tensorgraph.ops.position import llama3_freq_factors

    s = getattr(config, "rope_scaling", None)
    if s is not None and s.rope_type == "llama3":
        original = s.original_max_position_embeddings
        n_dims, base = getattr(config, "rope_dim", None) or config.head_size, config.rope_theta
        return llama3_freq_factors(n_dims, base, s.factor, s.low_freq_factor, s.high_freq_factor, original).astype(np.float32)
    return model.file.data(FREQUENCIES) if model.file is not None and FREQUENCIES in model.file.tensors else None


def metadata_of(model: Model) -> dict[str, Any]:
    """The model's metadata but for the vocabulary; what is read of it makes the same graph.

    Raises: FormatError: a file of this architecture cannot say what the configuration does.
    """
    found = {"general.name": "synthetic"} | model.metadata()
    read = Model(model.architecture, config_of_metadata(model.architecture, found), model.catalog)
    if str(graph_of(read)) != str(graph_of(model)):
        fields = [field.name for field in dataclasses.fields(model.config)]
        differ = [name for name in fields if getattr(model.config, name) != getattr(read.config, name)]
        where = f"GGUF files of {model.architecture.name} have no key for {' and '.join(differ)}"
        raise FormatError(f"[synth] {where}, and other layers would be read from this one")
    return found


def graph_of(model: Model) -> Any:
    return model.graph_as_written(Extents(1, model.context), f32)


def _tensors(model: Model, rules: TypeRules) -> list[NewTensor]:
    """Embeddings, layers in order, and the rest."""
    nodes = [node for node in graph_of(model).constants.values() if node.data is None]

    def place(name: str) -> tuple[float, str]:
        layer = _LAYER.match(name)
        return (float(layer[1]) if layer else -1.0 if name.startswith("token_") else math.inf), name

    nodes.sort(key=lambda node: place(node.name))
    matrices = [node.name for node in nodes if len(node.shape) > 1 and node.dtype != i32]
    rules.check_used(matrices)
    return [
        NewTensor(node.name, rules.of(node.name, node.shape, f32) if node.name in matrices else node.dtype, node.shape)
        for node in nodes
    ]
