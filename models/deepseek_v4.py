"""DeepSeek V4: a window and compressed rows in one attention, hyper-connections, hash-routed experts.

Letters: T new tokens, S visible rows, D hidden size, H heads, N blocks completed in the step, C residual streams.
Source: DeepSeek-V4 technical report and published configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tensorgraph.dtypes import f32
from tensorgraph.errors import FormatError
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import embed, flatten, heads, logits, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import MOST_EXPERTS, MOST_LAYERS, RopeScaling, from_gguf
from tensorgraph.models.deepseek_v4_names import names
from tensorgraph.models.deepseek_v32 import best_rows
from tensorgraph.models.experts import expert_sum, route, weigh
from tensorgraph.ops import (
    block_pool,
    concat,
    flash_attn,
    fwht,
    get_rows,
    l1_norm,
    mul_mat,
    rms_norm,
    rope,
    sigmoid,
    soft_max,
    softplus,
    sqrt,
    swiglu_clamp,
)
from tensorgraph.state import StateSpec

CSA, HCA = 4, 128
"""Tokens in a block of compressed sparse and of heavily compressed attention; a ratio of 0 is a window alone."""


SQRT_SOFTPLUS = 4
"""GGUF's number for how experts are scored."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields as published; sizes in elements."""

    vocab_size: int = from_gguf("vocab_size")
    hidden_size: int = from_gguf("embedding_length")
    moe_intermediate_size: int = from_gguf("expert_feed_forward_length")
    num_hidden_layers: int = from_gguf("block_count", most=MOST_LAYERS)
    num_attention_heads: int = from_gguf("attention.head_count")
    head_dim: int = from_gguf("attention.key_length", also=("attention.value_length",))
    qk_rope_head_dim: int = from_gguf("rope.dimension_count")
    q_lora_rank: int = from_gguf("attention.q_lora_rank")
    o_lora_rank: int = from_gguf("attention.output_lora_rank")
    o_groups: int = from_gguf("attention.output_group_count")
    n_routed_experts: int = from_gguf("expert_count", most=MOST_EXPERTS)
    n_shared_experts: int = from_gguf("expert_shared_count")
    num_experts_per_tok: int = from_gguf("expert_used_count")
    norm_topk_prob: bool = from_gguf("expert_weights_norm", True)
    routed_scaling_factor: float = from_gguf("expert_weights_scale", 1.0)
    num_hash_layers: int = from_gguf("hash_layer_count", 0, leading=True)
    swiglu_limit: float = from_gguf("swiglu_clamp_exp")
    sliding_window: int = from_gguf("attention.sliding_window")
    compress_ratios: tuple[int, ...] = from_gguf("attention.compress_ratios")
    compress_rope_theta: float = from_gguf("attention.compress_rope_freq_base")
    rope_theta: float = from_gguf("rope.freq_base", 10000.0)
    rope_scaling: RopeScaling = RopeScaling()
    index_n_heads: int = from_gguf("attention.indexer.head_count")
    index_head_dim: int = from_gguf("attention.indexer.key_length")
    index_topk: int = from_gguf("attention.indexer.top_k")
    hc_mult: int = from_gguf("hyper_connection.count")
    hc_sinkhorn_iters: int = from_gguf("hyper_connection.sinkhorn_iterations", most=MOST_LAYERS)
    hc_eps: float = from_gguf("hyper_connection.epsilon")
    max_position_embeddings: int = from_gguf("context_length")
    rms_norm_eps: float = from_gguf("attention.layer_norm_rms_epsilon")

    def __post_init__(self) -> None:
        if len(self.compress_ratios) < self.num_hidden_layers or min(self.compress_ratios) < 0:
            given = f"{list(self.compress_ratios)} for {self.num_hidden_layers} layers"
            raise FormatError(f"[config] compress_ratios must have a ratio of 0 or more for each layer; got {given}")


