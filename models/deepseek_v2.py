"""DeepSeek V2, V2-Lite and V3: multi-head latent attention and grouped, biased experts.

Source: arXiv:2405.04434, arXiv:2412.19437.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tensorgraph.dims import ALWAYS, maximum
from tensorgraph.graph import Graph, Node, choose
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import embed, feed_forward, flatten, head, heads, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import MOST_EXPERTS, MOST_LAYERS, RopeScaling, from_gguf, whole_number
from tensorgraph.models.experts import expert_sum, route, weigh
from tensorgraph.models.names import LAYER, Made, keys_of_latents, made_of_experts, made_of_layers, same, values_of_latents
from tensorgraph.ops import concat, cont, flash_attn, mul_mat, rope, sigmoid, soft_max
from tensorgraph.state import StateSpec

GATING = {"softmax": 1, "sigmoid": 2}
"""GGUF's numbers for `scoring_func`."""

Select = Callable[[Builder, int, Node, Node], Node | None]
"""Which rows a layer attends to: `(g, layer, x [T, D], qr [T, q_lora]) -> ids [T, K]`, or None for all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields as published; sizes in elements."""

    vocab_size: int = from_gguf("vocab_size")
    hidden_size: int = from_gguf("embedding_length")
    intermediate_size: int = from_gguf("feed_forward_length")
    moe_intermediate_size: int = from_gguf("expert_feed_forward_length")
    num_hidden_layers: int = from_gguf("block_count", most=MOST_LAYERS)
    num_attention_heads: int = from_gguf("attention.head_count")
    q_lora_rank: int | None = from_gguf("attention.q_lora_rank", None)
    kv_lora_rank: int = from_gguf("attention.kv_lora_rank")
    qk_nope_head_dim: int
    qk_rope_head_dim: int = from_gguf("rope.dimension_count")
    v_head_dim: int
    n_routed_experts: int = from_gguf("expert_count", most=MOST_EXPERTS)
    n_shared_experts: int = from_gguf("expert_shared_count")
    num_experts_per_tok: int = from_gguf("expert_used_count")
    first_k_dense_replace: int = from_gguf("leading_dense_block_count", 0, leading=True)
    n_group: int = from_gguf("expert_group_count", 1)
    topk_group: int = from_gguf("expert_group_used_count", 1)
    routed_scaling_factor: float = from_gguf("expert_weights_scale", 1.0)
    norm_topk_prob: bool = from_gguf("expert_weights_norm", False)
    scoring_func: Literal["softmax", "sigmoid"] = from_gguf("expert_gating_func", "softmax", stored=GATING)
    max_position_embeddings: int = from_gguf("context_length")
    rms_norm_eps: float = from_gguf("attention.layer_norm_rms_epsilon")
    rope_theta: float = from_gguf("rope.freq_base", 10000.0)
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False  # of published checkpoints; a GGUF file then has no output weight


PUBLISHED = LAYER | {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
"""What published checkpoints call a layer's weights."""


def names(c: Config, layer: Mapping[str, str] = PUBLISHED) -> dict[str, Made]:
    found = made_of_layers(c.num_hidden_layers, layer, tied=c.tie_word_embeddings)
    for i in range(c.num_hidden_layers):
        both = f"model.layers.{i}.self_attn.kv_b_proj.weight", c.num_attention_heads, c.qk_nope_head_dim
        found[f"blk.{i}.attn_k_b.weight"], found[f"blk.{i}.attn_v_b.weight"] = keys_of_latents(*both), values_of_latents(*both)
        found[f"blk.{i}.exp_probs_b.bias"] = same(f"model.layers.{i}.mlp.gate.e_score_correction_bias")
    return found | made_of_experts(range(c.num_hidden_layers), c.n_routed_experts)


def from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that GGUF has no key for: head sizes without the rotary part, layers without those for prediction.

    Files with an unsplit `attn_kv_b` give the sizes of a head where newer ones give those of a latent.
    """

    def number(*keys: str, default: int | None = None) -> int:
        return whole_number(metadata, *(f"{metadata['general.architecture']}.{key}" for key in keys), default=default)

    width = number("attention.key_length_mla", "attention.key_length")
    return {
        "qk_nope_head_dim": width - number("rope.dimension_count"),
        "v_head_dim": number("attention.value_length_mla", "attention.value_length"),
        "num_hidden_layers": number("block_count") - number("nextn_predict_layers", default=0),
    }


def metadata(c: Config) -> dict[str, Any]:
    """Those fields in GGUF's keys, and the sizes of what attention sees: a latent and the rotary part, of one head."""
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length_mla": c.v_head_dim,
    }


