"""The sparse-attention indexer: score every visible row, keep the best."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.attention.attn_mask import attn_mask, draw_positions
from tensorgraph.ops.attention.visibility import visible
from tensorgraph.ops.cases import a_type
from tensorgraph.ops.products.mul_mat import mul_mat
from tensorgraph.ops.select.top_k import top_k as select

Array = np.ndarray[Any, Any]

_TILE_PRODUCTS = 1 << 19  # products held at once: 4 MB of float64
_TILE_SCORES = 1 << 18

index_top_k = Op(
    "index_top_k",
    "q[T, H, D]: float, k[S, D]: float, w[T, H]: float, q_pos[T]: int, q_seq[T]: int, k_pos[S]: int, k_seq[S]: int"
    " -> y[T, top_k]: i32",
    attrs={"top_k": Attr(int, low=1), "every": Attr(int, 1, low=1)},
    tolerance=0.0,
    source="DeepSeek-V3.2 technical report, lightning indexer",
)
"""The rows with the largest `sum_h w[t, h] relu(q[t, h] . k[s])` among those visible to t, as `top_k` orders them.

Visible is as in `flash_attn`: the same sequence, and `(k_pos + 1) * every - 1 <= q_pos`. Places left over are -1.
Shapes: q [T, H, D], k [S, D], w [T, H], q_pos, q_seq [T], k_pos, k_seq [S] -> [T, top_k].
Dtypes: products, weighed products and their sum are each rounded to f32, so that ties are those of the plain ops.
"""


@index_top_k.expand
def expand(q: Node, k: Node, w: Node, q_pos: Node, q_seq: Node, k_pos: Node, k_seq: Node, *, top_k: int, every: int) -> Node:
    mul, relu, sum_rows = (registry.ops.get(name) for name in ("mul", "relu", "sum_rows"))
    n_tokens, n_heads, _ = q.shape
    weighed = mul(relu(mul_mat(k, q)), w.reshape(n_tokens, n_heads, 1))  # [T, H, S]
    scores = sum_rows(weighed.permute(0, 2, 1)).reshape(n_tokens, k.shape[0])
    return select(scores + attn_mask(q_pos, q_seq, k_pos, k_seq, every=every), k=top_k)


@index_top_k.reference
def reference(
    q: Array, k: Array, w: Array, q_pos: Array, q_seq: Array, k_pos: Array, k_seq: Array, *, top_k: int, every: int
) -> Array:
    n_tokens, n_heads, width = q.shape
    ids = np.empty((n_tokens, top_k), np.int32)
    step = max(1, min(n_tokens, _TILE_SCORES // max(1, len(k))))
    columns = max(1, _TILE_PRODUCTS // max(1, step * n_heads))
    for t in range(0, n_tokens, step):
        at = slice(t, t + step)
        flat = q[at].reshape(-1, width)
        scores = np.empty((len(q[at]), len(k)))
        for s in range(0, len(k), columns):
            product = (flat @ k[s : s + columns].T).reshape(len(scores), n_heads, -1).astype(np.float32)
            np.maximum(product, 0, out=product)
            product *= w[at, :, None].astype(np.float32)
            scores[:, s : s + columns] = product.sum(1, dtype=np.float64).astype(np.float32)
        seen = visible(q_pos[at], q_seq[at], k_pos, k_seq, every=every)
        assert seen is not None
        ids[at] = select.compute({"x": np.where(seen, scores, -np.inf)}, {"k": top_k})
    return ids


@index_top_k.flops
def flops(node: Node) -> Extent:
    q, k = node.at("q"), node.at("k")
    assert q is not None and k is not None
    return q.size * k.shape[0] * 2


@index_top_k.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    slots, every = draw_positions(draw)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_heads, width = draw(st.sampled_from((1, 3, 8))), draw(st.sampled_from((4, 16)))
    n_tokens, n_rows = len(slots["q_pos"]), len(slots["k_pos"])
    # Small whole numbers: scores are exact in any order of summation, and ties are frequent.
    shapes = {"q": (n_tokens, n_heads, width), "k": (n_rows, width), "w": (n_tokens, n_heads)}
    numbers = {name: rng.integers(-2, 3, shape).astype(a_type(draw)) for name, shape in shapes.items()}
    return {**numbers, **slots}, {"top_k": draw(st.sampled_from((1, 2, 5, 50))), "every": every}


@index_top_k.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    """One new token after 262143 others."""
    row_pos = np.arange(262144, dtype=np.int32)
    slots: dict[str, Array] = {"q": np.zeros((1, 64, 128), np.float32), "k": np.zeros((len(row_pos), 128), np.float16)}
    slots |= {"w": np.zeros((1, 64), np.float32), "q_pos": row_pos[-1:], "q_seq": np.zeros(1, np.int32)}
    return [(slots | {"k_pos": row_pos, "k_seq": np.zeros_like(row_pos)}, {"top_k": 2048})]


@index_top_k.law
def rows_once_and_then_none(run: Any, *inputs: Array, top_k: int, every: int) -> None:
    """No row twice, and after the first -1 only such."""
    for chosen in run(*inputs, top_k=top_k, every=every):
        rows = chosen[chosen >= 0]
        assert len(set(rows.tolist())) == len(rows) and (chosen[len(rows) :] == -1).all()
