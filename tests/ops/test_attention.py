"""flash_attn and attn_mask against loops over queries, heads and rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.dims import Dim
from tensorgraph.errors import DTypeError, GraphError, InputError, ShapeError
from tensorgraph.graph import Node, input
from tensorgraph.ops.attention import Segment, attn_mask, flash_attn
from tests.ops.attention_oracle import Array, Slots, attention, shown


def draw_slots(data: st.DataObject) -> tuple[Slots, dict[str, Any]]:
    """Up to three segments: sequences interleaved in any order, blocks, windows, row lists, masks, no rows."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_kv, group, n_tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    d_k, d_v, n_seq = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    d_v = min(d_k, d_v)
    slots: Slots = {"q": rng.standard_normal((n_tokens, n_kv * group, d_k)) * 3}
    by_pos, by_seq = draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()):
        slots["sinks"] = rng.standard_normal(n_kv * group)
    if by_pos:
        slots["pos"] = rng.integers(0, 20, n_tokens)
    if by_seq:
        slots["seq"] = rng.integers(0, n_seq, n_tokens)
    rules = []
    for i in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, 9))
        slots[f"k{i}"] = rng.standard_normal((n, n_kv, d_k))
        if draw(st.booleans()):
            slots[f"v{i}"] = rng.standard_normal((n, n_kv, d_v))
        causal, window = draw(st.booleans()), draw(st.sampled_from([None, None, 1, 6]))
        if by_pos:
            slots[f"pos{i}"] = rng.integers(0, 12, n)
        if by_seq:
            slots[f"seq{i}"] = rng.integers(0, n_seq, n)
        if draw(st.booleans()):
            slots[f"ids{i}"] = rng.integers(-1, n, (n_tokens, draw(st.integers(0, 4))))
        if draw(st.booleans()):
            shape = (*draw(st.sampled_from([(), (n_kv * group,)])), n_tokens, n)
            slots[f"mask{i}"] = np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape))
        rules.append((draw(st.sampled_from([1, 1, 4])), window if by_pos else None, causal))
    attrs = {"scale": 0.7, "softcap": draw(st.sampled_from([0.0, 1.5])), "d_v": d_v, "segments": tuple(rules)}
    return slots, attrs


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_flash_attn(data: st.DataObject) -> None:
    slots, attrs = draw_slots(data)
    before = {slot: x.copy() for slot, x in slots.items()}
    got = flash_attn.compute(slots, attrs)
    want = attention(slots, attrs)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert all(np.array_equal(x, before[slot]) for slot, x in slots.items())


