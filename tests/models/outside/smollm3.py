"""SmolLM3, as a user of tensorgraph writes an architecture of his own: every fourth layer has no positions.

Source: the SmolLM3 configuration as published; arXiv:2501.18795 for layers without positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.builder import Builder
from tensorgraph.models.decoder import DecoderConfig, attend, decode, names, queries_keys_values, rotate, states


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Fields as published; 1 in `no_rope_layers` is a layer that has positions."""

    no_rope_layers: tuple[int, ...] = ()
    no_rope_layer_interval: int = 4

    def turns(self, layer: int) -> bool:
        return bool(self.no_rope_layers[layer]) if self.no_rope_layers else (layer + 1) % self.no_rope_layer_interval != 0


def build(g: Builder, c: Config) -> Graph:
    return decode(g, c, lambda b, x, i: attention(b, x, c, c.turns(i)))


def attention(g: Builder, x: Node, c: Config, turns: bool) -> Node:
    q, k, v = queries_keys_values(g, x, c)
    if turns:
        q, k = (rotate(g, h, c.rope_scaling, base=c.rope_theta) for h in (q, k))
    return attend(g, q, k, v, c)


Architecture("smollm3", config=Config, states=states, build=build, published=("SmolLM3ForCausalLM",), names=names)
