"""Which rows of a stream a token sees: the one rule behind flash_attn, attn_mask and index_top_k."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def visible(
    q_pos: Array | None,
    q_seq: Array | None,
    k_pos: Array | None,
    k_seq: Array | None,
    *,
    every: int = 1,
    window: int | None = None,
    causal: bool = True,
) -> Array | None:
    """Whether row s is visible to token t; None where nothing restricts it.

    Row s stands for `every` tokens from position `k_pos[s] * every` on and is visible once the last of them has come.
    With a window, rows whose position is more than `window - 1` before the token's are gone. Rows of other sequences
    are never visible.

    Shapes: q_pos, q_seq [T], k_pos, k_seq [S] -> bool [T, S].
    """
    q_pos, k_pos = (None if pos is None else pos.astype(np.int64) for pos in (q_pos, k_pos))
    seen: Array | None = None
    if q_seq is not None and k_seq is not None:
        seen = q_seq[:, None] == k_seq
    if q_pos is not None and k_pos is not None:
        at = q_pos[:, None]
        if causal:
            past = (k_pos + 1) * every - 1 <= at if every != 1 else k_pos <= at
            seen = past if seen is None else seen & past
        if window is not None:
            near = k_pos > at - window
            seen = near if seen is None else seen & near
    return seen