def one(k: Array, **attrs: Any) -> dict[str, Any]:
    return flash_attn.check_attrs({"scale": 0.3, "segments": ((1, None, True),), **attrs})


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n_ids=st.integers(1, 12), n_seq=st.integers(1, 3), every=st.sampled_from([1, 4]))
def test_row_lists_equal_the_explicit_mask(seed: int, n_ids: int, n_seq: int, every: int) -> None:
    """Rows of several sequences interleaved; each query is given at most 12 of 60, some of which it must not see."""
    rng = np.random.default_rng(seed)
    n_rows, n_tokens = 60, 7
    k, v = rng.standard_normal((n_rows, 2, 8)), rng.standard_normal((n_rows, 2, 4))
    row_seq = rng.integers(0, n_seq, n_rows)
    row_pos = np.array([np.sum(row_seq[:i] == s) for i, s in enumerate(row_seq)])
    seq, pos = rng.integers(0, n_seq, n_tokens), rng.integers(0, 30 * every, n_tokens)
    ids = np.array([rng.permutation(n_rows)[:n_ids] for _ in range(n_tokens)])
    ids[rng.random(ids.shape) < 0.2] = -1
    q, sinks = rng.standard_normal((n_tokens, 4, 8)), rng.standard_normal(4)
    slots = {"q": q, "sinks": sinks, "pos": pos, "seq": seq, "k0": k, "v0": v, "pos0": row_pos, "seq0": row_seq}
    rule = {"segments": ((every, None, True),)}
    listed = flash_attn.compute({**slots, "ids0": ids}, one(k, **rule))
    mask = np.full((n_tokens, n_rows), -np.inf)
    for t in range(n_tokens):
        for s in ids[t]:
            if s >= 0 and shown(pos[t], seq[t], row_pos[s], row_seq[s], every, None):
                mask[t, s] = 0
    masked = flash_attn.compute({"q": q, "sinks": sinks, "k0": k, "v0": v, "mask0": mask}, one(k))
    np.testing.assert_allclose(listed, masked, rtol=0, atol=1e-14)
    twice = flash_attn.compute({**slots, "ids0": np.concatenate([ids, ids[:, ::-1]], 1)}, one(k, **rule))
    np.testing.assert_array_equal(twice, listed)  # a row counts once however often it is listed


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_that_a_query_does_not_see_may_hold_anything() -> None:
    rng = np.random.default_rng(5)
    k, v, q = (rng.standard_normal((6, 1, 4)) for _ in range(3))
    slots = {"q": q[:4], "pos": np.arange(4), "seq": np.array([0, 0, 1, 1]), "pos0": np.array([0, 1, 2, 3, 0, 9])}
    slots |= {"seq0": np.array([0, 0, 1, 1, 1, 0]), "k0": k, "v0": v}
    want = flash_attn.compute(slots, one(k))
    for bad in (np.nan, np.inf):
        for row, blind in ((5, [0, 1, 2, 3]), (4, [0, 1]), (1, [0, 2, 3]), (3, [0, 1, 2])):
            for slot in ("k0", "v0"):
                spoilt = slots[slot].copy()
                spoilt[row] = bad
                got = flash_attn.compute({**slots, slot: spoilt}, one(k))
                np.testing.assert_allclose(got[blind], want[blind], rtol=0, atol=1e-14)
                seeing = [t for t in range(4) if t not in blind]
                assert not seeing or not np.allclose(got[seeing], want[seeing])


def test_queries_that_see_nothing_give_zero() -> None:
    rng = np.random.default_rng(6)
    q, k, sinks = rng.standard_normal((3, 4, 8)), rng.standard_normal((5, 2, 8)), rng.standard_normal(4)
    empty = np.zeros((3, 4, 8))
    nothing = {"q": q, "k0": k, "mask0": np.full((3, 5), -np.inf)}
    assert np.array_equal(flash_attn.compute(nothing, one(k)), empty)
    assert np.array_equal(flash_attn.compute({**nothing, "sinks": sinks}, one(k)), empty)
    assert np.array_equal(flash_attn.compute({"q": q, "k0": k[:0]}, one(k)), empty)
    assert np.array_equal(flash_attn.compute({"q": q, "k0": k[:0], "sinks": sinks}, one(k)), empty)
    assert np.array_equal(flash_attn.compute({"q": q, "k0": k, "ids0": np.full((3, 2), -1)}, one(k)), empty)
    assert flash_attn.compute({"q": q[:0], "k0": k}, one(k, d_v=3)).shape == (0, 4, 3)
    blind_head = np.zeros((4, 3, 5))
    blind_head[2] = -np.inf
    y = flash_attn.compute({"q": q, "k0": k, "mask0": blind_head}, one(k))
    assert not y[:, 2].any() and np.all(y[:, [0, 1, 3]] != 0)
    early = {"q": q, "k0": k, "pos": np.array([2, 3, 4]), "pos0": np.arange(5)}
    y = flash_attn.compute(early, one(k, segments=((4, None, True),)))
    assert not y[0].any() and y[1].any()  # the first block of four ends at position 3


def test_sinks_take_weight_and_give_nothing() -> None:
    k = np.zeros((2, 1, 1))
    slots = {
        "q": np.ones((1, 2, 1)),
        "k0": k,
        "v0": np.array([[[1.0]], [[3.0]]]),
        "sinks": np.array([0.0, math.log(6)]),
    }
    y = flash_attn.compute(slots, one(k))
    np.testing.assert_allclose(y[0, :, 0], [4 / 3, 4 / 8], rtol=1e-15)
    huge = flash_attn.compute({**slots, "sinks": np.array([800.0, -800.0])}, one(k))
    np.testing.assert_allclose(huge[0, :, 0], [0, 2], atol=1e-15)