def metadata(c: Config) -> dict[str, Any]:
    """What GGUF files say besides: a limit for each layer, the scoring function, what the streams' width is."""
    limits = [c.swiglu_limit] * c.num_hidden_layers
    return {
        "attention.head_count_kv": 1,
        "expert_gating_func": SQRT_SOFTPLUS,
        "swiglu_clamp_exp": limits,
        "swiglu_clamp_shexp": limits,
        "embedding_length_out": c.hc_mult * c.hidden_size,
    }


def states(c: Config) -> dict[str, StateSpec]:
    """A window of rows in every layer; compressed rows, and what an unfinished block is pooled from, in most."""
    found: dict[str, StateSpec] = {}
    for i in range(c.num_hidden_layers):
        ratio = c.compress_ratios[i]
        found[f"blk.{i}.window"] = StateSpec((c.head_dim,), keep=c.sliding_window)
        if ratio:
            found |= compressor_states(f"blk.{i}.", "", c.head_dim, ratio)
        if ratio == CSA:
            found |= compressor_states(f"blk.{i}.", "index_", c.index_head_dim, ratio)
    return found


def compressor_states(scope: str, name: str, width: int, ratio: int) -> dict[str, StateSpec]:
    """`rows`: one row a block. `parts`: values and weights of tokens that blocks to come pool; two blocks where they overlap."""
    n = 2 if ratio == CSA else 1
    parts = StateSpec((2, n * width), f32, keep=n * ratio)
    return {f"{scope}{name}parts": parts, f"{scope}{name}rows": StateSpec((width,), every=ratio)}


def build(g: Builder, c: Config) -> Graph:
    x = embed(g, c.vocab_size, c.hidden_size)
    streams = x.reshape(g.T, 1, c.hidden_size).broadcast(g.T, c.hc_mult, c.hidden_size)  # [T, C, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x, post, comb = connect(b, "hc_attn", streams, c)
        streams = spread(attention(b, i, norm(b, "attn_norm", x, c.rms_norm_eps), c), post, comb, streams)
        x, post, comb = connect(b, "hc_ffn", streams, c)
        streams = b.tap("out", spread(moe(b, i, norm(b, "ffn_norm", x, c.rms_norm_eps), c), post, comb, streams))
    wanted = get_rows(streams.reshape(g.T, -1), g.out_ids).reshape(-1, c.hc_mult, c.hidden_size)  # [O, C, D]
    x = g.tap("norm", norm(g, "output_norm", gather_streams(wanted, head_weights(g, wanted, c)), c.rms_norm_eps))
    return g.finish(logits(g, x, c.vocab_size))


# Hyper-connections.


def mixture(g: Builder, name: str, streams: Node, n: int, c: Config) -> Node:
    """The n numbers a token that its normed streams give. Shapes: [T, C, D] -> [T, n]."""
    flat = rms_norm(streams.reshape(streams.shape[0], -1), eps=c.rms_norm_eps)
    return mul_mat(g.weight(f"{name}_fn.weight", n, c.hc_mult * c.hidden_size), flat)


def connect(g: Builder, name: str, streams: Node, c: Config) -> tuple[Node, Node, Node]:
    """A sub-layer's input from the streams, and how its output returns to them.

    Shapes: streams [T, C, D] -> x [T, D], post [T, C], comb [T, src, dst].
    """
    n, n_tokens = c.hc_mult, streams.shape[0]
    mix = mixture(g, name, streams, (2 + n) * n, c)
    scale, base = g.weight(f"{name}_scale.weight", 3), g.weight(f"{name}_base.weight", (2 + n) * n)
    pre = sigmoid(mix[:, :n] * scale[0:1] + base[:n]) + c.hc_eps
    post = sigmoid(mix[:, n : 2 * n] * scale[1:2] + base[n : 2 * n]) * 2.0
    comb = sinkhorn((mix[:, 2 * n :] * scale[2:3] + base[2 * n :]).reshape(n_tokens, n, n), c)
    return gather_streams(streams, pre), post, comb


def sinkhorn(scores: Node, c: Config) -> Node:
    """Nearly doubly stochastic: soft-max over dst, then over src, then dst and src in turn. Shapes: [T, src, dst], the same."""
    m = soft_max(scores) + c.hc_eps
    m = over_src(m, c)
    for _ in range(c.hc_sinkhorn_iters - 1):
        m = over_src(l1_norm(m, eps=c.hc_eps), c)
    return m


