"""Architectures that are not in the repository, in one file each, against transformers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions
from tensorgraph.engine import Engine
from tensorgraph.errors import GraphError
from tensorgraph.models import load
from tensorgraph.models.architecture import Architecture
from tensorgraph.session import Session
from tests.models import tiny

NAME = "smollm3"


@pytest.fixture
def imported() -> Iterator[None]:
    """As a user's program imports its own file."""
    module = f"tests.models.outside.{NAME}"
    importlib.import_module(module)
    yield
    registry.architectures.remove(NAME)
    del sys.modules[module]


@tiny.on_every_backend
def test_smollm3(backend: str, imported: None) -> None:
    stored = tiny.reference(NAME)
    with load(tiny.folder(NAME), backend=backend) as model:
        engine = Engine(model.model, backend, kv_dtype="f32", options=CompileOptions(exact=True))
        with Session(engine, step_tokens=48) as session:
            taps = session.eval(stored["input_ids"], outputs=["logits", *(f"blk.{i}.out" for i in range(5))], all_logits=True)
        assert tiny.nmse(taps["logits"], stored["logits"]) <= 1e-9
        for i in range(5):
            assert tiny.nmse(taps[f"blk.{i}.out"][stored["hidden_pos"]], stored[f"hidden_layer{i}"]) <= 1e-9
        with Session(engine) as session:
            n = int(stored["n_prefill"])
            session.eval(stored["input_ids"][:n])
            decoded = np.stack([session.eval([token]) for token in stored["input_ids"][n:].tolist()])
            tokens, logits = [], decoded[-1]
            for _ in stored["greedy_tokens"]:
                tokens.append(int(np.argmax(logits)))
                logits = session.eval(tokens[-1:])
        assert tiny.nmse(decoded, stored["decode_logits"]) <= 1e-9 and tokens == stored["greedy_tokens"].tolist()


def test_a_name_that_is_taken_is_refused_where_it_is_given() -> None:
    with pytest.raises(GraphError, match="'llama' is registered already"):
        Architecture("llama", config=object, states=lambda c: {}, build=lambda g, c: None)  # type: ignore[arg-type,return-value]
    assert registry.architectures.get("llama").published[0] == "LlamaForCausalLM"