def states(c: Config) -> dict[str, StateSpec]:
    """One row a token and layer: the latent and the rotated key that all heads share."""
    row = StateSpec((c.kv_lora_rank + c.qk_rope_head_dim,))
    return {f"blk.{i}.latent": row for i in range(c.num_hidden_layers)}


def build(g: Builder, c: Config, select: Select = lambda g, i, x, qr: None) -> Graph:
    x = embed(g, c.vocab_size, c.hidden_size)  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x = x + attention(b, i, norm(b, "attn_norm", x, c.rms_norm_eps), c, select)
        y = norm(b, "ffn_norm", x, c.rms_norm_eps)
        dense = i < c.first_k_dense_replace
        x = b.tap("out", x + (feed_forward(b, y, c.intermediate_size) if dense else moe(b, y, c)))
    return g.finish(head(g, x, c.vocab_size, c.rms_norm_eps))


def attention(g: Builder, i: int, x: Node, c: Config, select: Select) -> Node:
    nope, width = c.qk_nope_head_dim, c.qk_nope_head_dim + c.qk_rope_head_dim
    qr = x if c.q_lora_rank is None else norm(g, "attn_q_a_norm", g.linear("attn_q_a", x, c.q_lora_rank), c.rms_norm_eps)
    name = "attn_q" if c.q_lora_rank is None else "attn_q_b"
    q = heads(g.linear(name, qr, c.num_attention_heads * width), c.num_attention_heads)  # [T, H, nope | rope]
    q_nope, q_pe = q[:, :, :nope], rope(q[:, :, nope:], g.positions, **rotary(c))

    latent = g.linear("attn_kv_a_mqa", x, c.kv_lora_rank + c.qk_rope_head_dim)
    k_pe = rope(latent[:, c.kv_lora_rank :], g.positions, **rotary(c))
    row = concat(norm(g, "attn_kv_a_norm", latent[:, : c.kv_lora_rank], c.rms_norm_eps), k_pe, axis=-1)
    rows = g.append("latent", row)  # [S, kv_lora | rope]
    ids = select(g, i, x, qr)

    # Where as many rows are selected as there are, these are all that a token sees.
    whole = ALWAYS if ids is None else rows.shape[0] <= maximum(ids.shape[1])

    def form(compute: Callable[..., Node]) -> Node:
        every = compute(g, q_nope, q_pe, rows, None, c)
        if ids is None:
            return every
        return choose({"every row": (every, whole), "selected rows": (compute(g, q_nope, q_pe, rows, ids, c), ALWAYS)})

    forms = {
        # Per query and row, heads work on nope + rope + v numbers instead of 2 kv_lora + rope, once every row is expanded.
        "naive": (form(naive), (g.T >= break_even(c)) & whole),
        "absorbed": (form(absorbed), ALWAYS),
    }
    o = choose(forms)  # [T, H, v]
    return g.linear("attn_output", g.tap("attn_out", flatten(o)), c.hidden_size)


