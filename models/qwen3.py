"""Qwen3: as Llama, with norms of queries and keys within each head, and halves of a head as pairs.

Source: arXiv:2505.09388.
"""

from __future__ import annotations

from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import embed, feed_forward, head, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.decoder import DecoderConfig, attend, names, queries_keys_values, rotate, states


def build(g: Builder, c: DecoderConfig) -> Graph:
    x = embed(g, c.vocab_size, c.hidden_size)  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x = x + attention(b, norm(b, "attn_norm", x, c.rms_norm_eps), c)
        x = b.tap("out", x + feed_forward(b, norm(b, "ffn_norm", x, c.rms_norm_eps), c.intermediate_size))
    return g.finish(head(g, x, c.vocab_size, c.rms_norm_eps))


def attention(g: Builder, x: Node, c: DecoderConfig) -> Node:
    q, k, v = queries_keys_values(g, x, c, qk_norm=True)
    q, k = (rotate(g, h, c.rope_scaling, base=c.rope_theta) for h in (q, k))
    return attend(g, q, k, v, c)


Architecture("qwen3", config=DecoderConfig, states=states, build=build, published=("Qwen3ForCausalLM",), names=names)
