"""Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values, and halves of a head as pairs.

Source: arXiv:2407.10671.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import embed, feed_forward, head, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.decoder import DecoderConfig, attend, names, queries_keys_values, rotate, states


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Fields as published."""

    use_sliding_window: bool = False


def build(g: Builder, c: Config) -> Graph:
    if c.use_sliding_window:
        raise UnsupportedError("[qwen2] use_sliding_window is set, which no published model does and which is not there")
    x = embed(g, c.vocab_size, c.hidden_size)  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x = x + attention(b, norm(b, "attn_norm", x, c.rms_norm_eps), c)
        x = b.tap("out", x + feed_forward(b, norm(b, "ffn_norm", x, c.rms_norm_eps), c.intermediate_size))
    return g.finish(head(g, x, c.vocab_size, c.rms_norm_eps))


def attention(g: Builder, x: Node, c: Config) -> Node:
    q, k, v = queries_keys_values(g, x, c)  # with biases: the file has them
    q, k = (rotate(g, h, c.rope_scaling, base=c.rope_theta) for h in (q, k))
    return attend(g, q, k, v, c)


Architecture("qwen2", config=Config, states=states, build=build, published=("Qwen2ForCausalLM",), names=names)
