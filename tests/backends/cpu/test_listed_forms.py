"""The forms in which attention goes through listed rows: each by its own list, all lists of a tile together, all rows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.ops.attention import row_tiles_cpu
from tensorgraph.ops.attention.candidates_cpu import FORMS, RowCosts
from tensorgraph.plan import Executable
from tests.backends.cpu.attention_streams import Attention, History, Stream, executable

BACKENDS = ["cpu", "cpu:avx2", "cpu:baseline"]
LATENT = Stream("latent", own_values=False, flat=True, n_ids=24)
SHAPES = [
    Attention((LATENT,), d_k=72, d_v=64, heads=4, kv_heads=1, dtype="f32"),  # twelve tokens a tile
    Attention((replace(LATENT, n_ids=70),), d_k=40, d_v=32, heads=17, kv_heads=1),
    Attention((replace(LATENT, n_ids=150),), d_k=72, d_v=64, heads=50, kv_heads=1, dtype="bf16"),  # one, in two pieces
    Attention((replace(LATENT, n_ids=1),), d_k=96, d_v=64, heads=9, kv_heads=1, dtype="q8_0", sinks=True),
    Attention(
        (Stream("near", window=12), Stream("four", every=4, n_ids=9), Stream("latent", n_ids=40)),
        d_k=48,
        d_v=48,
        heads=12,
        kv_heads=2,
        softcap=5.0,
        sinks=True,
    ),
]


@cache
def formed(attention: Attention, backend: str, form: str) -> Executable:
    return compile(attention.graph(), backend, CompileOptions(fuse=False, lowerings=(form,))).bind()


@pytest.mark.parametrize("heads", [4, 17])
def test_what_costs_least_is_taken(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits tell forms apart. Where copies cost all, lists that are alike go together, and few rows are gone through whole; where
    rows that are listed cost nothing to copy, queries count alone, and lists that are not alike stay apart."""
    shape = Attention((replace(LATENT, n_ids=101),), d_k=72, d_v=64, heads=heads, kv_heads=1, dtype="f32")
    history = History(shape, "cpu", np.random.default_rng(heads))
    for _ in range(3):
        history.step({history.seqs[0]: 50})
    with history.store.begin([(history.seqs[0], 40)]) as step:
        given, dims = shape.inputs(step, history.rng)
        own = np.arange(40)[:, None]  # below what all list, so that blocks of rows begin elsewhere
        alike = np.concatenate([own, np.broadcast_to(np.arange(50, 150), (40, 100))], 1).astype(np.int32)
        apart = np.array([history.rng.permutation(150)[:101] for _ in range(40)], np.int32)
        apart[:, 40:] = -1
        y: dict[str, dict[str, bytes]] = {}
        for name, ids in (("alike", alike), ("apart", apart)):
            inputs = {**given, "ids.latent": ids}
            y[name] = {form: formed(shape, "cpu", form).run(inputs, state=step, dims=dims)["y"].tobytes() for form in FORMS}
            for costs in (RowCosts(3000, 3000), RowCosts(9000, 0), RowCosts(0, 0)):
                monkeypatch.setattr(row_tiles_cpu, "row_costs", lambda target, costs=costs: costs)
                chosen = compile(shape.graph(), "cpu", CompileOptions(fuse=False)).bind()
                y[name][str(tuple(costs))] = chosen.run(inputs, state=step, dims=dims)["y"].tobytes()
    assert len({y["alike"][form] for form in FORMS}) == 3
    assert y["alike"]["(3000, 3000)"] == y["alike"]["union"]
    assert y["alike"]["(9000, 0)"] == y["alike"]["masked"]
    assert y["apart"]["(0, 0)"] == y["apart"]["gather"] != y["apart"]["union"]
    assert y["apart"]["(9000, 0)"] == y["apart"]["masked"]


def nmse(x: np.ndarray, wanted: np.ndarray) -> float:
    return float(((x - wanted) ** 2).sum() / max(float((wanted**2).sum()), 1e-30))


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from(SHAPES),
    backend=st.sampled_from(BACKENDS),
    counts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=5),
    overlap=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_forms_agree(shape: Attention, backend: str, counts: list[tuple[int, int]], overlap: float, seed: int) -> None:
    """Of two sequences that have grown by any number of tokens: one step in every form. `overlap`: of neighbours' lists."""
    history = History(shape, backend, np.random.default_rng(seed))
    a, b = history.seqs
    for step in counts:
        sizes = {seq: n for seq, n in zip((a, b), step, strict=True) if n}
        if not sizes:
            continue
        with history.store.begin(list(sizes.items())) as one:
            inputs, dims = shape.inputs(one, history.rng)
            for name, ids in inputs.items():
                if name.startswith("ids."):
                    inputs[name] = np.where(history.rng.random(ids.shape) < overlap, ids[:1], ids)
            found = {form: formed(shape, backend, form).run(inputs, state=one, dims=dims)["y"] for form in FORMS}
            found["chosen"] = executable(shape, backend).run(inputs, state=one, dims=dims)["y"]
            wanted = executable(shape, "reference").run(inputs, state=one, dims=dims)["y"]
            for form, y in found.items():
                assert nmse(y, wanted) <= 1e-10, (form, sizes)
                assert nmse(y, found["gather"]) <= 1e-10, (form, sizes)
            one.commit()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [3, 40])
def test_a_listed_row_that_is_not_finite_counts_for_those_that_list_it(n: int, form: str) -> None:
    shape = SHAPES[0]
    history = History(shape, "cpu", np.random.default_rng(n))
    with history.store.begin([(history.seqs[0], n)]) as step:
        inputs, dims = shape.inputs(step, history.rng)
        ids = np.sort(history.rng.integers(0, n, (n, 24)).astype(np.int32), axis=1)
        bad, seeing = n // 2, np.arange(n) % 3 == 2
        ids[ids == bad], ids[:, -1] = bad - 1, np.where(seeing, bad, 0)
        inputs["ids.latent"], inputs["new.latent.k"] = ids, inputs["new.latent.k"].copy()
        inputs["new.latent.k"][bad, 3] = np.inf
        y = formed(shape, "cpu", form).run(inputs, state=step, dims=dims)["y"]
        wanted = executable(shape, "reference").run(inputs, state=step, dims=dims)["y"]
        seeing &= np.arange(n) >= bad
        assert np.isfinite(y[~seeing]).all() and seeing.any() and not np.isfinite(y[seeing]).all(axis=(1, 2)).any()
        np.testing.assert_allclose(y[~seeing], wanted[~seeing], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_that_is_not_in_the_batch_sees_nothing(form: str) -> None:
    for shape in (SHAPES[0], SHAPES[4]):
        history = History(shape, "cpu", np.random.default_rng(1))
        with history.store.begin([(seq, 20) for seq in history.seqs]) as step:
            inputs, dims = shape.inputs(step, history.rng)
            inputs["seqs"] = inputs["seqs"].copy()
            inputs["seqs"][[3, 21, 39]] = -1, 2, 1 << 30
            y = formed(shape, "cpu", form).run(inputs, state=step, dims=dims)["y"]
            wanted = executable(shape, "reference").run(inputs, state=step, dims=dims)["y"]
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
            assert not y[[3, 21, 39]].any() or shape.sinks