def test_logits_of_any_size() -> None:
    q = np.array([[[1e4]], [[-1e4]]])
    k = np.array([[[1.0]], [[-1.0]], [[0.999]]])
    y = flash_attn.compute({"q": q, "k0": k, "v0": np.array([[[1.0]], [[2.0]], [[4.0]]])}, one(k))
    w = math.exp(-3)
    np.testing.assert_allclose(y[:, 0, 0], [(1 + 4 * w) / (1 + w), 2], rtol=1e-8)


def test_segments_share_one_soft_max() -> None:
    """A stream cut in pieces is the stream; the window of one piece does not apply to the other."""
    rng = np.random.default_rng(7)
    q, k, v = rng.standard_normal((4, 6, 8)), rng.standard_normal((30, 2, 8)), rng.standard_normal((30, 2, 5))
    pos = np.array([11, 29, 3, 20])
    whole = flash_attn.compute({"q": q, "k0": k, "v0": v, "pos": pos, "pos0": np.arange(30)}, one(k))
    cuts = {"q": q, "pos": pos}
    for i, rows in enumerate((slice(0, 9), slice(9, 9), slice(9, 30))):
        cuts |= {f"k{i}": k[rows], f"v{i}": v[rows], f"pos{i}": np.arange(30)[rows]}
    pieces = flash_attn.compute(cuts, one(k, segments=((1, None, True),) * 3))
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-14)
    narrow = flash_attn.compute(cuts, one(k, segments=((1, None, True), (1, None, True), (1, 2, True))))
    np.testing.assert_allclose(narrow[[2]], whole[[2]], rtol=0, atol=1e-14)
    assert not np.allclose(narrow[1], whole[1])


def test_many_queries_are_taken_in_tiles() -> None:
    rng = np.random.default_rng(8)
    n = 2500
    q, k = rng.standard_normal((n, 2, 4)), rng.standard_normal((n, 1, 4))
    slots = {"q": q, "k0": k, "pos": np.arange(n), "pos0": np.arange(n)}
    y = flash_attn.compute(slots, one(k))
    for t in (0, 1, 837, 838, 839, 2499):
        row = {**slots, "q": q[t : t + 1], "pos": np.array([t])}
        np.testing.assert_allclose(y[t], flash_attn.compute(row, one(k))[0], rtol=0, atol=1e-13)


T, S, B = Dim("T", 64), Dim("S", 512), Dim("B", 128)


def stream(rows: Any, width: int = 32, heads: int = 2, name: str = "", **more: Any) -> Segment:
    """A segment of keys with positions and sequences."""
    at = {slot: input(f"{slot}{name}", (rows,), "i32") for slot in ("pos", "seq")}
    return Segment(input(f"k{name}", (rows, heads, width), "f16"), **{**at, **more})


def query(*segments: Segment, heads: int = 8, **given: Any) -> Node:
    given = {"scale": 0.1, "pos": input("pos", (T,), "i32"), "seq": input("seq", (T,), "i32"), **given}
    return flash_attn(input("q", (T, heads, 32)), *segments, **given)


def test_flash_attn_shapes() -> None:
    values = input("v", (S, 2, 24), "f16")
    y = query(stream(S, v=values))
    assert y.shape == (T, 8, 24) and y.dtype.name == "f32"
    assert y.slots == ("q", "pos", "seq", "k0", "v0", "pos0", "seq0")
    y = query(stream(S, heads=1, window=128), stream(B, heads=1, name="b", every=4), sinks=input("s", (8,)), d_v=24)
    assert y.shape == (T, 8, 24) and y.attrs["segments"] == ((1, 128, True), (4, None, True))
    assert flash_attn.cost(y, {"T": 3, "S": 100, "B": 20}).flops == 3 * 8 * 120 * (32 + 24) * 2
    assert query(stream(S, ids=input("ids", (T, 64), "i32"), mask=input("m", (T, S), "f16"))).shape == (T, 8, 32)
    assert query(stream(0)).shape == (T, 8, 32)


