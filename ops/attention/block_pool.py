"""The block-pooling compressor: one row for every block of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Extent, Shape
from tensorgraph.dtypes import DType
from tensorgraph.errors import ShapeError, StateError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import INTS, a_type
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]

_SIGNATURE = (
    "x[S, 2, W]: real, bias[every, W]?: float, row_pos[S]: int, row_seq[S]: int, "
    "blocks[N]: int, block_seq[N]: int -> y[N, W]: f32"
)
_BOUND = Signature.parse(_SIGNATURE)

block_pool = Op(
    "block_pool",
    _SIGNATURE,
    attrs={"every": Attr(int, low=1), "overlap": Attr(bool, False)},
    source="DeepSeek-V4 technical report, compressed attention",
)
"""For block b of a sequence, `sum(soft_max(x[:, 1] + bias[pos mod every]) * x[:, 0])` per channel over the block's rows.

A block's rows are those of its sequence at positions `b * every .. (b + 1) * every - 1`, wherever they stand. With
overlap, channels `[: W / 2]` of the previous block's rows and channels `[W / 2 :]` of its own pool together; block 0
has no previous rows.

Shapes: x [S, 2, W], bias [every, W], row_pos, row_seq [S], blocks, block_seq [N] -> [N, W], with overlap [N, W / 2].
Dtypes: x f32, f16, bf16 -> f32; sums in f32.
Raises: StateError, when run, where a row of a block is not there.
"""


@block_pool.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    (n_blocks, width), dtype = _BOUND.infer("block_pool", slots, attrs)
    bias, every = slots.get("bias"), attrs["every"]
    if bias is not None and bias.shape[0] != every:
        raise ShapeError(f"[block_pool] bias must have {every} rows; got {bias.shape[0]} ({source_line()})")
    if not attrs["overlap"]:
        return (n_blocks, width), dtype
    if not isinstance(width, int) or width % 2:
        raise ShapeError(f"[block_pool] x must be an even number wide for overlap; got {width} ({source_line()})")
    return (n_blocks, width // 2), dtype


@block_pool.reference
def reference(
    x: Array,
    bias: Array | None,
    row_pos: Array,
    row_seq: Array,
    blocks: Array,
    block_seq: Array,
    *,
    every: int,
    overlap: bool,
) -> Array:
    c, z, width = x[:, 0], x[:, 1], x.shape[2]
    if len(blocks) == 0:
        return np.zeros((0, width // 2 if overlap else width))
    wanted = blocks.astype(np.int64)[:, None] * every + np.arange(every)  # positions [N, every]
    find = _finder(row_pos, row_seq, int(wanted.max()))
    own = find(wanted, block_seq)
    values, logits = c[own], z[own] if bias is None else z[own] + bias  # [N, every, W]
    if overlap:
        half = width // 2
        first = blocks == 0
        before = find(np.where(first[:, None], wanted, wanted - every), block_seq)
        gates = z[before] if bias is None else z[before] + bias
        gates = np.where(first[:, None, None], -np.inf, gates[..., :half])
        shown = np.where(first[:, None, None], 0.0, c[before][..., :half])
        values = np.concatenate([shown, values[..., half:]], 1)
        logits = np.concatenate([gates, logits[..., half:]], 1)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    pooled: Array = (weights * values).sum(1) / weights.sum(1)
    return pooled


def _finder(row_pos: Array, row_seq: Array, last: int) -> Callable[[Array, Array], Array]:
    """A function from positions [N, every] and sequences [N] to the rows that hold them."""
    stride = max(last, int(row_pos.max(initial=0))) + 1
    keys = row_seq.astype(np.int64) * stride + row_pos
    order = np.argsort(keys, kind="stable")
    keys = keys[order]

    def find(pos: Array, seq: Array) -> Array:
        asked = seq.astype(np.int64)[:, None] * stride + pos
        at = np.searchsorted(keys, asked)
        there = at < len(keys)
        there[there] = keys[at[there]] == asked[there]
        if not there.all():
            n, i = np.argwhere(~there)[0]
            wanted = f"the row at position {pos[n, i]} of sequence {seq[n]}"
            raise StateError(f"[block_pool] wanted {wanted}; the stream has {len(keys)} rows, not that one")
        return order[at]

    return find


@block_pool.flops
def flops(node: Node) -> Extent:
    rows: int = node.attrs["every"] * (2 if node.attrs["overlap"] else 1)
    return node.size * rows * 4


@block_pool.law
def order_is_free(
    run: Callable[..., Array],
    x: Array,
    bias: Array | None,
    pos: Array,
    seq: Array,
    *rest: Array,
    **attrs: Any,
) -> None:
    """Rows are found by sequence and position: their order in the stream changes nothing."""
    back = slice(None, None, -1)
    turned = run(x[back], bias, pos[back], seq[back], *rest, **attrs)
    np.testing.assert_array_equal(turned, run(x, bias, pos, seq, *rest, **attrs))


@block_pool.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    every, overlap = draw(st.sampled_from((1, 2, 4, 16))), draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 3 * every + 1), min_size=1, max_size=3))
    rows = [(p, s) for s, n in enumerate(lengths) for p in range(n)]
    pos, seq = np.array(rows, np.int32).reshape(-1, 2)[rng.permutation(len(rows))].T
    able = [(b, s) for s, n in enumerate(lengths) for b in range(n // every)]
    taken = np.array(able, np.int32).reshape(-1, 2)[rng.permutation(len(able))[: draw(st.integers(0, 5))]].T
    width = draw(st.sampled_from((2, 6, 32)))
    x = rng.standard_normal((len(rows), 2, width)) * np.array([1.0, draw(st.sampled_from((0.1, 1.0, 80.0)))])[:, None]
    slots = {"x": x.astype(a_type(draw))}
    slots |= {"row_pos": pos.astype(a_type(draw, INTS)), "row_seq": seq.astype(a_type(draw, INTS))}
    if draw(st.booleans()):
        slots["bias"] = rng.standard_normal((every, width)).astype(a_type(draw))
    blocks, block_seq = (x.astype(a_type(draw, INTS)) for x in taken)
    return {**slots, "blocks": blocks, "block_seq": block_seq}, {"every": every, "overlap": overlap}


@block_pool.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    """All blocks of four of 8192 tokens."""
    pos, blocks = np.arange(8192, dtype=np.int32), np.arange(2048, dtype=np.int32)
    slots: dict[str, Array] = {"x": np.zeros((len(pos), 2, 1024), np.float32), "bias": np.zeros((4, 1024), np.float32)}
    slots |= {"row_pos": pos, "row_seq": np.zeros_like(pos), "blocks": blocks, "block_seq": np.zeros_like(blocks)}
    return [(slots, {"every": 4, "overlap": True})]
