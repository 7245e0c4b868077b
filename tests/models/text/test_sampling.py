"""Sampling: the truncated distribution as defined, drawn from as it is, and settings that mean nothing refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.errors import InputError
from tensorgraph.models.text.sampling import Sampler


def expected(logits: np.ndarray[Any, Any], recent: list[int], s: Sampler) -> dict[int, float]:
    """The distribution, written out token by token."""
    scores = [float(x) for x in logits]
    for i in set(recent[len(recent) - min(s.repetition_window, len(recent)) :]):
        scores[i] = scores[i] / s.repetition_penalty if scores[i] > 0 else scores[i] * s.repetition_penalty
    highest = max(scores)
    odds = {i: float(np.exp((x - highest) / s.temperature)) for i, x in enumerate(scores)}
    order = sorted((i for i in odds if odds[i] > 0), key=lambda i: (-odds[i], i))
    if s.top_k:
        order = order[: s.top_k]
    total = sum(odds[i] for i in order)
    nucleus, reached = [], 0.0
    for i in order:
        if reached >= s.top_p * total and s.top_p < 1:
            break
        nucleus.append(i)
        reached += odds[i]
    kept = [i for i in nucleus if odds[i] >= s.min_p * odds[order[0]]]
    total = sum(odds[i] for i in kept)
    return {i: odds[i] / total for i in kept}


LOGITS = st.lists(st.one_of(st.integers(-6, 6).map(lambda x: x / 2), st.just(-np.inf)), min_size=1, max_size=40).filter(
    lambda values: max(values) > -np.inf
)


@settings(max_examples=200)
@given(
    logits=LOGITS,
    recent=st.lists(st.integers(0, 1000), max_size=12),
    temperature=st.sampled_from([0.25, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.05, 0.311, 0.5, 0.87, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.0101, 0.1507, 0.6, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.375]),
    window=st.sampled_from([0, 1, 3, 64]),
)
def test_distribution_is_truncated_as_defined(
    logits: list[float], recent: list[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float,
    window: int,
) -> None:  # fmt: skip
    sampler = Sampler(temperature, top_k, top_p, min_p, penalty, window)
    array = np.array(logits, np.float32)
    recent = [i % len(logits) for i in recent]
    ids, probabilities = sampler.distribution(array, recent)
    wanted = expected(array, recent, sampler)
    assert ids.tolist() == list(wanted)
    np.testing.assert_allclose(probabilities, list(wanted.values()), rtol=1e-12)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(1.0, seed=1),
        Sampler(0.7, top_k=12, seed=2),
        Sampler(1.5, top_p=0.8, seed=3),
        Sampler(1.0, min_p=0.15, seed=4),
        Sampler(0.9, 20, 0.9, 0.05, 1.3, 4, seed=5),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampler: Sampler) -> None:
    logits = (np.random.default_rng(11).standard_normal(64) * 1.5).astype(np.float32)
    recent = [1, 5, 9, 9, 17]
    wanted = expected(logits, recent, sampler)
    rng, n = sampler.rng(), 4_000
    counts = np.zeros(64)
    for _ in range(n):
        counts[sampler.sample(logits, recent, rng)] += 1
    assert counts[[i for i in range(64) if i not in wanted]].sum() == 0
    mean = np.array([n * p for p in wanted.values()])
    chi2 = ((counts[list(wanted)] - mean) ** 2 / mean).sum()
    freedom = len(wanted) - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_large_vocabulary_with_top_p_only() -> None:
    """The shortcut that spares sorting the whole vocabulary changes nothing."""
    logits = np.random.default_rng(3).standard_normal(50_000).astype(np.float32)
    for top_p in (0.3, 0.9, 0.9999):
        sampler = Sampler(1.0, top_p=top_p)
        wanted = expected(logits, [], sampler)
        ids, probabilities = sampler.distribution(logits, [])
        assert ids.tolist() == list(wanted)
        np.testing.assert_allclose(probabilities, list(wanted.values()), rtol=1e-9)


@settings(max_examples=100)
@given(logits=LOGITS, recent=st.lists(st.integers(0, 1000), max_size=6), seed=st.integers(0, 99))
def test_temperature_0_and_top_k_1_take_the_lowest_id_of_the_best(logits: list[float], recent: list[int], seed: int) -> None:
    array = np.array(logits, np.float32)
    recent = [i % len(logits) for i in recent]
    rng = np.random.default_rng(seed)
    best = logits.index(max(logits))
    assert Sampler().sample(array, recent, rng) == best
    assert Sampler(0.8, top_k=1).sample(array, recent, rng) == best
    assert Sampler().distribution(array, recent)[0].tolist() == [best]


def test_repetition_penalty_counts_a_token_once_and_only_within_the_window() -> None:
    logits = np.array([3.0, 2.0, -1.0], np.float32)
    rng = np.random.default_rng(0)
    assert Sampler(repetition_penalty=1.4).sample(logits, [0, 0, 0], rng) == 0  # 3 / 1.4 > 2, 3 / 1.4**2 < 2
    assert Sampler(repetition_penalty=1.6).sample(logits, [0], rng) == 1
    assert Sampler(repetition_penalty=1.6, repetition_window=2).sample(logits, [0, 2, 2], rng) == 0
    assert Sampler(repetition_penalty=1.6, repetition_window=0).sample(logits, [0], rng) == 0
    negative = np.array([-1.0, -1.2], np.float32)
    assert Sampler(repetition_penalty=1.5).sample(negative, [0], rng) == 1


def test_the_same_seed_draws_the_same() -> None:
    logits = np.random.default_rng(5).standard_normal(1000).astype(np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(1.0, seed=seed)
        rng = sampler.rng()
        return [sampler.sample(logits, [], rng) for _ in range(50)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_tiny_temperature_is_greedy() -> None:
    logits = np.array([1.0, 1.5, -np.inf, 1.4999], np.float32)
    assert Sampler(1e-310).sample(logits, [], np.random.default_rng(0)) == 1


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, top_p=0.9)], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("logits", "found"),
    [
        ([0.0, np.nan], "got NaN"),
        ([-np.inf, -np.inf], "got -inf for every token"),
        ([0.0, np.inf], "got +inf"),
        ([], "got [0]"),
        ([[0.0]], "got [1, 1]"),
    ],
)
def test_bad_logits_are_refused(sampler: Sampler, logits: list[Any], found: str) -> None:
    with pytest.raises(InputError, match=re.escape(found)):
        sampler.sample(np.array(logits, np.float32), [], np.random.default_rng(0))


def test_unknown_recent_token_is_refused() -> None:
    for wrong in (2, -1):
        with pytest.raises(InputError, match=f"recent token ids below 2; got {wrong}"):
            Sampler(repetition_penalty=2.0).sample(np.zeros(2, np.float32), [0, wrong], np.random.default_rng(0))


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0}, {"temperature": np.nan}, {"temperature": np.inf}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.5}, {"top_p": np.nan}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
        {"repetition_window": -1}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(InputError, match=f"wanted {name}: .*; got "):
        Sampler(**setting)
