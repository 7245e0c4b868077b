"""Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values, and halves of a head as pairs.

Source: arXiv:2407.10671.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.builder import Builder
from tensorgraph.models.decoder import DecoderConfig, attend, decode, names, queries_keys_values, rotate, states


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Fields as published."""

    use_sliding_window: bool = False


def build(g: Builder, c: Config) -> Graph:
    if c.use_sliding_window:
        raise UnsupportedError("[qwen2] use_sliding_window is set, which no published model does and which is not there")
    return decode(g, c, lambda b, x, _: attention(b, x, c))


def attention(g: Builder, x: Node, c: Config) -> Node:
    q, k, v = queries_keys_values(g, x, c)  # with biases: the file has them
    q, k = (rotate(g, h, c.rope_scaling, base=c.rope_theta) for h in (q, k))
    return attend(g, q, k, v, c)


Architecture(
    "qwen2",
    config=Config,
    states=states,
    build=build,
    published=("Qwen2ForCausalLM",),
    names=names,
    optional=("attn_q.bias", "attn_k.bias", "attn_v.bias"),
)
