"""Model configurations: dataclasses whose fields are spelled as published, read from config.json or from GGUF metadata."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tensorgraph.errors import FormatError

C = TypeVar("C")

LARGEST = 2**31 - 1
MOST_LAYERS = 1024
MOST_EXPERTS = 4096


def from_gguf(
    key: str,
    default: Any = dataclasses.MISSING,
    *,
    stored: Mapping[Any, Any] = types.MappingProxyType({}),
    most: int = LARGEST,
    also: tuple[str, ...] = (),
    leading: bool = False,
) -> Any:
    """A configuration field and its key in GGUF metadata, without the architecture's prefix.

    Args:
        stored: what is stored for a published value, where that is something else.
        most: bounds a number of repetitions, such as layers, so that a damaged file cannot ask for a graph without end.
        also: further keys that hold the same value, which are written and not read.
        leading: it is a number of layers, the first ones.
    """
    metadata = {"gguf": key, "stored": stored, "most": most, "also": also, "leading": leading}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched beyond the original context.

    Attributes:
        mscale, mscale_all_dim: YaRN's magnitudes (DeepSeek), as published.
        truncate: whether YaRN's ramp begins and ends at whole pairs of channels.
        attention_factor: what YaRN multiplies cos and sin by; None is `0.1 ln factor + 1`.
    Raises: FormatError.
    """

    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise FormatError(f"[config] the factor of rope scaling must be above 0; got {self.factor}")
        if self.rope_type in ("yarn", "llama3") and self.original_max_position_embeddings < 1:
            raise FormatError(f"[config] rope scaling {self.rope_type!r} wants original_max_position_embeddings >= 1")

    @property
    def magnitude(self) -> float:
        """What YaRN multiplies cos and sin by. Source: arXiv:2309.00071, section 3.4."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> RopeScaling:
        """From `rope_scaling` or `rope_parameters` of a published configuration."""
        given = _object(config, "rope_scaling") or _object(config, "rope_parameters")
        whole = {"original_max_position_embeddings": config.get("max_position_embeddings"), **given}
        kind = given.get("rope_type") or given.get("type")
        return _scaling({**whole, "rope_type": kind}, "rope_scaling.")

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any], prefix: str) -> RopeScaling:
        """From GGUF's `ARCH.rope.scaling.*`."""

        def get(key: str, default: Any) -> Any:
            return metadata.get(f"{prefix}.rope.scaling.{key}", default)

        multiplier = round(_typed(get("yarn_log_multiplier", 0.0), float, "yarn_log_multiplier") * 10.0, 6)  # 0.1 of it is stored
        factor = get("factor", metadata.get(f"{prefix}.rope.scale_linear")) or 1.0  # 0 is written for none
        kind = get("type", "linear")  # files of the time before YaRN say the factor alone
        found = {
            "rope_type": "default" if kind == "none" or (kind == "linear" and factor == 1.0) else kind,
            "factor": factor,
            "original_max_position_embeddings": get("original_context_length", metadata.get(f"{prefix}.context_length")),
            "beta_fast": get("yarn_beta_fast", None),
            "beta_slow": get("yarn_beta_slow", None),
            "mscale": multiplier,
            "mscale_all_dim": multiplier,
        }
        return _scaling(found, f"{prefix}.rope.scaling.")

    def to_metadata(self, prefix: str) -> dict[str, Any]:
        """The same for `from_metadata`, without `llama3`, which files hold as a tensor of factors."""
        if self.rope_type not in ("linear", "yarn"):
            return {}
        found: dict[str, Any] = {"type": self.rope_type, "factor": self.factor}
        if self.rope_type == "yarn":
            found |= {"original_context_length": self.original_max_position_embeddings}
            found |= {"yarn_beta_fast": self.beta_fast, "yarn_beta_slow": self.beta_slow}
        if self.mscale_all_dim:
            found["yarn_log_multiplier"] = self.mscale_all_dim / 10.0
        return {f"{prefix}.rope.scaling.{key}": value for key, value in found.items()}


def _scaling(given: Mapping[str, Any], where: str) -> RopeScaling:
    """The fields that are there, checked; None is the default."""
    hints = typing.get_type_hints(RopeScaling)
    return RopeScaling(**{n: _typed(given[n], hints[n], where + n) for n in hints if given.get(n) is not None})


