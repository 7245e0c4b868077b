"""Llama 2 and 3, SmolLM2, Mistral: grouped-query attention, rotary positions, gated feed-forward.

Source: arXiv:2307.09288, arXiv:2407.21783.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import embed, feed_forward, flatten, head, heads, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import MOST_LAYERS, RopeScaling, from_gguf
from tensorgraph.ops import flash_attn, rope
from tensorgraph.ops.position import llama3_freq_factors
from tensorgraph.state import StateSpec


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields as published; sizes in elements."""

    vocab_size: int = from_gguf("vocab_size")
    hidden_size: int = from_gguf("embedding_length")
    intermediate_size: int = from_gguf("feed_forward_length")
    num_hidden_layers: int = from_gguf("block_count", most=MOST_LAYERS)
    num_attention_heads: int = from_gguf("attention.head_count")
    num_key_value_heads: int | None = from_gguf("attention.head_count_kv", None)
    head_dim: int | None = from_gguf("attention.key_length", None)
    max_position_embeddings: int = from_gguf("context_length")
    rms_norm_eps: float = from_gguf("attention.layer_norm_rms_epsilon")
    rope_theta: float = from_gguf("rope.freq_base", 10000.0)
    rope_dim: int | None = from_gguf("rope.dimension_count", None)
    sliding_window: int | None = from_gguf("attention.sliding_window", None)
    num_local_experts: int = from_gguf("expert_count", 0)
    rope_scaling: RopeScaling = RopeScaling()

    @property
    def n_head_kv(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


def states(c: Config) -> dict[str, StateSpec]:
    spec = StateSpec((c.n_head_kv, c.head_size), keep=c.sliding_window)
    return {f"blk.{i}.{name}": spec for i in range(c.num_hidden_layers) for name in ("k", "v")}


def build(g: Builder, c: Config) -> Graph:
    if c.num_local_experts:
        raise UnsupportedError(f"[llama] this file is a mixture of {c.num_local_experts} experts (Mixtral), which is not there")
    x = embed(g, c.vocab_size, c.hidden_size)  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x = x + attention(b, norm(b, "attn_norm", x, c.rms_norm_eps), c)
        x = b.tap("out", x + feed_forward(b, norm(b, "ffn_norm", x, c.rms_norm_eps), c.intermediate_size))
    return g.finish(head(g, x, c.vocab_size, c.rms_norm_eps))


def attention(g: Builder, x: Node, c: Config) -> Node:
    q = rotate(g, heads(g.linear("attn_q", x, c.num_attention_heads * c.head_size), c.num_attention_heads), c)  # [T, H, Dh]
    k = rotate(g, heads(g.linear("attn_k", x, c.n_head_kv * c.head_size), c.n_head_kv), c)  # [T, Hkv, Dh]
    v = heads(g.linear("attn_v", x, c.n_head_kv * c.head_size), c.n_head_kv)
    k, v = g.append("k", k), g.append("v", v)  # [S, Hkv, Dh]
    seen = g.segment("k", k, v, window=c.sliding_window)
    o = flash_attn(q, seen, scale=c.head_size**-0.5, pos=g.positions, seq=g.seqs)  # [T, H, Dh]
    return g.linear("attn_output", g.tap("attn_out", flatten(o)), c.hidden_size)


def rotate(g: Builder, x: Node, c: Config) -> Node:
    """Rotary positions; GGUF files hold q and k so that neighbouring channels are pairs."""
    n_dims, scaling = c.rope_dim or c.head_size, c.rope_scaling
    factors = g.root.optional("rope_freqs.weight", n_dims // 2)
    if factors is None and scaling.rope_type == "llama3":
        original = scaling.original_max_position_embeddings
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        factors = g.literal("rope_freqs", llama3_freq_factors(n_dims, c.rope_theta, scaling.factor, low, high, original))
    stretch = 1.0 / scaling.factor if scaling.rope_type in ("linear", "yarn") else 1.0
    yarn: dict[str, Any] = {}
    if scaling.rope_type == "yarn":
        yarn = {"ext_factor": 1.0, "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        yarn |= {"magnitude": scaling.magnitude, "original_context": scaling.original_max_position_embeddings}
    return rope(x, g.positions, factors, n_dims=n_dims, base=c.rope_theta, freq_scale=stretch, **yarn)


Architecture("llama", config=Config, states=states, build=build, published=("LlamaForCausalLM", "MistralForCausalLM"))
