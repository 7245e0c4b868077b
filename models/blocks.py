"""Blocks that several architectures share."""

from __future__ import annotations

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.models.builder import Builder
from tensorgraph.op import Op
from tensorgraph.ops import get_rows, mul_mat, rms_norm, swiglu
from tensorgraph.source import hide_source

hide_source(__file__)


def heads(x: Node, n_head: int) -> Node:
    """Split the last axis into heads. Shapes: [T, H * Dh] -> [T, H, Dh]."""
    return x.reshape(*x.shape[:-1], n_head, -1)


def flatten(x: Node) -> Node:
    """Join heads. Shapes: [T, H, Dh] -> [T, H * Dh]."""
    return x.reshape(*x.shape[:-2], -1)


def norm(g: Builder, name: str, x: Node, eps: float) -> Node:
    """RMS norm with the weight `name`. Shapes: [..., D] -> [..., D]."""
    width = x.shape[-1]
    assert isinstance(width, int)
    return rms_norm(x, g.weight(f"{name}.weight", width), eps=eps)


def embed(g: Builder, vocab_size: int, hidden_size: int, scale: float = 1.0) -> Node:
    """The tokens' embeddings, times `scale`. Shapes: -> [T, D]."""
    rows = get_rows(g.weight("token_embd.weight", vocab_size, hidden_size), g.tokens)
    return g.tap("embed", rows if scale == 1.0 else rows * scale)


def feed_forward(g: Builder, x: Node, size: int, suffix: str = "", *, unit: Op = swiglu) -> Node:
    """`down(unit(gate x, up x))`, such as `down(silu(gate x) * up x)`. Shapes: [T, D] -> [T, D]."""
    width = x.shape[-1]
    assert isinstance(width, int)
    gate, up = g.linear(f"ffn_gate{suffix}", x, size), g.linear(f"ffn_up{suffix}", x, size)
    return g.linear(f"ffn_down{suffix}", unit(gate, up), width)


def head(g: Builder, x: Node, vocab_size: int, eps: float) -> Node:
    """Output norm and language head on the rows that are asked for. Shapes: [T, D] -> [O, V]."""
    return logits(g, g.tap("norm", norm(g, "output_norm", get_rows(x, g.out_ids), eps)), vocab_size)


def logits(g: Builder, x: Node, vocab_size: int) -> Node:
    """The language head: its own weights, or the embeddings' where it has none. Shapes: [O, D] -> [O, V]."""
    width: Extent = x.shape[-1]
    assert isinstance(width, int)
    weight = g.optional("output.weight", vocab_size, width)
    return mul_mat(g.weight("token_embd.weight", vocab_size, width) if weight is None else weight, x)
