"""Models whose state is rounded to blocks (`--kv-type q8_0`): both backends keep the same rows and go on from them alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorgraph.errors import DTypeError
from tensorgraph.session import Session
from tensorgraph.tools.testing import compare_model
from tests.models import tiny

ROUNDED = ("llama", "qwen3", "qwen3moe", "deepseek_v4")
"""Those whose rows are all a multiple of 32 wide; V4's windows and compressed rows are read by row number too."""
DENSE = ("llama", "qwen3", "qwen3moe")
SAME = 1e-10
OTHER_CODES = 1e-7
"""What a handful of codes, one step off, make of the logits: a step is 8e-3 of a block's largest number."""
NOISE = {"llama": 5e-4, "qwen3": 5e-4, "qwen3moe": 5e-4, "deepseek_v4": 2e-2}
"""What blocks of 32 with 8 bits may change; V4's selections move."""


def start(backend: str, architecture: str, n: int) -> Session:
    session = Session(tiny.engine(architecture, kv_dtype="q8_0", backend=backend))
    session.eval(tiny.tokens(architecture)[:n])
    return session


def rows(session: Session) -> dict[str, np.ndarray]:
    """All rows that a session keeps."""
    with session._store.begin([(session._open(), 0)]) as step:
        return {name: step.read(name) for name in session._store.specs}


def assert_codes(got: np.ndarray, wanted: np.ndarray) -> None:
    """The same codes and scales, but for few numbers that lie between two: these go either way."""
    got, wanted = (np.float64(x).reshape(-1, 32) for x in (got, wanted))
    step, off = np.abs(wanted).max(1, keepdims=True) / 127, np.abs(got - wanted)
    assert np.all(off <= 1.01 * step) and np.mean(off > 0) < 1e-2


@pytest.mark.parametrize("architecture", ROUNDED)
def test_every_node_computes_what_the_reference_does(architecture: str) -> None:
    """After each step the reference goes on from the CPU's rows, so that nothing goes either way."""
    report = compare_model(tiny.model(architecture), tiny.tokens(architecture)[:40], decode=2, kv_type="q8_0")
    assert report.ok and max(worst.nmse for worst in report.worst.values()) < 1e-12


@pytest.mark.parametrize("architecture", DENSE)
def test_both_backends_keep_the_same_rows(architecture: str) -> None:
    ids, logits, kept = tiny.tokens(architecture), [], []
    for backend in tiny.BACKENDS:
        with Session(tiny.engine(architecture, kv_dtype="q8_0", backend=backend)) as session:
            logits.append(session.eval(ids, all_logits=True))
            kept.append(rows(session))
    for name, wanted in kept[0].items():
        assert_codes(kept[1][name], wanted)
    assert tiny.nmse(logits[1], logits[0]) <= OTHER_CODES


@pytest.mark.parametrize("architecture", ROUNDED)
def test_rows_are_rounded_once(architecture: str) -> None:
    """The distance from state in f32 is that of blocks of 8 bits: not none, and not more."""
    stored = tiny.reference(architecture)
    got = tiny.whole(tiny.engine(architecture, kv_dtype="q8_0"), stored["input_ids"])
    assert 1e-5 < tiny.nmse(got, stored["logits"]) < NOISE[architecture]


@tiny.on_every_backend
@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_cached_is_uncached(backend: str, architecture: str, chunk: int) -> None:
    """One token at a time, few, and many take three ways through the CPU's kernels."""
    ids = tiny.tokens(architecture)[:70].tolist()
    with start(backend, architecture, 31) as session, start(backend, architecture, 70) as anew:
        logits = [session.eval(ids[i : i + chunk], all_logits=True) for i in range(31, len(ids), chunk)]
        wanted = tiny.whole(session.engine, ids)[31:]
        for name, kept in rows(anew).items():
            assert_codes(rows(session)[name], kept)
    assert tiny.nmse(np.concatenate(logits), wanted) <= (SAME if backend == "reference" else OTHER_CODES)


@tiny.on_every_backend
def test_forks_trims_and_files(backend: str, tmp_path: Path) -> None:
    ids = tiny.tokens("llama").tolist()
    with start(backend, "llama", 40) as session, start(backend, "llama", 3) as other:
        child = session.fork()
        session.eval(ids[:9])
        child.trim(37)
        child.save(tmp_path / "state")
        other.load(tmp_path / "state")
        wanted = tiny.whole(session.engine, [*ids[:37], *ids[50:60]])[37:]
        for one in (child, other):
            assert tiny.nmse(one.eval(ids[50:60], all_logits=True), wanted) <= OTHER_CODES
        assert tiny.nmse(session.eval(ids[9:12]), tiny.whole(session.engine, [*ids[:40], *ids[:12]])[-1]) <= OTHER_CODES
        child.close()


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(DTypeError, match=r"wanted rows of a multiple of 32 for q8_0; got \[1, 48\]"):
        Session(tiny.engine("gemma3", kv_dtype="q8_0"))
