"""Qwen3: as Llama, with norms of queries and keys within each head, and halves of a head as pairs.

Source: arXiv:2505.09388.
"""

from __future__ import annotations

from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.builder import Builder
from tensorgraph.models.decoder import DecoderConfig, attend, decode, names, queries_keys_values, rotate, states


def build(g: Builder, c: DecoderConfig) -> Graph:
    return decode(g, c, lambda b, x, _: attention(b, x, c))


def attention(g: Builder, x: Node, c: DecoderConfig) -> Node:
    q, k, v = queries_keys_values(g, x, c, qk_norm=True)
    q, k = (rotate(g, h, c.rope_scaling, base=c.rope_theta) for h in (q, k))
    return attend(g, q, k, v, c)


Architecture("qwen3", config=DecoderConfig, states=states, build=build, published=("Qwen3ForCausalLM",), names=names)