def test_flash_attn_errors() -> None:
    with pytest.raises(ShapeError, match=r"k0 must be \[S, a divisor of 8, 32\]; got \[S, 3, 32\] \(test_attention.py"):
        query(stream(S, heads=3))
    with pytest.raises(ShapeError, match=r"k1 must be \[S, 2, 32\]; got \[B, 1, 32\]"):
        query(stream(S), stream(B, heads=1, name="b"))
    with pytest.raises(ShapeError, match="32"):
        query(stream(S, width=16))
    with pytest.raises(ShapeError, match="values must be 24 wide; segment 1's are 32"):
        query(stream(S, v=input("v", (S, 2, 24))), stream(B, name="b"))
    with pytest.raises(ShapeError, match=r"v0 must be \[S, 2, 24\]; got \[B, 2, 24\]"):
        query(stream(S, v=input("v", (B, 2, 24))))
    with pytest.raises(ShapeError, match=r"ids0 must be \[T, 5\]; got \[3, 5\]"):
        query(stream(S, ids=input("ids", (3, 5), "i32")))
    with pytest.raises(ShapeError, match=r"mask0 must be \[T, S\] or \[8, T, S\]; got \[S, T\]"):
        query(stream(S, mask=input("m", (S, T))))
    with pytest.raises(ShapeError, match=r"sinks must be \[8\]; got \[2\]"):
        query(stream(S), sinks=input("s", (2,)))
    with pytest.raises(ShapeError, match="d_v must be at most"):
        query(stream(S), d_v=40)
    with pytest.raises(DTypeError, match="ids0 must be int; got f32"):
        query(stream(S, ids=input("ids", (T, 5))))
    with pytest.raises(DTypeError, match="sinks must be float; got i32"):
        query(stream(S), sinks=input("s", (8,), "i32"))
    with pytest.raises(GraphError, match="seq of the queries and of segment 0"):
        query(stream(S), seq=None)
    with pytest.raises(GraphError, match="seq of the queries and of segment 1"):
        query(stream(S), stream(B, name="b", seq=None))
    with pytest.raises(GraphError, match="causal or has a window; got one of them"):
        query(stream(S), pos=None)
    with pytest.raises(GraphError, match="causal or has a window; got neither"):
        query(stream(S, pos=None, window=4), pos=None)
    with pytest.raises(GraphError, match="at least one segment"):
        query()
    with pytest.raises(GraphError, match="window >= 1; got every=0"):
        query(stream(S, every=0))
    with pytest.raises(GraphError, match="wanted a Segment after q"):
        flash_attn(input("q", (T, 8, 32)), input("k", (S, 2, 32)), scale=1.0)
    for bad in (5, -2):
        slots = {"q": np.ones((1, 1, 1)), "k0": np.ones((5, 1, 1)), "ids0": np.array([[0, bad]])}
        with pytest.raises(InputError, match="ids0 must be below 5, or -1 for none"):
            flash_attn.compute(slots, one(slots["k0"]))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_attn_mask(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    every = data.draw(st.sampled_from([1, 4, 128]))
    window = data.draw(st.sampled_from([None, 1, 3, 10]))
    n_tokens, n_rows = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 12))
    pos = data.draw(st.sampled_from([np.arange(n_tokens), rng.integers(0, 10 * every, n_tokens)]))
    pos = np.where(rng.random(n_tokens) < 0.5, pos // every * every + every - 1, pos)  # the last token of a block
    slots = {"q_pos": pos, "q_seq": rng.integers(0, 2, n_tokens)}
    slots |= {"k_pos": rng.integers(0, 10, n_rows), "k_seq": rng.integers(0, 2, n_rows)}
    got = attn_mask.compute(slots, {"every": every, "window": window})
    for t in range(n_tokens):
        for s in range(n_rows):
            seen = shown(pos[t], slots["q_seq"][t], slots["k_pos"][s], slots["k_seq"][s], every, window)
            assert got[t, s] == (0.0 if seen else -math.inf)
    assert got.shape == (n_tokens, n_rows)


def test_attn_mask_by_hand() -> None:
    zeros = np.zeros(3, int)
    slots = {"q_pos": np.array([2, 3, 7]), "q_seq": zeros, "k_pos": np.arange(3), "k_seq": zeros}
    inf = math.inf
    plain = attn_mask.compute(slots, {"every": 1, "window": 2})
    assert plain.tolist() == [[-inf, 0, 0], [-inf, -inf, 0], [-inf] * 3]
    blocks = attn_mask.compute(slots, {"every": 4, "window": None})
    assert blocks.tolist() == [[-inf] * 3, [0, -inf, -inf], [0, 0, -inf]]
