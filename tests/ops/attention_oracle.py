"""What attention is, one query, head and row at a time, in Python's own floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Slots = dict[str, Array]


def shown(
    pos: int | None, seq: int | None, row_pos: int, row_seq: int, every: int, window: int | None, causal: bool = True
) -> bool:
    """Whether a token sees a row."""
    if seq is not None and row_seq != seq:
        return False
    if pos is not None:
        last_token_of_row = row_pos * every + every - 1
        if causal and last_token_of_row > pos:
            return False
        if window is not None and row_pos <= pos - window:
            return False
    return True


def attention(slots: Slots, attrs: dict[str, Any]) -> Array:
    """One query and head at a time, over a list of the rows that it sees."""
    q, sinks = slots["q"], slots.get("sinks")
    n_tokens, n_heads, d_k = q.shape
    first = slots.get("v0")
    d_v = first.shape[2] if first is not None else attrs["d_v"] or d_k
    y = np.zeros((n_tokens, n_heads, d_v))
    for t in range(n_tokens):
        for h in range(n_heads):
            rows = []
            for i, (every, window, causal) in enumerate(attrs["segments"]):
                k, v = slots[f"k{i}"], slots.get(f"v{i}", slots[f"k{i}"][..., :d_v])
                head = h // (n_heads // k.shape[1])
                for s in range(len(k)):
                    at = [int(slots[n][j]) if n in slots else None for n, j in (("pos", t), ("seq", t))]
                    row = [int(slots[n][s]) if n in slots else 0 for n in (f"pos{i}", f"seq{i}")]
                    if not shown(at[0], at[1], row[0], row[1], every, window, causal):
                        continue
                    if f"ids{i}" in slots and s not in slots[f"ids{i}"][t].tolist():
                        continue
                    logit = attrs["scale"] * sum(float(a) * float(b) for a, b in zip(q[t, h], k[s, head], strict=True))
                    if attrs["softcap"]:
                        logit = attrs["softcap"] * math.tanh(logit / attrs["softcap"])
                    mask = slots.get(f"mask{i}")
                    if mask is not None:
                        logit += float(mask[t, s] if mask.ndim == 2 else mask[h, t, s])
                    if logit > -math.inf:
                        rows.append((logit, v[s, head]))
            if not rows:
                continue
            extra = [] if sinks is None else [float(sinks[h])]
            top = max([logit for logit, _ in rows] + extra)
            total = sum(math.exp(logit - top) for logit in [logit for logit, _ in rows] + extra)
            for logit, value in rows:
                y[t, h] += math.exp(logit - top) / total * value
    return y
