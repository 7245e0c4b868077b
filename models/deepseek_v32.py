"""DeepSeek V3.2: V3 with a lightning indexer that selects the rows each token attends to.

Source: DeepSeek-V3.2-Exp technical report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorgraph.graph import Graph, Node
from tensorgraph.models import deepseek_v2
from tensorgraph.models.architecture import Architecture
from tensorgraph.models.blocks import heads
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import from_gguf
from tensorgraph.models.names import Made
from tensorgraph.ops import attn_mask, fwht, mul_mat, norm, relu, rope, sum_rows, top_k
from tensorgraph.state import StateSpec

KEY_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Config(deepseek_v2.Config):
    """V3's fields and the indexer's."""

    index_n_heads: int = from_gguf("attention.indexer.head_count")
    index_head_dim: int = from_gguf("attention.indexer.key_length")
    index_topk: int = from_gguf("attention.indexer.top_k")


def names(c: Config) -> dict[str, Made]:
    indexer = {
        "indexer.attn_q_b": "self_attn.indexer.wq_b",
        "indexer.attn_k": "self_attn.indexer.wk",
        "indexer.k_norm": "self_attn.indexer.k_norm",
        "indexer.proj": "self_attn.indexer.weights_proj",
    }
    return deepseek_v2.names(c, deepseek_v2.PUBLISHED | indexer)


def metadata(c: Config) -> dict[str, Any]:
    """V3's keys, and no layers that predict further tokens."""
    return deepseek_v2.metadata(c) | {"nextn_predict_layers": 0}


def states(c: Config) -> dict[str, StateSpec]:
    keys = StateSpec((c.index_head_dim,))
    return deepseek_v2.states(c) | {f"blk.{i}.index_k": keys for i in range(c.num_hidden_layers)}


def build(g: Builder, c: Config) -> Graph:
    return deepseek_v2.build(g, c, lambda b, i, x, qr: select(b, x, qr, c))


def select(g: Builder, x: Node, qr: Node, c: Config, layout: str = "half_split") -> Node:
    """The rows that the indexer selects. Shapes: x [T, D], qr [T, q_lora] -> ids [T, index_topk].

    Queries and keys are laid out [rope | nope]. The Hadamard rotation changes no product; it spreads outliers.
    """
    n_head, width = c.index_n_heads, c.index_head_dim
    rotation = deepseek_v2.rotary(c) | {"layout": layout}
    q = heads(g.linear("indexer.attn_q_b", qr, n_head * width), n_head)
    q = fwht(rope(q, g.positions, **rotation))  # [T, Hi, Di]
    weight, bias = g.weight("indexer.k_norm.weight", width), g.weight("indexer.k_norm.bias", width)
    k = norm(g.linear("indexer.attn_k", x, width), weight, bias, eps=KEY_NORM_EPS)
    k = g.append("index_k", fwht(rope(k, g.positions, **rotation)))  # [S, Di]
    w = g.linear("indexer.proj", x, n_head) * (n_head * width) ** -0.5  # [T, Hi]
    return g.tap("index_ids", best_rows(g, "index_k", q, k, w, c.index_topk))


def best_rows(g: Builder, stream: str, q: Node, k: Node, w: Node, n: int) -> Node:
    """The n visible rows with the largest `Σ_h w_h relu(q_h · k)`; the compiler knows this as `index_top_k`.

    Shapes: q [T, H, D], k [S, D], w [T, H] -> ids [T, n].
    """
    n_tokens, n_head, _ = q.shape
    weighed = relu(mul_mat(k, q)) * w.reshape(n_tokens, n_head, 1)  # [T, H, S]
    scores = sum_rows(weighed.permute(0, 2, 1)).reshape(n_tokens, k.shape[0])
    seen = g.segment(stream, k)
    return top_k(scores + attn_mask(g.positions, g.seqs, seen.pos, seen.seq, every=seen.every), k=n)


Architecture(
    "deepseek32",
    config=Config,
    states=states,
    build=build,
    published=("DeepseekV32ForCausalLM",),
    extra=deepseek_v2.from_metadata,
    more=metadata,
    names=names,
)
