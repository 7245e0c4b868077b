"""flash_attn over state streams on the CPU, which reads their pages in place, against the reference backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tensorgraph.errors import InputError
from tensorgraph.state import Layout
from tests.backends.cpu.attention_streams import Attention, History, Stream, executable

LATENT = Attention((Stream("latent", own_values=False, flat=True),), d_k=72, d_v=64, heads=9, kv_heads=1)
LISTED = Attention((Stream("latent", own_values=False, flat=True, n_ids=24),), d_k=72, d_v=64, heads=8, kv_heads=1)
SEGMENTS = Attention(
    (
        Stream("near", window=12, own_values=False),
        Stream("four", every=4, own_values=False, n_ids=9),
        Stream("blocks", every=16, own_values=False),
    ),
    d_k=48,
    d_v=48,
    heads=6,
    kv_heads=2,
    dtype="f32",
    sinks=True,
    softcap=5.0,
)
DENSE: tuple[tuple[str, Layout], ...] = (("kv.k", "rows16"), ("kv.v", "panels"))
WINDOWS: tuple[tuple[str, Layout], ...] = (("near.k", "rows16"), ("near.v", "panels"), ("four.k", "rows16"), ("four.v", "panels"))
CASES = {
    "latent": LATENT,
    "listed rows": LISTED,
    "segments": SEGMENTS,
    "listed rows of a window": Attention((Stream("near", window=8, n_ids=30),), dtype="f32"),
    "heads and values": Attention((Stream("kv", n_ids=40),), d_k=24, d_v=17, heads=6, kv_heads=3, dtype="bf16"),
    "wide groups": Attention((Stream("kv", own_values=False),), d_k=16, d_v=16, heads=68, kv_heads=1, dtype="f32"),
    "segments of wide groups": replace(SEGMENTS, heads=10),
    "values of wide groups": Attention((Stream("kv", n_ids=70),), d_k=33, d_v=48, heads=8, kv_heads=2),
    "many heads, many listed rows": Attention(
        (Stream("latent", own_values=False, flat=True, n_ids=150),), d_k=72, d_v=64, heads=50, kv_heads=1, dtype="bf16"
    ),
    "coded listed latent": Attention(
        (Stream("latent", own_values=False, flat=True, n_ids=30),), d_k=96, d_v=64, heads=9, kv_heads=1, dtype="q8_0", sinks=True
    ),
    "by pages": Attention((Stream("kv"),), d_k=40, d_v=48, heads=6, kv_heads=2, layouts=DENSE),
    "by pages, alone": Attention((Stream("kv"),), d_k=64, d_v=32, heads=3, kv_heads=3, dtype="bf16", layouts=DENSE),
    "by pages, wide groups": Attention((Stream("kv"),), d_k=33, d_v=16, heads=14, kv_heads=1, dtype="f32", layouts=DENSE),
    "by pages, windows": Attention(
        (Stream("near", window=20), Stream("four", every=4)), heads=8, sinks=True, softcap=4.0, layouts=WINDOWS
    ),
    "by pages, coded": Attention((Stream("kv"),), d_k=64, d_v=96, heads=6, kv_heads=2, dtype="q8_0", layouts=DENSE),
    "by pages, coded windows": Attention(
        (Stream("near", window=20), Stream("four", every=4)), heads=8, sinks=True, softcap=4.0, dtype="q8_0", layouts=WINDOWS
    ),
    "coded latent": Attention(
        (Stream("latent", own_values=False, flat=True),), d_k=96, d_v=64, heads=9, kv_heads=1, dtype="q8_0"
    ),
    "coded, listed rows": Attention((Stream("kv", n_ids=40),), d_k=32, d_v=64, heads=6, kv_heads=3, dtype="q8_0"),
    "coded, in one piece": Attention((Stream("kv"),), dtype="q8_0", layouts=(("kv.k", "panels"), ("kv.v", "rows16"))),
    "interleaved": Attention((Stream("kv"),), d_k=20, d_v=16, layouts=(("kv.k", "rows16"), ("kv.v", "rows16"))),
}


@pytest.mark.parametrize("backend", ["cpu", "cpu:avx2", "cpu:baseline"])
@pytest.mark.parametrize("name", CASES)
def test_streams(name: str, backend: str) -> None:
    History(CASES[name], backend, np.random.default_rng(sorted(CASES).index(name))).go(14)


@pytest.mark.parametrize("name", ["segments of wide groups", "many heads, many listed rows"])
def test_few_tokens_at_a_time(name: str) -> None:
    """From the first on, when of some segments there is no row yet."""
    history = History(CASES[name], "cpu", np.random.default_rng(2))
    for n in (1, 1, 2, 13, 1, 4, 3, 60, 1, 50, 1, 4):
        history.step({history.seqs[0]: n, history.seqs[1]: 4 - n} if n < 4 else {history.seqs[0]: n})


@pytest.mark.parametrize("n", [3, 22, 62])
def test_a_row_that_is_not_finite_counts_for_those_that_see_it(n: int) -> None:
    attention = Attention((Stream("kv"),), d_k=33, d_v=48, heads=20, kv_heads=1)  # two tokens a tile, six queries at once
    history = History(attention, "cpu", np.random.default_rng(n))
    with history.store.begin([(history.seqs[0], n)]) as step:
        inputs, dims = attention.inputs(step, history.rng)
        inputs["new.kv.v"][n // 2] = np.inf
        y, wanted = (executable(attention, b).run(inputs, state=step, dims=dims)["y"] for b in ("cpu", "reference"))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
        assert np.isfinite(y[: n // 2]).all() and np.isinf(y[n // 2 :]).all()


def test_rows_are_read_in_place() -> None:
    """Then positions and sequences of rows follow from the store's tables: the inputs are not read."""
    assert not [name for name in executable(SEGMENTS, "cpu").needed if name.startswith("rows.")]
    assert [name for name in executable(SEGMENTS, "reference").needed if name.startswith("rows.")]


@pytest.mark.parametrize("name", ["segments", "segments of wide groups", "latent", "by pages"])
def test_a_sequence_that_is_not_in_the_batch_sees_nothing(name: str) -> None:
    attention = CASES[name]
    history = History(attention, "cpu", np.random.default_rng(1))
    with history.store.begin([(seq, 20) for seq in history.seqs]) as step:
        inputs, dims = attention.inputs(step, history.rng)
        inputs["seqs"] = inputs["seqs"].copy()
        inputs["seqs"][[3, 21, 39]] = -1, 2, 1 << 30
        y, wanted = (executable(attention, b).run(inputs, state=step, dims=dims)["y"] for b in ("cpu", "reference"))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
        assert not y[[3, 21, 39]].any() and y[[4, 20, 38]].any(axis=(1, 2)).all()


def test_ids_out_of_range() -> None:
    history = History(LISTED, "cpu", np.random.default_rng(1))
    with history.store.begin([(history.seqs[0], 5), (history.seqs[1], 3)]) as step:
        inputs, dims = LISTED.inputs(step, history.rng)
        for bad, got in ((8, "-1 to 8"), (-2, "-2 to 7"), (1 << 30, "-1 to 1073741824")):
            ids = inputs["ids.latent"] = np.full((8, 24), -1, np.int32)
            ids[3, 7], ids[7, 23] = 7, bad
            for backend in ("cpu", "reference"):
                with pytest.raises(InputError, match=f"ids0 must be below 8, or -1 for none; got {got}"):
                    executable(LISTED, backend).run(inputs, state=step, dims=dims)
