"""Qwen3-MoE: Qwen3's attention, and a mixture of experts weighed by a soft-max over all of them.

Source: arXiv:2505.09388.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import MOST_EXPERTS, from_gguf
from tensorgraph.models.decoder import DecoderConfig, decode, states
from tensorgraph.models.experts import expert_sum, route, weigh
from tensorgraph.models.names import LAYER, Made, made_of_experts, made_of_layers
from tensorgraph.models.qwen3 import attention
from tensorgraph.ops import soft_max


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Fields as published."""

    num_experts: int = from_gguf("expert_count", most=MOST_EXPERTS)
    num_experts_per_tok: int = from_gguf("expert_used_count")
    moe_intermediate_size: int = from_gguf("expert_feed_forward_length")
    norm_topk_prob: bool = True  # GGUF files have no key for it
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()


def names(c: Config) -> dict[str, Made]:
    """Published checkpoints hold a matrix for each expert."""
    layers = made_of_layers(c.num_hidden_layers, {**LAYER, "ffn_gate_inp": "mlp.gate"}, tied=c.tie_word_embeddings)
    return layers | made_of_experts(range(c.num_hidden_layers), c.num_experts)


def build(g: Builder, c: Config) -> Graph:
    if c.decoder_sparse_step != 1 or c.mlp_only_layers:
        raise UnsupportedError("[qwen3moe] layers without experts (decoder_sparse_step not 1, or mlp_only_layers) are not there")
    return decode(g, c, lambda b, x, _: attention(b, x, c), lambda b, x: moe(b, x, c))


def moe(g: Builder, x: Node, c: Config) -> Node:
    scores = soft_max(g.linear("ffn_gate_inp", x, c.num_experts))  # [T, E]
    ids = g.tap("experts", route(scores, None, c.num_experts_per_tok))
    w = weigh(scores, ids, normalise=c.norm_topk_prob, scale=1.0)
    return expert_sum(g, x, ids, w, n_experts=c.num_experts, size=c.moe_intermediate_size)


Architecture("qwen3moe", config=Config, states=states, build=build, published=("Qwen3MoeForCausalLM",), names=names)
