"""GLM-5 with sparse attention: DeepSeek V3.2's graph, interleaved index rotation, selections shared between layers.

Source: the GlmMoeDsa configuration as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tensorgraph.errors import FormatError
from tensorgraph.graph import Graph, Node
from tensorgraph.models import deepseek_v2, deepseek_v32
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.builder import Builder
from tensorgraph.state import StateSpec


@dataclass(frozen=True, kw_only=True)
class Config(deepseek_v32.Config):
    """`indexer_types`: per layer "full" (its own selection) or "shared" (that of the layer before)."""

    indexer_types: tuple[Literal["full", "shared"], ...] = ()

    def __post_init__(self) -> None:
        types = self.indexer_types
        if types and (len(types) < self.num_hidden_layers or types[0] != "full"):
            raise FormatError(f"[config] indexer_types must have one a layer, the first 'full'; got {list(types)}")

    def is_full(self, i: int) -> bool:
        return not self.indexer_types or self.indexer_types[i] == "full"


def from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    flags = metadata.get(f"{metadata['general.architecture']}.attention.indexer.types", ())
    return deepseek_v2.from_metadata(metadata) | {"indexer_types": tuple("full" if f else "shared" for f in flags)}


def metadata(c: Config) -> dict[str, Any]:
    return deepseek_v32.metadata(c) | {"attention.indexer.types": [c.is_full(i) for i in range(c.num_hidden_layers)]}


def states(c: Config) -> dict[str, StateSpec]:
    return {n: s for n, s in deepseek_v32.states(c).items() if not n.endswith("index_k") or c.is_full(int(n.split(".")[1]))}


def build(g: Builder, c: Config) -> Graph:
    selected: list[Node] = []

    def select(b: Builder, i: int, x: Node, qr: Node) -> Node:
        if c.is_full(i):
            selected.append(deepseek_v32.select(b, x, qr, c, layout="interleaved"))
        return selected[-1]

    return deepseek_v2.build(g, c, select)


Architecture(
    "glm-dsa",
    config=Config,
    states=states,
    build=build,
    published=("GlmMoeDsaForCausalLM",),
    extra=from_metadata,
    more=metadata,
    names=deepseek_v32.names,
)
