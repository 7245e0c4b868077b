"""Model configurations: dataclasses whose fields are spelled as published, read from config.json or from GGUF metadata."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tensorgraph.errors import FormatError

C = TypeVar("C")


def from_gguf(key: str, default: Any = dataclasses.MISSING, convert: Any = None) -> Any:
    """A configuration field and its key in GGUF metadata, without the architecture's prefix.

    `convert` turns the stored value into the published one.
    """
    return dataclasses.field(default=default, metadata={"gguf": key, "convert": convert})


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched beyond the original context.

    Attributes:
        rope_type: "default", "linear", "yarn" or "llama3".
        mscale, mscale_all_dim: YaRN's magnitudes (DeepSeek), as published.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> RopeScaling:
        """From `rope_scaling` or `rope_parameters` of a published configuration."""
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = given.get("rope_type", given.get("type", "default"))
        names = {f.name for f in dataclasses.fields(RopeScaling)} - {"rope_type"}
        return RopeScaling(rope_type=kind, **{n: given[n] for n in names if given.get(n) is not None})

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any], prefix: str) -> RopeScaling:
        """From GGUF's `ARCH.rope.scaling.*`."""

        def get(key: str, default: Any) -> Any:
            return metadata.get(f"{prefix}.rope.scaling.{key}", default)

        multiplier = round(float(get("yarn_log_multiplier", 0.0)) * 10.0, 6)  # stored as 0.1 * mscale_all_dim
        return RopeScaling(
            rope_type={"none": "default"}.get(get("type", "default"), get("type", "default")),
            factor=float(get("factor", 1.0)),
            original_max_position_embeddings=int(get("original_context_length", 0)),
            beta_fast=float(get("yarn_beta_fast", 32.0)),
            beta_slow=float(get("yarn_beta_slow", 1.0)),
            mscale=multiplier,
            mscale_all_dim=multiplier,
        )


def read_gguf(config: type[C], metadata: Mapping[str, Any], architecture: str, extra: Mapping[str, Any] | None = None) -> C:
    """Fill a configuration from GGUF metadata; `extra` gives fields that the metadata has no key for.

    Raises:
        FormatError: a field without a default is missing, or a value has the wrong type; the message names the key.
    """
    values: dict[str, Any] = dict(extra or {})
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name in values:
            continue
        if hints[field.name] is RopeScaling:
            values[field.name] = RopeScaling.from_metadata(metadata, architecture)
            continue
        key = field.metadata.get("gguf")
        if key is None:
            continue
        name = f"{architecture}.{key}"
        if name in metadata:
            value = metadata[name]
            convert = field.metadata.get("convert")
            values[field.name] = _typed(convert(value) if convert else value, hints[field.name], name)
        elif field.default is dataclasses.MISSING:
            raise FormatError(f"[config] the metadata has no {name!r}, which {config.__module__} needs")
    return config(**values)


def read_json(config: type[C], given: Mapping[str, Any]) -> C:
    """Fill a configuration from a published config.json.

    Raises:
        FormatError: a field without a default is missing, or a value has the wrong type; the message names it.
    """
    hints = typing.get_type_hints(config)
    rope = given.get("rope_parameters") or {}
    flat = {**{k: v for k, v in rope.items() if k == "rope_theta"}, **given}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if hints[field.name] is RopeScaling:
            values[field.name] = RopeScaling.from_json(given)
        elif flat.get(field.name) is not None:
            values[field.name] = _typed(flat[field.name], hints[field.name], field.name)
        elif field.default is dataclasses.MISSING:
            raise FormatError(f"[config] the configuration has no {field.name!r}, which {config.__module__} needs")
    return config(**values)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as a field's type: numbers narrowed, lists made tuples."""
    options = [h for h in typing.get_args(hint) if h is not types.NoneType] if isinstance(hint, types.UnionType) else [hint]
    wanted = typing.get_origin(options[0]) or options[0]
    try:
        if wanted is tuple:
            return tuple(v.item() if hasattr(v, "item") else v for v in value)
        if wanted in (int, float) and isinstance(value, (str, list, tuple)):
            raise TypeError
        return wanted(value)
    except (TypeError, ValueError) as error:
        raise FormatError(f"[config] {name} must be {wanted.__name__}; got {value!r}") from error
