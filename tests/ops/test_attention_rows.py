"""What chooses and makes the rows that attention reads, index_top_k and block_pool, against loops."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorgraph.ops  # noqa: F401  (the expansion of index_top_k uses other families)
from tensorgraph.dims import Dim
from tensorgraph.errors import ShapeError, StateError
from tensorgraph.graph import input
from tensorgraph.ops.attention import block_pool, index_top_k
from tests.ops.attention_oracle import Array, Slots, shown

T, S, B = Dim("T", 64), Dim("S", 512), Dim("B", 128)


def index_scores(slots: Slots, every: int) -> Array:
    n_tokens, n_heads, _ = slots["q"].shape
    scores = np.full((n_tokens, len(slots["k"])), -np.inf)
    for t in range(n_tokens):
        for s, key in enumerate(slots["k"]):
            if shown(slots["q_pos"][t], slots["q_seq"][t], slots["k_pos"][s], slots["k_seq"][s], every, None):
                heads = (max(0.0, float(slots["q"][t, h] @ key)) * float(slots["w"][t, h]) for h in range(n_heads))
                scores[t, s] = sum(heads)
    return scores


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(0, 40),
    n_tokens=st.integers(0, 4),
    every=st.sampled_from([1, 4]),
    k=st.sampled_from([1, 3, 8, 50]),
)
def test_index_top_k(seed: int, n_rows: int, n_tokens: int, every: int, k: int) -> None:
    """Whole numbers, so that scores are exact and most of them are tied, in part at zero."""
    rng = np.random.default_rng(seed)
    row_seq = rng.integers(0, 2, n_rows)
    row_pos = np.array([np.sum(row_seq[:i] == s) for i, s in enumerate(row_seq)], int)
    slots = {"q": rng.integers(-2, 3, (n_tokens, 3, 4)), "k": rng.integers(-2, 3, (n_rows, 4))}
    slots |= {"w": rng.integers(-1, 3, (n_tokens, 3)), "q_pos": rng.integers(0, 25 * every, n_tokens)}
    slots |= {"q_seq": rng.integers(0, 2, n_tokens), "k_pos": row_pos, "k_seq": row_seq}
    slots |= {name: slots[name].astype(float) for name in "qkw"}
    got = index_top_k.compute(slots, {"top_k": k, "every": every})
    assert got.shape == (n_tokens, k) and got.dtype == np.int32
    for t, row in enumerate(index_scores(slots, every)):
        ranked = sorted((s for s in range(n_rows) if row[s] > -math.inf), key=lambda s, row=row: (-row[s], s))[:k]
        assert got[t].tolist() == ranked + [-1] * (k - len(ranked))


def test_index_top_k_in_tiles_is_the_same_and_small() -> None:
    """Four tiles of tokens and several of rows; equal rows are tied wherever they stand in a tile."""
    rng = np.random.default_rng(9)
    n_rows, n_tokens, n_heads = 60_000, 13, 16
    keys = rng.standard_normal((500, 8)).astype(np.float32).astype(float)
    which = rng.integers(0, 500, n_rows)
    slots = {"q": rng.standard_normal((n_tokens, n_heads, 8)).astype(np.float32).astype(float), "k": keys[which]}
    slots |= {"w": rng.standard_normal((n_tokens, n_heads)).astype(np.float32).astype(float)}
    slots |= {"q_pos": rng.integers(30_000, n_rows, n_tokens), "q_seq": np.zeros(n_tokens, int)}
    slots |= {"k_pos": np.arange(n_rows), "k_seq": np.zeros(n_rows, int)}
    tracemalloc.start()
    got = index_top_k.compute(slots, {"top_k": 300, "every": 1})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    for t in range(n_tokens):
        scores = np.maximum(slots["q"][t] @ keys.T, 0).T @ slots["w"][t]
        order: list[int] = []
        for key in np.argsort(-scores):
            order.extend(np.flatnonzero((which == key) & (slots["k_pos"] <= slots["q_pos"][t])).tolist())
            if len(order) >= 300:
                break
        assert got[t].tolist() == order[:300]


def test_index_top_k_shapes_and_expansion() -> None:
    at = {slot: input(slot, (n,), "i32") for slot, n in (("q_pos", T), ("q_seq", T), ("k_pos", B), ("k_seq", B))}
    y = index_top_k(input("q", (T, 64, 128)), input("k", (B, 128), "f16"), input("w", (T, 64)), *at.values(), top_k=512)
    assert y.shape == (T, 512) and y.dtype.name == "i32"
    assert index_top_k.expansion is not None
    expanded = index_top_k.rebuild(index_top_k.expansion, y)
    assert expanded.op == "top_k" and expanded.shape == (T, 512)
    with pytest.raises(ShapeError, match="k must be"):
        index_top_k(input("q", (T, 64, 128)), input("k", (B, 64)), input("w", (T, 64)), *at.values(), top_k=512)


def pooled(slots: Slots, every: int, overlap: bool) -> Array:
    """One block and channel at a time."""
    width = slots["x"].shape[2]
    half = width // 2 if overlap else width
    rows = {(int(s), int(p)): i for i, (s, p) in enumerate(zip(slots["row_seq"], slots["row_pos"], strict=True))}
    y = np.zeros((len(slots["blocks"]), half))
    for n, (block, seq) in enumerate(zip(slots["blocks"].tolist(), slots["block_seq"].tolist(), strict=True)):
        for channel in range(half):
            parts = [(block, channel + half if overlap else channel)]
            if overlap and block > 0:
                parts.append((block - 1, channel))
            terms = []
            for of, column in parts:
                for j in range(every):
                    row = rows[seq, of * every + j]
                    bias = float(slots["bias"][j, column]) if "bias" in slots else 0.0
                    terms.append((float(slots["x"][row, 1, column]) + bias, float(slots["x"][row, 0, column])))
            top = max(z for z, _ in terms)
            y[n, channel] = sum(math.exp(z - top) * c for z, c in terms) / sum(math.exp(z - top) for z, _ in terms)
    return y


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_block_pool(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    every, overlap = data.draw(st.sampled_from([1, 2, 4, 128])), data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(0, 4 if every < 128 else 2), min_size=1, max_size=3))
    rows = np.array([(s, p) for s, n in enumerate(lengths) for p in range(n * every + every // 2)]).reshape(-1, 2)
    rows = rows[rng.permutation(len(rows))]
    able = np.array([(s, b) for s, n in enumerate(lengths) for b in range(n)]).reshape(-1, 2)
    able = able[rng.permutation(len(able))[:4]].astype(int)
    width = data.draw(st.sampled_from([2, 4]))
    slots = {"x": rng.standard_normal((len(rows), 2, width)) * np.array([1, 300])[:, None]}
    slots |= {"row_pos": rows[:, 1], "row_seq": rows[:, 0], "blocks": able[:, 1], "block_seq": able[:, 0]}
    if data.draw(st.booleans()):
        slots["bias"] = rng.standard_normal((every, width)) * 100
    slots |= {name: slots[name].astype(int) for name in ("row_pos", "row_seq")}
    got = block_pool.compute(slots, {"every": every, "overlap": overlap})
    want = pooled(slots, every, overlap)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_block_pool_wants_every_row_of_a_block() -> None:
    pos = np.array([0, 1, 2, 3, 4, 5, 7, 6])
    ones = {"x": np.ones((8, 2, 2)), "row_pos": pos, "row_seq": np.zeros(8, int)}

    def pool(block: int, seq: int = 0, keep: slice = slice(None), overlap: bool = False) -> Array:
        given = {slot: x[keep] for slot, x in ones.items()}
        slots = {**given, "blocks": np.array([block]), "block_seq": np.array([seq])}
        result: Array = block_pool.compute(slots, {"every": 4, "overlap": overlap})
        return result

    assert pool(1).tolist() == [[1.0, 1.0]] and pool(1, overlap=True).tolist() == [[1.0]]
    assert pool(1, keep=slice(4, None)).tolist() == [[1.0, 1.0]]
    ones["row_seq"][4:] = 1
    ones["row_pos"] = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    with pytest.raises(StateError, match="position 4 of sequence 0"):
        pool(1)  # the next rows in order are sequence 1's
    ones["row_seq"][4:] = 0
    ones["row_pos"] = pos
    cases: list[tuple[str, dict[str, Any]]] = [
        ("position 8 of sequence 0", {"block": 2}),
        ("position 0 of sequence 1", {"block": 0, "seq": 1}),
        ("position 6 of sequence 0", {"block": 1, "keep": slice(0, 7)}),
        ("position 0 of sequence 0", {"block": 1, "keep": slice(4, None), "overlap": True}),
        ("position 0 of sequence 0", {"block": 0, "keep": slice(0, 0)}),
    ]
    for text, arguments in cases:
        with pytest.raises(StateError, match=f"wanted the row at {text}"):
            pool(**arguments)


def test_block_pool_shapes() -> None:
    n = Dim("N", 16)
    at = [input(name, (extent,), "i32") for name, extent in (("p", S), ("s", S), ("b", n), ("bs", n))]
    x, bias = input("x", (S, 2, 64)), input("bias", (4, 64))
    assert block_pool(x, bias, *at, every=4).shape == (n, 64)
    assert block_pool(x, None, *at, every=4, overlap=True).shape == (n, 32)
    with pytest.raises(ShapeError, match="bias must have 8 rows; got 4"):
        block_pool(x, bias, *at, every=8)
    with pytest.raises(ShapeError, match="even number wide"):
        block_pool(input("x", (S, 2, 63)), None, *at, every=4, overlap=True)
