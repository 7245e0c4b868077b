"""The NumPy form of flash_attn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensorgraph.errors import InputError
from tensorgraph.ops.attention.visibility import visible

Array = np.ndarray[Any, Any]
Rule = tuple[int, int | None, bool]
"""every, window, causal of one segment."""

_TILE_LOGITS = 1 << 22  # as many are held at once; queries are taken in tiles


def attend(slots: Mapping[str, Array], scale: float, softcap: float, d_v: int | None, rules: Sequence[Rule]) -> Array:
    """`flash_attn` in float64.

    Raises:
        InputError: an id is below -1 or not below its segment's number of rows.
    """
    for i in range(len(rules)):
        ids, n = slots.get(f"ids{i}"), len(slots[f"k{i}"])
        if ids is not None and ids.size and (ids.min() < -1 or ids.max() >= n):
            given = f"{ids.min()} to {ids.max()}"
            raise InputError(f"[flash_attn] ids{i} must be below {n}, or -1 for none; got {given}")
    n_tokens, n_heads, _ = slots["q"].shape
    n_rows = sum(len(slots[f"k{i}"]) for i in range(len(rules)))
    step = max(1, _TILE_LOGITS // max(1, n_heads * n_rows))
    y = [_attend(slots, slice(t, min(t + step, n_tokens)), scale, softcap, d_v, rules) for t in range(0, max(n_tokens, 1), step)]
    return y[0] if len(y) == 1 else np.concatenate(y)


def _attend(
    slots: Mapping[str, Array], tokens: slice, scale: float, softcap: float, d_v: int | None, rules: Sequence[Rule]
) -> Array:
    """Attention of some of the queries."""
    q, sinks = slots["q"][tokens], slots.get("sinks")
    n_tokens, n_heads, d_k = q.shape
    n_kv = slots["k0"].shape[1]
    grouped = q.reshape(n_tokens, n_kv, n_heads // n_kv, d_k).swapaxes(0, 1)  # [Hkv, T, H / Hkv, Dk]
    logits, values = [], []
    for i, rule in enumerate(rules):
        k, v, mask = slots[f"k{i}"], slots.get(f"v{i}"), slots.get(f"mask{i}")
        v = k[..., :d_v] if v is None else v
        seen = _seen(slots, i, rule, tokens)
        if mask is not None:
            mask = mask[..., tokens, :]
            shown = (mask if mask.ndim == 2 else mask.max(0, initial=-np.inf)) > -np.inf
            seen = shown if seen is None else seen & shown
        if seen is not None:
            used = seen.any(0)
            if not used.all():  # rows that none of these queries sees take no part, whatever they hold
                k, v, seen = k[used], v[used], seen[:, used]
                mask = None if mask is None else mask[..., used]
        s = _logits(grouped, k, mask, scale, softcap)
        if seen is not None and not seen.all():
            np.copyto(s, -np.inf, where=~seen[:, None, :])
        logits.append(s)
        values.append(v)
    y = _weigh(logits, values, sinks)
    if n_tokens > 1 and np.isnan(y).any():  # a row that only some queries see may hold inf: 0 * inf must not count
        one_by_one = (slice(t, t + 1) for t in range(*tokens.indices(len(slots["q"]))))
        return np.concatenate([_attend(slots, t, scale, softcap, d_v, rules) for t in one_by_one])
    return y


def _seen(slots: Mapping[str, Array], i: int, rule: Rule, tokens: slice) -> Array | None:
    """Which rows of a segment the queries see [T, S]; None for all."""
    pos, seq = (None if x is None else x[tokens] for x in (slots.get("pos"), slots.get("seq")))
    every, window, causal = rule
    k_pos, k_seq, ids = slots.get(f"pos{i}"), slots.get(f"seq{i}"), slots.get(f"ids{i}")
    seen = visible(pos, seq, k_pos, k_seq, every=every, window=window, causal=causal)
    if ids is None:
        return seen
    ids = ids[tokens]
    chosen = np.zeros((len(ids), len(slots[f"k{i}"]) + 1), bool)  # the last column takes the ids of -1
    chosen[np.arange(len(ids))[:, None], ids] = True
    return chosen[:, :-1] if seen is None else seen & chosen[:, :-1]


def _logits(q: Array, k: Array, mask: Array | None, scale: float, softcap: float) -> Array:
    """q [Hkv, T, G, Dk], k [S, Hkv, Dk], mask [T, S] or [H, T, S] -> [Hkv, T, G, S]."""
    n_kv, n_tokens, group, d_k = q.shape
    s: Array = (q.reshape(n_kv, n_tokens * group, d_k) @ k.transpose(1, 2, 0)).reshape(n_kv, n_tokens, group, len(k))
    s *= scale
    if softcap:
        s = np.tanh(s / softcap) * softcap
    if mask is not None:
        by_head = mask.ndim == 3
        s += mask.reshape(n_kv, group, n_tokens, len(k)).swapaxes(1, 2) if by_head else mask[:, None, :]
    return s


def _weigh(logits: Sequence[Array], values: Sequence[Array], sinks: Array | None) -> Array:
    """Values [S, Hkv, Dv] weighed by one soft-max over all logits [Hkv, T, G, S] -> [T, H, Dv]."""
    n_kv, n_tokens, group, _ = logits[0].shape
    top = logits[0].max(-1, keepdims=True, initial=-np.inf)
    for s in logits[1:]:
        top = np.maximum(top, s.max(-1, keepdims=True, initial=-np.inf))
    if sinks is not None:
        sinks = sinks.reshape(n_kv, 1, group, 1)
        top = np.maximum(top, sinks)
    top = np.where(top == -np.inf, 0.0, top)  # a query that sees nothing
    total = np.zeros_like(top) if sinks is None else np.exp(sinks - top)
    y: Array | None = None
    for s, v in zip(logits, values, strict=True):
        s -= top
        np.exp(s, out=s)
        total = total + s.sum(-1, keepdims=True)
        part = (s.reshape(n_kv, n_tokens * group, len(v)) @ v.swapaxes(0, 1)).reshape(n_kv, n_tokens, group, v.shape[2])
        y = part if y is None else y + part
    assert y is not None
    y /= np.where(total == 0, 1.0, total)
    return y.swapaxes(0, 1).reshape(n_tokens, n_kv * group, y.shape[3])
