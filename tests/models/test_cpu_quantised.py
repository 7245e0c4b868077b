"""Products that round activations to 8 bits: how far that takes the CPU from dequantised weights, beside llama.cpp's own.

llama.cpp rounds them too, in blocks of its own, so neither is right; twice its distance is what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from tensorgraph.models import TextModel, load
from tensorgraph.session import Session
from tests.models import tiny
from tests.reference import reference_path

ROUNDED = ("q8_0", "q4_0", "q4_1")
"""The types that are held so that products with them are of whole numbers."""


@pytest.mark.parametrize("kv_dtype", ["f32", "f16"])
@pytest.mark.parametrize("n", [512, 48, 1])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_llama_is_no_farther_than_twice_the_peer(kind: str, n: int, kv_dtype: str) -> None:
    stored = tiny.reference("llama", "quant_refs")
    want, peer = stored[f"llama-{kind}/deq"], stored[f"llama-{kind}/native"]
    with Session(tiny.engine("llama", kind, kv_dtype, backend="cpu", exact=False), step_tokens=n) as session:
        got = session.eval(tiny.tokens("llama"), all_logits=True)[stored["pos"]]
    assert tiny.nmse(got, want) <= 2 * tiny.nmse(peer, want)
    if kind in ROUNDED:
        assert tiny.nmse(got, want) > 1e-6  # or `exact` would change nothing


@pytest.fixture(scope="module")
def reference() -> Mapping[str, tiny.Array]:
    with np.load(reference_path("real_smollm2/reference.npz")) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[TextModel]:
    with load("smollm2", backend="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def logits(smollm2: TextModel, reference: Mapping[str, tiny.Array]) -> dict[str, tiny.Array]:
    """Of each prompt and the 63 greedy tokens after it, f64."""
    found = {}
    for prompt in (name.removesuffix("/ids") for name in reference if name.endswith("/ids")):
        with smollm2.session() as session:
            ids = [*reference[f"{prompt}/ids"], *reference[f"{prompt}/deq_greedy64"][:63]]
            found[prompt] = session.eval(ids, all_logits=True).astype(np.float64)
    assert len(found) == 8
    return found


def log_probabilities(logits: tiny.Array) -> tiny.Array:
    shifted: tiny.Array = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_smollm2_next_tokens_are_as_probable(reference: Mapping[str, tiny.Array], logits: Mapping[str, tiny.Array]) -> None:
    """Mean squared error of the log probabilities of the peer's 512 likeliest next tokens, over all prompts.

    Of log probabilities, because a number added to all logits of a token changes nothing that is seen, but may be most of the
    difference between two sets of logits; over all prompts, because that of one is a matter of luck.
    """
    mine, peers = [], []
    for prompt, found in logits.items():
        likeliest, n = reference[f"{prompt}/logits_top_idx"], len(reference[f"{prompt}/ids"])
        want = log_probabilities(reference[f"{prompt}/deq_logits"].astype(np.float64))[likeliest]
        peer = reference[f"{prompt}/logits_top_val"] - reference[f"{prompt}/logits_lse"]
        mine.append(np.mean((log_probabilities(found[n - 1])[likeliest] - want) ** 2))
        peers.append(np.mean((peer - want) ** 2))
    assert np.mean(mine) <= 2 * np.mean(peers)


def test_smollm2_reads_as_well(reference: Mapping[str, tiny.Array], logits: Mapping[str, tiny.Array]) -> None:
    """Mean difference of the negative log likelihoods of the prompts' 659 tokens: the same things of many more tokens."""
    mine, peers = [], []
    for prompt, found in logits.items():
        ids = reference[f"{prompt}/ids"]
        if len(ids) > 1:
            want = reference[f"{prompt}/deq_nll"]
            mine.append(np.abs(-log_probabilities(found)[np.arange(len(ids) - 1), ids[1:]] - want))
            peers.append(np.abs(reference[f"{prompt}/nll"] - want))
    assert sum(map(len, mine)) == 659
    assert np.concatenate(mine).mean() <= 1.5 * np.concatenate(peers).mean()


def test_smollm2_chooses_the_same_tokens(reference: Mapping[str, tiny.Array], logits: Mapping[str, tiny.Array]) -> None:
    """Where the likeliest token leads by 1: rounding moves the difference of two logits by 0.2 or so, rarely by 0.5."""
    compared = 0
    for prompt, found in logits.items():
        greedy, sure = reference[f"{prompt}/deq_greedy64"], reference[f"{prompt}/deq_greedy_margin"] > 1
        chosen = found[len(reference[f"{prompt}/ids"]) - 1 :].argmax(-1)
        assert chosen[sure].tolist() == greedy[sure].tolist(), prompt
        compared += int(sure.sum())
    assert compared > 300
