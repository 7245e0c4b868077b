"""What is written for registers of 64 bytes, run by any processor: LLVM makes several registers of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tensorgraph.backends.cpu.target import TARGETS, host
from tensorgraph.session import Session
from tensorgraph.tools.conformance import check
from tests.models import tiny

WIDE = replace(host(), name="wide", vector_bytes=64, has=frozenset())


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "wide", WIDE)


@pytest.mark.parametrize("op", ["flash_attn", "mul_mat", "mul_mat_id", "soft_max", "rms_norm", "index_top_k", "rotate"])
def test_ops_conform(op: str) -> None:
    report = check(op, "cpu:wide", examples=8)
    assert report.ok, str(report)


FILES = [("llama", "f32"), ("llama", "q4_1"), ("llama", "q8_0"), ("deepseek_v3", "f32")]


@pytest.mark.parametrize(("architecture", "kind"), FILES)
def test_a_model_gives_what_the_reference_gives(architecture: str, kind: str) -> None:
    """A prompt at once, past the end of a tile, then two sequences of several tokens, then one by one."""
    ids = [*tiny.tokens(architecture).tolist()] * 2
    found = []
    for backend in ("cpu:wide", "reference"):
        with Session(tiny.engine(architecture, kind, backend=backend)) as a, a.sibling() as b:
            logits = [a.eval(ids[:130], all_logits=True), *Session.batch([(a, ids[130:139]), (b, ids[:7])], all_logits=True)]
            logits += [a.eval([token])[None] for token in ids[139:143]]
        found.append(np.concatenate(logits))
    assert tiny.nmse(*found) <= 1e-9
