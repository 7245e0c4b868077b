"""BERT: an encoder, each of whose tokens sees all of its sequence; learned positions, token types, norms after the sums.

A sequence is computed in one step and leaves no state: several of them in a step are told apart by `seqs`.

Source: arXiv:1810.04805.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import HIDDEN, TYPES, Architecture, Metadata
from tensorgraph.models.blocks import flatten, heads
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import MOST_LAYERS, from_gguf
from tensorgraph.models.names import Made, same
from tensorgraph.op import Op
from tensorgraph.ops import flash_attn, gelu, gelu_erf, get_rows, norm, relu
from tensorgraph.ops.attention import Segment

UNITS: dict[str, Op] = {"gelu": gelu_erf, "gelu_new": gelu, "gelu_pytorch_tanh": gelu, "relu": relu}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields as published; sizes in elements. GGUF files do not say `hidden_act`."""

    vocab_size: int = from_gguf("vocab_size")
    hidden_size: int = from_gguf("embedding_length")
    intermediate_size: int = from_gguf("feed_forward_length")
    num_hidden_layers: int = from_gguf("block_count", most=MOST_LAYERS)
    num_attention_heads: int = from_gguf("attention.head_count")
    max_position_embeddings: int = from_gguf("context_length")
    type_vocab_size: int = 2
    layer_norm_eps: float = from_gguf("attention.layer_norm_epsilon")
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: bool = from_gguf("attention.causal", False)


def build(g: Builder, c: Config) -> Graph:
    if c.is_decoder:
        raise UnsupportedError("[bert] this model is a decoder (is_decoder, attention.causal); encoders alone are there")
    x = g.tap("embed", layer_norm(g, "token_embd_norm", embed(g, c), c))  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x = layer_norm(b, "attn_output_norm", x + attention(b, x, c), c)
        x = b.tap("out", layer_norm(b, "layer_output_norm", x + feed_forward(b, x, c), c))
    return g.finish(get_rows(x, g.out_ids), HIDDEN)


def embed(g: Builder, c: Config) -> Node:
    """Of each token, of its position, and of the first type of tokens. Shapes: -> [T, D]."""
    tokens = get_rows(g.weight("token_embd.weight", c.vocab_size, c.hidden_size), g.tokens)
    positions = get_rows(g.weight("position_embd.weight", c.max_position_embeddings, c.hidden_size), g.positions)
    types = g.weight("token_types.weight", c.type_vocab_size, c.hidden_size)
    return tokens + positions + get_rows(types, g.literal("first_type", np.zeros(1, np.int32)))


def attention(g: Builder, x: Node, c: Config) -> Node:
    q, k, v = (heads(g.linear(f"attn_{n}", x, c.hidden_size, biased=True), c.num_attention_heads) for n in "qkv")  # [T, H, Dh]
    scale = (c.hidden_size // c.num_attention_heads) ** -0.5
    o = flash_attn(q, Segment(k, v, seq=g.seqs, causal=False), scale=scale, seq=g.seqs)  # [T, H, Dh]
    return g.linear("attn_output", g.tap("attn_out", flatten(o)), c.hidden_size, biased=True)


def feed_forward(g: Builder, x: Node, c: Config) -> Node:
    up = g.linear("ffn_up", x, c.intermediate_size, biased=True)
    return g.linear("ffn_down", UNITS[c.hidden_act](up), c.hidden_size, biased=True)


def layer_norm(g: Builder, name: str, x: Node, c: Config) -> Node:
    weight, bias = (g.weight(f"{name}.{kind}", c.hidden_size) for kind in ("weight", "bias"))
    return norm(x, weight, bias, eps=c.layer_norm_eps)


LAYER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
EMBEDDINGS = {
    "token_embd.weight": "word_embeddings.weight",
    "position_embd.weight": "position_embeddings.weight",
    "token_types.weight": "token_type_embeddings.weight",
    "token_embd_norm.weight": "LayerNorm.weight",
    "token_embd_norm.bias": "LayerNorm.bias",
}


def names(c: Config) -> dict[str, Made]:
    found = {ours: stored(f"embeddings.{theirs}") for ours, theirs in EMBEDDINGS.items()}
    for i in range(c.num_hidden_layers):
        for ours, theirs in LAYER.items():
            for kind in ("weight", "bias"):
                found[f"blk.{i}.{ours}.{kind}"] = stored(f"encoder.layer.{i}.{theirs}.{kind}")
    return found


def stored(name: str) -> Made:
    """A tensor under its name, in a model with a head `bert.` before it, and in the oldest files norms by Greek letters."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    made: Made | None = None
    for each in (f"bert.{old}", old, f"bert.{name}", name):
        made = replace(same(each), otherwise=made)
    assert made is not None
    return made


def extra(metadata: Metadata) -> dict[str, Any]:
    count = metadata.get(TYPES)
    return {} if count is None else {"type_vocab_size": count}


Architecture(
    "bert",
    config=Config,
    states=lambda c: {},
    build=build,
    published=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
    extra=extra,
    more=lambda c: {TYPES: c.type_vocab_size},
    names=names,
    result=HIDDEN,
)
