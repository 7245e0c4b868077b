"""gpt-oss: layers that see a window and layers that see all in turns, attention sinks, experts with biases and clamped units.

Source: arXiv:2508.10925.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import embed, head, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import MOST_EXPERTS, from_gguf
from tensorgraph.models.decoder import WindowedConfig, attend, queries_keys_values, rotate, states
from tensorgraph.models.experts import expert_sum, route
from tensorgraph.models.names import LAYER, Array, Made, made_of_layers, mxfp4_blocks, mxfp4_width, same
from tensorgraph.ops import gather, soft_max, swiglu_oai


@dataclass(frozen=True, kw_only=True)
class Config(WindowedConfig):
    """Fields as published."""

    intermediate_size: int = from_gguf("expert_feed_forward_length")
    num_local_experts: int = from_gguf("expert_count", most=MOST_EXPERTS)
    num_experts_per_tok: int = from_gguf("expert_used_count")
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def slides(self, layer: int) -> bool:
        return layer % 2 == 0


def build(g: Builder, c: Config) -> Graph:
    x = embed(g, c.vocab_size, c.hidden_size)  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x = x + attention(b, norm(b, "attn_norm", x, c.rms_norm_eps), c, c.window(i))
        x = b.tap("out", x + moe(b, norm(b, "post_attention_norm", x, c.rms_norm_eps), c))
    return g.finish(head(g, x, c.vocab_size, c.rms_norm_eps))


def attention(g: Builder, x: Node, c: Config, window: int | None) -> Node:
    q, k, v = queries_keys_values(g, x, c)
    scaling = replace(c.rope_scaling, truncate=False)  # GGUF files do not say it
    q, k = (rotate(g, h, scaling, base=c.rope_theta) for h in (q, k))
    sinks = g.weight("attn_sinks.weight", c.num_attention_heads)
    return attend(g, q, k, v, c, window=window, sinks=sinks)


def moe(g: Builder, x: Node, c: Config) -> Node:
    """Experts are weighed by a soft-max over the logits of those that were chosen."""
    logits = g.linear("ffn_gate_inp", x, c.num_local_experts)  # [T, E]
    ids = g.tap("experts", route(logits, None, c.num_experts_per_tok))

    def unit(gate: Node, up: Node) -> Node:
        return swiglu_oai(gate, up, alpha=c.swiglu_alpha, limit=c.swiglu_limit)

    w = soft_max(gather(logits, ids))
    return expert_sum(g, x, ids, w, n_experts=c.num_local_experts, size=c.intermediate_size, unit=unit)


EXPERTS = {"gate": ("gate_up", slice(0, None, 2)), "up": ("gate_up", slice(1, None, 2)), "down": ("down", slice(None))}


def names(c: Config) -> dict[str, Made]:
    """Published checkpoints hold gate and up as every other row, matrices transposed or, as published first, in MXFP4."""
    layer = {**LAYER, "post_attention_norm": LAYER["ffn_norm"], "ffn_gate_inp": "mlp.router"}
    del layer["ffn_norm"]
    found = made_of_layers(c.num_hidden_layers, layer, tied=c.tie_word_embeddings)
    for i in range(c.num_hidden_layers):
        found[f"blk.{i}.attn_sinks.weight"] = same(f"model.layers.{i}.self_attn.sinks")
        experts = f"model.layers.{i}.mlp.experts"
        for ours, (theirs, rows) in EXPERTS.items():
            found[f"blk.{i}.ffn_{ours}_exps.weight"] = matrices(f"{experts}.{theirs}_proj", rows)
            found[f"blk.{i}.ffn_{ours}_exps.bias"] = some_rows(f"{experts}.{theirs}_proj_bias", rows)
    return found


def matrices(name: str, rows: slice) -> Made:
    """Some rows of each expert's matrix. Shapes: [E, N, M], or [E, M, N / 32, 16] and [E, M, N / 32] -> [E, M', N]."""
    n_rows = _counter(rows)
    plain = Made((name,), lambda given: given[0].swapaxes(1, 2)[:, rows], lambda s: (s[0][0], n_rows(s[0][2]), s[0][1]))

    def blocks(given: Sequence[Array]) -> Array:
        codes, scales = (part[:, rows] for part in given)
        return mxfp4_blocks(codes, scales)

    return Made(
        (f"{name}_blocks", f"{name}_scales"),
        blocks,
        lambda s: (s[0][0], n_rows(s[0][1]), mxfp4_width((*s[0][1:-2], s[0][-2] * s[0][-1]), s[1][1:])),
        as_dtype("mxfp4"),
        kinds=2,
        otherwise=plain,
    )


def some_rows(name: str, rows: slice) -> Made:
    n_rows = _counter(rows)
    return Made((name,), lambda given: given[0][:, rows], lambda s: (s[0][0], n_rows(s[0][1])))


def _counter(rows: slice) -> Callable[[int], int]:
    return lambda n: len(range(*rows.indices(n)))


Architecture(
    "gpt-oss", config=Config, states=states, build=build, published=("GptOssForCausalLM",), names=names, optional=(".bias",)
)
