"""The visibility rule as an additive mask, for graphs that want one."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorgraph.op import Attr, Op
from tensorgraph.ops.attention.visibility import visible
from tensorgraph.ops.cases import INTS, a_type

Array = np.ndarray[Any, Any]

attn_mask = Op(
    "attn_mask",
    "q_pos[T]: int, q_seq[T]: int, k_pos[S]: int, k_seq[S]: int -> y[T, S]: f32",
    attrs={"every": Attr(int, 1, low=1), "window": Attr(int, None, low=1)},
    tolerance=0.0,
    source="flash_attn's predicates",
)
"""0 where row s is visible to token t by `flash_attn`'s causal rule, -inf elsewhere.

Shapes: q_pos, q_seq [T], k_pos, k_seq [S] -> [T, S].
"""


@attn_mask.reference
def reference(q_pos: Array, q_seq: Array, k_pos: Array, k_seq: Array, *, every: int, window: int | None) -> Array:
    seen = visible(q_pos, q_seq, k_pos, k_seq, every=every, window=window)
    assert seen is not None
    return np.where(seen, 0.0, -np.inf)


@attn_mask.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    slots, every = draw_positions(draw)
    from hypothesis import strategies as st

    return slots, {"every": every, "window": draw(st.sampled_from((None, 1, 3, 20)))}


def draw_positions(draw: Any) -> tuple[dict[str, Array], int]:
    """Rows of one to three sequences interleaved, and tokens at any of their positions."""
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    every, n_seq = draw(st.sampled_from((1, 1, 4, 128))), draw(st.integers(1, 3))
    n_rows, n_tokens = draw(st.sampled_from((0, 1, 5, 40))), draw(st.sampled_from((0, 1, 2, 9)))
    k_seq = rng.integers(0, n_seq, n_rows)
    k_pos = np.array([np.sum(k_seq[:i] == s) for i, s in enumerate(k_seq)], int)
    order = rng.permutation(n_rows)
    q_pos = rng.integers(0, n_rows * every + 2, n_tokens)
    slots = {"q_pos": q_pos, "q_seq": rng.integers(0, n_seq, n_tokens), "k_pos": k_pos[order], "k_seq": k_seq[order]}
    return {name: x.astype(_holding(draw, x)) for name, x in slots.items()}, every


def _holding(draw: Any, x: Array) -> Any:
    return a_type(draw, [t for t in INTS if x.max(initial=0) <= np.iinfo(t).max])


@attn_mask.law
def of_another_sequence_nothing(run: Any, q_pos: Array, q_seq: Array, k_pos: Array, k_seq: Array, **attrs: Any) -> None:
    """A token whose sequence no row is of sees none."""
    other = np.full_like(q_seq, int(k_seq.max(initial=0)) + 1)
    assert np.isneginf(run(q_pos, other, k_pos, k_seq, **attrs)).all()