def over_src(m: Node, c: Config) -> Node:
    return l1_norm(m.permute(0, 2, 1), eps=c.hc_eps).permute(0, 2, 1)


def gather_streams(streams: Node, pre: Node) -> Node:
    """Shapes: streams [T, C, D], pre [T, C] -> [T, D]."""
    n_tokens, n, width = streams.shape
    return mul_mat(streams.permute(0, 2, 1), pre.reshape(n_tokens, 1, n)).reshape(n_tokens, width)


def spread(y: Node, post: Node, comb: Node, streams: Node) -> Node:
    """`X'[dst] = post[dst] y + Σ_src comb[src, dst] X[src]`. Shapes: y [T, D], streams [T, C, D] -> [T, C, D]."""
    n_tokens, n, width = streams.shape
    kept = mul_mat(streams.permute(0, 2, 1), comb.permute(0, 2, 1))  # [T, dst, D]
    return kept + y.reshape(n_tokens, 1, width).broadcast(n_tokens, n, width) * post.reshape(n_tokens, n, 1)


def head_weights(g: Builder, streams: Node, c: Config) -> Node:
    """The head's own `pre`. Shapes: [O, C, D] -> [O, C]."""
    scale, base = g.weight("output_hc_scale.weight", 1), g.weight("output_hc_base.weight", c.hc_mult)
    return sigmoid(mixture(g, "output_hc", streams, c.hc_mult, c) * scale + base) + c.hc_eps


# Attention.


def rotary(c: Config, ratio: int, width: int) -> dict[str, Any]:
    """Attributes of the rope on the last channels: layers that compress have their own base, and YaRN of magnitude 1."""
    last = {"n_dims": c.qk_rope_head_dim, "offset": width - c.qk_rope_head_dim}
    s = c.rope_scaling
    if not ratio:
        return last | {"base": c.rope_theta}
    if s.rope_type != "yarn":
        return last | {"base": c.compress_rope_theta}
    return last | {
        "base": c.compress_rope_theta,
        "freq_scale": 1.0 / s.factor,
        "ext_factor": 1.0,
        "beta_fast": s.beta_fast,
        "beta_slow": s.beta_slow,
        "original_context": s.original_max_position_embeddings,
    }


def attention(g: Builder, i: int, x: Node, c: Config) -> Node:
    ratio, n_head, width = c.compress_ratios[i], c.num_attention_heads, c.head_dim
    rotation = rotary(c, ratio, width)
    qr = norm(g, "attn_q_a_norm", g.linear("attn_q_a", x, c.q_lora_rank), c.rms_norm_eps)
    q = rms_norm(heads(g.linear("attn_q_b", qr, n_head * width), n_head), eps=c.rms_norm_eps)
    q = rope(q, g.positions, **rotation)  # [T, H, Dh]
    kv = rope(norm(g, "attn_kv_a_norm", g.linear("attn_kv", x, width), c.rms_norm_eps), g.positions, **rotation)
    segments = [g.segment("window", one_head(g.append("window", kv)), window=c.sliding_window)]
    if ratio:
        rows = compress(g, "attn_compressor", "", x, width, ratio, rotation, c)
        ids = select(g, x, qr, c) if ratio == CSA else None
        segments.append(g.segment("rows", one_head(rows), ids=ids))
    sinks = g.weight("attn_sinks.weight", n_head)
    o = flash_attn(q, *segments, scale=width**-0.5, sinks=sinks, pos=g.positions, seq=g.seqs, d_v=width)
    o = rope(o, g.positions, **rotation, inverse=True)  # [T, H, Dh]
    return g.tap("attn_out", grouped_output(g, o, c))


def one_head(rows: Node) -> Node:
    """A row that is key and value of every head. Shapes: [S, Dh] -> [S, 1, Dh]."""
    return rows.reshape(rows.shape[0], 1, -1)


