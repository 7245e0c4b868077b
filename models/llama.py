"""Llama 2 and 3, SmolLM2, Mistral: grouped-query attention, rotary positions, gated feed-forward.

Source: arXiv:2307.09288, arXiv:2407.21783.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node
from tensorgraph.models import decoder
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import from_gguf
from tensorgraph.models.decoder import DecoderConfig, attend, decode, queries_keys_values, states
from tensorgraph.models.names import Made, neighbours


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Fields as published."""

    rope_dim: int | None = from_gguf("rope.dimension_count", None)
    sliding_window: int | None = from_gguf("attention.sliding_window", None)
    num_local_experts: int = from_gguf("expert_count", 0)

    def window(self, layer: int) -> int | None:
        return self.sliding_window


def names(c: Config) -> dict[str, Made]:
    """Published checkpoints hold q and k so that the halves of a head are pairs."""
    found = decoder.names(c)
    for name, made in found.items():
        if ".attn_q." in name or ".attn_k." in name:
            found[name] = neighbours(made.of[0], c.num_attention_heads if ".attn_q." in name else c.n_head_kv)
    return found


def build(g: Builder, c: Config) -> Graph:
    if c.num_local_experts:
        raise UnsupportedError(f"[llama] this file is a mixture of {c.num_local_experts} experts (Mixtral), which is not there")
    return decode(g, c, lambda b, x, _: attention(b, x, c))


def attention(g: Builder, x: Node, c: Config) -> Node:
    q, k, v = queries_keys_values(g, x, c)
    return attend(g, rotate(g, q, c), rotate(g, k, c), v, c, window=c.sliding_window)


def rotate(g: Builder, x: Node, c: Config) -> Node:
    """Rotary positions; GGUF files hold q and k so that neighbouring channels are pairs."""
    return decoder.rotate(g, x, c.rope_scaling, base=c.rope_theta, n_dims=c.rope_dim, layout="interleaved")


Architecture(
    "llama",
    config=Config,
    states=states,
    build=build,
    published=("LlamaForCausalLM", "MistralForCausalLM"),
    names=names,
    more=lambda c: {"rope.dimension_count": c.rope_dim or c.head_size},
)