def _object(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A value that is an object, empty where it is not there."""
    value = given.get(name) or {}
    if not isinstance(value, Mapping):
        raise FormatError(f"[config] {name} must be an object; got {value!r}")
    return value


def read_gguf(config: type[C], metadata: Mapping[str, Any], architecture: str, extra: Mapping[str, Any] | None = None) -> C:
    """Fill a configuration from GGUF metadata; `extra` gives fields that the metadata has no key for.

    Raises:
        FormatError: a field without a default is missing, or a value has the wrong type; the message names the key.
    """
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if hints[field.name] is RopeScaling:
            values[field.name] = RopeScaling.from_metadata(metadata, architecture)
            continue
        key = field.metadata.get("gguf")
        name = field.name if key is None else f"{architecture}.{key}"
        if extra and field.name in extra:
            values[field.name] = _field(extra[field.name], field, hints[field.name], field.name, published=True)
        elif key is not None and name in metadata:
            value = metadata[name]
            if typing.get_origin(hints[field.name]) is not tuple:
                value = _same_in_all_layers(value, name)
            values[field.name] = _field(value, field, hints[field.name], name)
        elif field.default is dataclasses.MISSING:
            raise FormatError(f"[config] the metadata has no {name!r}, which {config.__module__} needs")
    return config(**values)


def as_gguf(config: Any, architecture: str) -> dict[str, Any]:
    """A configuration as GGUF metadata: the inverse of `read_gguf`, without the fields that have no key."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, RopeScaling):
            found |= value.to_metadata(architecture)
        elif value is not None and "gguf" in field.metadata:
            given = field.metadata["stored"].get(value, value) if field.metadata["stored"] else value
            found |= {f"{architecture}.{key}": given for key in (field.metadata["gguf"], *field.metadata["also"])}
    return found


def by_layer(of: Callable[[Any], tuple[Any, ...]]) -> Any:
    """A field of a value for each layer; `of` gives it, from the configuration, where the field is left empty."""
    return dataclasses.field(default=(), metadata={"by_layer": of})


def keep_layers(config: C, kept: Sequence[int]) -> C:
    """The configuration of some layers, numbered anew: what fields say of each layer, or of the first ones, goes with them."""
    n_layers: int = config.num_hidden_layers  # type: ignore[attr-defined]
    changed: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if "by_layer" in field.metadata:
            value = value or field.metadata["by_layer"](config)
        if isinstance(value, tuple) and len(value) >= n_layers:
            changed[field.name] = tuple(value[i] for i in kept)
        elif field.metadata.get("leading"):
            changed[field.name] = sum(i < value for i in kept)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def read_json(config: type[C], given: Mapping[str, Any]) -> C:
    """Fill a configuration from a published config.json.

    Raises:
        FormatError: a field without a default is missing, or a value has the wrong type; the message names it.
    """
    hints = typing.get_type_hints(config)
    flat = {"rope_theta": _object(given, "rope_parameters").get("rope_theta"), **given}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if hints[field.name] is RopeScaling:
            values[field.name] = RopeScaling.from_json(given)
        elif flat.get(field.name) is not None:
            values[field.name] = _field(flat[field.name], field, hints[field.name], field.name, published=True)
        elif field.default is dataclasses.MISSING:
            raise FormatError(f"[config] the configuration has no {field.name!r}, which {config.__module__} needs")
    return config(**values)


def whole_number(metadata: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """A whole number of GGUF metadata, under the first of the keys that is there.

    Raises:
        FormatError: none is there and there is no default, or it is something else.
    """
    key = next((key for key in keys if key in metadata), keys[0])
    if key not in metadata and default is not None:
        return default
    if key not in metadata:
        raise FormatError(f"[config] the metadata has no {key!r}")
    return int(_typed(_same_in_all_layers(metadata[key], key), int, key))


def _same_in_all_layers(value: Any, name: str) -> Any:
    """The one value of an array that gives it for every layer."""
    if not hasattr(value, "__len__") or isinstance(value, str):
        return value
    if not len(value) or any(getattr(v, "ndim", 0) or v != value[0] for v in value):
        raise FormatError(f"[config] {name} must be the same in all layers; got {list(value[:8])}")
    return value[0].item() if hasattr(value[0], "item") else value[0]


def _field(value: Any, field: dataclasses.Field[Any], hint: Any, name: str, published: bool = False) -> Any:
    """A field's value: its type, and for whole numbers its range; 0 where a size may be absent means that it is."""
    for ours, stored in field.metadata.get("stored", {}).items():
        if not published and type(value) is type(stored) and value == stored:
            value = ours
            break
    found = _typed(value, hint, name)
    if type(found) is not int:
        return found
    if found == 0 and field.default is None:
        return None
    least, most = int(field.default is dataclasses.MISSING), field.metadata.get("most", LARGEST)
    if not least <= found <= most:
        raise FormatError(f"[config] {name} must be from {least} to {most}; got {found}")
    return found


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as a field's type: numbers narrowed, lists made tuples.

    Raises:
        FormatError: it is something else.
    """
    options = [h for h in typing.get_args(hint) if h is not types.NoneType] if isinstance(hint, types.UnionType) else [hint]
    wanted = typing.get_origin(options[0]) or options[0]
    if wanted is Literal and value in typing.get_args(options[0]):
        return value
    if wanted is tuple and hasattr(value, "__len__") and not isinstance(value, str | Mapping):
        return tuple(_typed(v.item() if hasattr(v, "item") else v, typing.get_args(options[0])[0], name) for v in value)
    number = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    if (wanted is float and number) or (wanted is int and number and value == int(value)):
        return wanted(value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    choices = " or ".join(map(repr, typing.get_args(options[0]))) if wanted is Literal else wanted.__name__
    raise FormatError(f"[config] {name} must be {choices}; got {value!r}")
