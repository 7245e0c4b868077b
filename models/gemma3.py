"""Gemma 3, text: layers that see a window and, every sixth, all; two rotary bases; norms before and after; tanh GELU.

Source: arXiv:2503.19786.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import embed, feed_forward, head, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import RopeScaling, from_gguf
from tensorgraph.models.decoder import WindowedConfig, attend, queries_keys_values, rotate, states
from tensorgraph.models.names import LAYER, Made, made_of_layers, plus_one
from tensorgraph.ops import geglu

LAYERS_OF_27B = 62


@dataclass(frozen=True, kw_only=True)
class Config(WindowedConfig):
    """Fields as published."""

    sliding_window_pattern: int = 6
    rope_local_base_freq: float = from_gguf("rope.freq_base_swa", 10000.0)
    query_pre_attn_scalar: int = from_gguf("attention.query_pre_attn_scalar", 0)
    tie_word_embeddings: bool = True

    def slides(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_window_pattern != 0

    @property
    def scale(self) -> float:
        """GGUF files do not say it: the head's size, and in the largest model the hidden size over the heads."""
        largest = self.num_hidden_layers == LAYERS_OF_27B
        size = self.hidden_size // self.num_attention_heads if largest else self.head_size
        return 1.0 / math.sqrt(self.query_pre_attn_scalar or size)


def names(c: Config) -> dict[str, Made]:
    """Published checkpoints hold what norms multiply by as its distance from 1."""
    layer = {
        **LAYER,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    found = made_of_layers(c.num_hidden_layers, layer, tied=c.tie_word_embeddings)
    return {name: plus_one(made.of[0]) if "norm" in name else made for name, made in found.items()}


def build(g: Builder, c: Config) -> Graph:
    x = embed(g, c.vocab_size, c.hidden_size, math.sqrt(c.hidden_size))  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        y = attention(b, norm(b, "attn_norm", x, c.rms_norm_eps), c, c.window(i))
        x = x + norm(b, "post_attention_norm", y, c.rms_norm_eps)
        y = feed_forward(b, norm(b, "ffn_norm", x, c.rms_norm_eps), c.intermediate_size, unit=geglu)
        x = b.tap("out", x + norm(b, "post_ffw_norm", y, c.rms_norm_eps))
    return g.finish(head(g, x, c.vocab_size, c.rms_norm_eps))


def attention(g: Builder, x: Node, c: Config, window: int | None) -> Node:
    q, k, v = queries_keys_values(g, x, c, qk_norm=True)
    base, scaling = (c.rope_theta, c.rope_scaling) if window is None else (c.rope_local_base_freq, RopeScaling())
    q, k = (rotate(g, h, scaling, base=base) for h in (q, k))
    return attend(g, q, k, v, c, scale=c.scale, window=window)


Architecture("gemma3", config=Config, states=states, build=build, published=("Gemma3ForCausalLM",), names=names)
