"""Mixtures of experts: routers in plain ops, and the experts themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.models.builder import Builder
from tensorgraph.ops import add_id, fill, gather, mul_mat_id, scatter, sum_rows, swiglu, top_k
from tensorgraph.source import hide_source, source_line

hide_source(__file__)


def route(
    scores: Node,
    bias: Node | None,
    k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    group_top: int = 2,
) -> Node:
    """The experts of each token: the `k` largest of `scores + bias` within its `topk_group` best groups.

    A group's score is the sum of its `group_top` largest. The bias selects and does not weigh.

    Shapes: scores [T, E], bias [E] -> ids [T, k].
    """
    n_experts = scores.shape[-1]
    if isinstance(n_experts, int) and not (0 < k <= n_experts and 0 < topk_group <= n_group):
        given = f"{k} of {n_experts} experts, {topk_group} of {n_group} groups"
        raise ShapeError(f"[route] wanted no more experts and groups than there are; got {given} ({source_line()})")
    chosen = scores if bias is None else scores + bias
    if n_group > 1:
        n_tokens = chosen.shape[0]
        grouped = chosen.reshape(n_tokens, n_group, -1)  # [T, G, E / G]
        best = gather(grouped, top_k(grouped, k=group_top))
        kept = top_k(sum_rows(best).reshape(n_tokens, n_group), k=topk_group)  # [T, topk_group]
        closed = fill(shape=(n_tokens, n_group), value=-math.inf)
        mask = scatter(closed, kept, fill(shape=(n_tokens, topk_group), value=0.0))
        chosen = (grouped + mask.reshape(n_tokens, n_group, 1)).reshape(n_tokens, n_experts)
    return top_k(chosen, k=k)


def weigh(scores: Node, ids: Node, *, normalise: bool, scale: float) -> Node:
    """The weights of the chosen experts, from the scores without bias. Shapes: [T, E], [T, K] -> [T, K]."""
    w = gather(scores, ids)
    if normalise:
        w = w / (sum_rows(w) + 1e-20)
    return w * scale


def expert_sum(
    g: Builder,
    x: Node,
    ids: Node,
    w: Node,
    *,
    n_experts: int,
    size: int,
    unit: Callable[[Node, Node], Node] = swiglu,
) -> Node:
    """`Σ_k w_k · down_k(unit(gate_k x, up_k x))`, with the biases that there are.

    Shapes: x [T, D], ids, w [T, K] -> [T, D].
    """
    n_tokens, width = x.shape
    assert isinstance(width, int)

    def product(name: str, of: Node, n_out: int, n_in: int) -> Node:
        y = mul_mat_id(g.weight(f"{name}.weight", n_experts, n_out, n_in), of, ids)  # [T, K, n_out]
        bias = g.optional(f"{name}.bias", n_experts, n_out)
        return y if bias is None else add_id(y, bias, ids)

    rows = x.reshape(n_tokens, 1, width)
    gate, up = product("ffn_gate_exps", rows, size, width), product("ffn_up_exps", rows, size, width)
    down = product("ffn_down_exps", unit(gate, up), width, size)  # [T, K, D]
    weighed = down * w.reshape(n_tokens, -1, 1)
    return sum_rows(weighed.permute(0, 2, 1)).reshape(n_tokens, width)