def break_even(c: Config) -> int:
    """New tokens from which expanding every row costs less than working on latents."""
    latent, plain = 2 * c.kv_lora_rank + c.qk_rope_head_dim, c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    return (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank // max(latent - plain, 1) + 1


def absorbed(g: Builder, q_nope: Node, q_pe: Node, rows: Node, ids: Node | None, c: Config) -> Node:
    """Queries brought to the latents: one key row for all heads, whose first kv_lora numbers are the value too."""
    to_latent = key_weight(g, c)
    q_latent = mul_mat(to_latent, q_nope.permute(1, 0, 2)).permute(1, 0, 2)  # [T, H, kv_lora]
    k = rows.reshape(rows.shape[0], 1, -1)  # [S, 1, kv_lora | rope]
    seen = g.segment("latent", k, ids=ids)
    q = concat(q_latent, q_pe, axis=-1)
    o = flash_attn(q, seen, scale=scale(c), d_v=c.kv_lora_rank, pos=g.positions, seq=g.seqs)  # [T, H, kv_lora]
    return mul_mat(value_weight(g, c), o.permute(1, 0, 2)).permute(1, 0, 2)


def naive(g: Builder, q_nope: Node, q_pe: Node, rows: Node, ids: Node | None, c: Config) -> Node:
    """Keys and values of every head, expanded from the latents."""
    n_head = c.num_attention_heads
    to_latent, n_rows = key_weight(g, c), rows.shape[0]
    rows = rows.cast("f32")
    latents = rows[:, : c.kv_lora_rank].broadcast(n_head, n_rows, c.kv_lora_rank)
    k_nope = mul_mat(cont(to_latent.permute(0, 2, 1)), latents).permute(1, 0, 2)  # [S, H, nope]
    v = mul_mat(value_weight(g, c), latents).permute(1, 0, 2)  # [S, H, v]
    k_pe = rows[:, None, c.kv_lora_rank :].broadcast(n_rows, n_head, c.qk_rope_head_dim)
    seen = g.segment("latent", concat(k_nope, k_pe, axis=-1), v, ids=ids)
    q = concat(q_nope, q_pe, axis=-1)
    return flash_attn(q, seen, scale=scale(c), pos=g.positions, seq=g.seqs)


def key_weight(g: Builder, c: Config) -> Node:
    """Shapes: -> [H, kv_lora, nope]."""
    both = unsplit(g, c)
    if both is not None:
        return cont(both[:, : c.qk_nope_head_dim].permute(0, 2, 1))
    return g.weight("attn_k_b.weight", c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim)


def value_weight(g: Builder, c: Config) -> Node:
    """Shapes: -> [H, v, kv_lora]."""
    both = unsplit(g, c)
    if both is not None:
        return cont(both[:, c.qk_nope_head_dim :])
    return g.weight("attn_v_b.weight", c.num_attention_heads, c.v_head_dim, c.kv_lora_rank)


def unsplit(g: Builder, c: Config) -> Node | None:
    """The weight that older files hold instead of those two. Shapes: -> [H, nope | v, kv_lora]."""
    width = c.qk_nope_head_dim + c.v_head_dim
    both = g.optional("attn_kv_b.weight", c.num_attention_heads * width, c.kv_lora_rank)
    return None if both is None else both.cast("f32").reshape(c.num_attention_heads, width, c.kv_lora_rank)


def moe(g: Builder, x: Node, c: Config) -> Node:
    logits = g.linear("ffn_gate_inp", x, c.n_routed_experts)  # [T, E]
    scores = sigmoid(logits) if c.scoring_func == "sigmoid" else soft_max(logits)
    bias = g.optional("exp_probs_b.bias", c.n_routed_experts)
    # V3 scores a group by its two largest, V2 by its largest; the files do not say which: it goes with the scoring.
    group_top = 2 if c.scoring_func == "sigmoid" else 1
    groups = {"n_group": c.n_group, "topk_group": c.topk_group, "group_top": group_top}
    ids = g.tap("experts", route(scores, bias, c.num_experts_per_tok, **groups))
    w = weigh(scores, ids, normalise=c.norm_topk_prob, scale=c.routed_scaling_factor)
    routed = expert_sum(g, x, ids, w, n_experts=c.n_routed_experts, size=c.moe_intermediate_size)
    return routed + feed_forward(g, x, c.n_shared_experts * c.moe_intermediate_size, "_shexp")


def magnitude(scaling: RopeScaling, mscale: float) -> float:
    """YaRN's `0.1 a ln s + 1`."""
    return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0


def scale(c: Config) -> float:
    """The factor before the soft-max; YaRN's magnitude counts twice, here and nowhere else."""
    s = c.rope_scaling
    return magnitude(s, s.mscale_all_dim) ** 2 / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)


def rotary(c: Config) -> dict[str, Any]:
    """Attributes of the rope that queries and keys share: neighbouring channels are pairs."""
    s = c.rope_scaling
    plain = {"n_dims": c.qk_rope_head_dim, "base": c.rope_theta}
    if s.rope_type != "yarn":
        return plain | ({"freq_scale": 1.0 / s.factor} if s.rope_type == "linear" else {})
    return plain | {
        "freq_scale": 1.0 / s.factor,
        "ext_factor": 1.0,
        "beta_fast": s.beta_fast,
        "beta_slow": s.beta_slow,
        "original_context": s.original_max_position_embeddings,
        "magnitude": magnitude(s, s.mscale) / magnitude(s, s.mscale_all_dim),
    }


Architecture(
    "deepseek2",
    config=Config,
    states=states,
    build=build,
    published=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    extra=from_metadata,
    more=metadata,
    names=names,
)