def grouped_output(g: Builder, o: Node, c: Config) -> Node:
    """Each group of heads through its own low-rank projection, all through one. Shapes: [T, H, Dh] -> [T, D]."""
    n_tokens, n = o.shape[0], c.o_groups
    wide = c.num_attention_heads // n * c.head_dim
    first = g.weight("attn_output_a.weight", n * c.o_lora_rank, wide).reshape(n, c.o_lora_rank, wide)
    low = mul_mat(first, o.reshape(n_tokens, n, wide).permute(1, 0, 2)).permute(1, 0, 2)  # [T, G, o_lora]
    return g.linear("attn_output_b", flatten(low), c.hidden_size)


def compress(
    g: Builder, weights: str, name: str, x: Node, width: int, ratio: int, rotation: Mapping[str, Any], c: Config
) -> Node:
    """Append the row of every block that a new token completes, and read all rows.

    A block is pooled by soft-max over its tokens, channel by channel. Where blocks overlap (ratio 4), the first half of the
    channels pools the block before and the second half the block itself, together.

    Shapes: x [T, D] -> [S / ratio, width].
    """
    overlap = ratio == CSA
    wide = 2 * width if overlap else width
    values, gates = g.linear(f"{weights}_kv", x, wide), g.linear(f"{weights}_gate", x, wide)
    both = concat(values.reshape(g.T, 1, wide), gates.reshape(g.T, 1, wide), axis=1)
    parts, rows = f"{name}parts", f"{name}rows"
    seen = g.append(parts, both)  # [S, 2, wide]
    pooled = block_pool(
        seen,
        g.weight(f"{weights}_ape.weight", ratio, wide),
        g.row_pos(parts),
        g.row_seq(parts),
        g.new_rows(rows),
        g.new_row_seqs(rows),
        every=ratio,
        overlap=overlap,
    )  # [N, width]
    row = rope(norm(g, f"{weights}_norm", pooled, c.rms_norm_eps), g.new_row_positions(rows), **rotation)
    return g.append(rows, fwht(row) if name else row)


def select(g: Builder, x: Node, qr: Node, c: Config) -> Node:
    """The compressed rows that the indexer selects. Shapes: x [T, D], qr [T, q_lora] -> ids [T, index_topk]."""
    n_head, width = c.index_n_heads, c.index_head_dim
    rotation = rotary(c, CSA, width)
    keys = compress(g, "indexer_compressor", "index_", x, width, CSA, rotation, c)  # [S / 4, Di]
    q = heads(g.linear("indexer.attn_q_b", qr, n_head * width), n_head)
    q = fwht(rope(q, g.positions, **rotation))  # [T, Hi, Di]
    w = g.linear("indexer.proj", x, n_head) * (n_head * width) ** -0.5  # [T, Hi]
    return g.tap("index_ids", best_rows(g, "index_rows", q, keys, w, c.index_topk))


# Experts.


def moe(g: Builder, i: int, x: Node, c: Config) -> Node:
    scores = sqrt(softplus(g.linear("ffn_gate_inp", x, c.n_routed_experts)))  # [T, E]
    if i < c.num_hash_layers:
        ids = get_rows(g.table("ffn_gate_tid2eid.weight", c.vocab_size, c.num_experts_per_tok), g.tokens)
    else:
        ids = route(scores, g.weight("exp_probs_b.bias", c.n_routed_experts), c.num_experts_per_tok)
    ids = g.tap("experts", ids)
    w = weigh(scores, ids, normalise=c.norm_topk_prob, scale=c.routed_scaling_factor)
    size, unit = c.moe_intermediate_size, partial(swiglu_clamp, limit=c.swiglu_limit)
    routed = expert_sum(g, x, ids, w, n_experts=c.n_routed_experts, size=size, unit=unit)
    wide = c.n_shared_experts * size
    hidden = unit(g.linear("ffn_gate_shexp", x, wide), g.linear("ffn_up_shexp", x, wide))
    return routed + g.linear("ffn_down_shexp", hidden, c.hidden_size)


Architecture(
    "deepseek4",
    config=Config,
    states=states,
    build=build,
    published=("DeepseekV4ForCausalLM",),
    more=metadata,
    names=names,
)
