"""Sessions of the tiny models: whatever happened to its state, a session goes on as if it had been fed its tokens anew."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.engine import Engine
from tensorgraph.errors import CannotTrim, StateError
from tensorgraph.models.architecture import Model
from tensorgraph.session import Session
from tests.layout import ROOT
from tests.models import tiny

pytestmark = tiny.on_every_backend

MODELS = ("llama", "deepseek_v32", "deepseek_v4")
SAME = 1e-10
F16_NOISE = {"llama": 1e-6, "deepseek_v32": 1e-2, "deepseek_v4": 2e-3}
"""What state in f16 may change: little more than in llama.cpp (4e-7, 8e-3, 1e-3), where it moves the same few selections."""


def start(backend: str, architecture: str, n: int, kv_dtype: str = "f32") -> Session:
    """A session that has been fed the first n tokens of the reference, and if need be others after them."""
    session = Session(tiny.engine(architecture, kv_dtype=kv_dtype, backend=backend))
    session.eval(text(architecture, n))
    return session


def text(architecture: str, n: int) -> list[int]:
    return [*tiny.tokens(architecture).tolist(), *other(200, 0)][:n]


def other(n: int, seed: int) -> list[int]:
    """Tokens that no reference has."""
    found: list[int] = np.random.default_rng(seed).integers(3, 512, n).tolist()
    return found


def goes_on(session: Session, ids: Sequence[int], chunk: int = 9) -> None:
    """Feed more tokens, and compare all their logits with those of a session that is fed everything at once."""
    before = list(session.ids)
    logits = [session.eval(ids[i : i + chunk], all_logits=True) for i in range(0, len(ids), chunk)]
    assert session.ids == [*before, *ids]
    anew = tiny.whole(session.engine, [*before, *ids])[len(before) :]
    assert tiny.nmse(np.concatenate(logits), anew) <= SAME


@pytest.mark.parametrize("architecture", MODELS)
def test_fork_at_77_and_continue_both(backend: str, architecture: str) -> None:
    """In turns, so that each writes to pages that the other one has shared."""
    session = start(backend, architecture, 77)
    child = session.fork()
    texts = other(70, 1), other(70, 2)
    logits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i in range(0, 70, 10):
        for one, ids, found in zip((session, child), texts, logits, strict=True):
            found.append(one.eval(ids[i : i + 10], all_logits=True))
    for ids, found in zip(texts, logits, strict=True):
        anew = tiny.whole(session.engine, [*text(architecture, 77), *ids])
        assert tiny.nmse(np.concatenate(found), anew[77:]) <= SAME
    session.close()
    goes_on(child, other(5, 3))


@pytest.mark.parametrize("length", [77, 130, 133])
@pytest.mark.parametrize("architecture", MODELS)
def test_trim_by_5_and_continue(backend: str, architecture: str, length: int) -> None:
    """Also back over the end of blocks of 4 and of 128."""
    session = start(backend, architecture, length)
    session.trim(length - 5)
    assert session.ids == text(architecture, length - 5)
    goes_on(session, other(30, 4))


@pytest.mark.parametrize("architecture", MODELS)
def test_trim_leaves_a_fork_as_it_is(backend: str, architecture: str) -> None:
    """Back over the end of a page that the two share."""
    session = start(backend, architecture, 77)
    child = session.fork()
    session.trim(60)
    goes_on(session, other(30, 12))
    goes_on(child, other(20, 13))


@pytest.mark.parametrize("architecture", MODELS)
def test_snapshot_then_restore(backend: str, architecture: str) -> None:
    session = start(backend, architecture, 77)
    snapshot = session.snapshot()
    session.eval(other(20, 5))
    session.restore(snapshot)
    assert session.ids == text(architecture, 77)
    goes_on(session, other(60, 6))
    session.trim(0)
    session.eval(other(100, 7))  # on other pages than those that the snapshot holds
    session.restore(snapshot)
    goes_on(session, other(4, 8), chunk=1)
    snapshot.release()
    with pytest.raises(StateError, match="not released"):
        session.restore(snapshot)


def test_trim_below_what_is_retained(backend: str) -> None:
    """V4's windows forget: then a snapshot below is taken and the tokens after it are evaluated again, or nothing is done."""
    session = start(backend, "deepseek_v4", 300)
    with pytest.raises(CannotTrim) as caught:
        session.trim(120)
    earliest = caught.value.earliest
    assert 120 < earliest <= 300 - 64 and str(earliest) in str(caught.value)
    with pytest.raises(CannotTrim):
        session.trim(earliest - 1)
    assert session.ids == text("deepseek_v4", 300)
    session.trim(earliest)
    goes_on(session, other(40, 8))

    session = start(backend, "deepseek_v4", 110)
    snapshot = session.snapshot()
    session.eval(text("deepseek_v4", 300)[110:])
    steps = session.engine.stats.tokens
    session.trim(120)
    assert session.engine.stats.tokens - steps == 10 and session.ids == text("deepseek_v4", 120)
    goes_on(session, other(40, 9))
    session.trim(110)
    goes_on(session, other(20, 10))
    snapshot.release()
    session.trim(0)
    goes_on(session, other(20, 11))


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v32"])
def test_what_keeps_every_row_trims_to_any_length(backend: str, architecture: str) -> None:
    session = start(backend, architecture, 150)
    for length in (101, 33, 16, 3):
        session.trim(length)
        goes_on(session, other(3, length))
        session.trim(length)


LOAD = """
import json, sys
import numpy as np
from tensorgraph.session import Session
from tests.models import tiny
backend, architecture, kv_dtype, path, out = sys.argv[1:]
session = Session(tiny.engine(architecture, kv_dtype=kv_dtype, backend=backend))
session.load(path)
np.savez(out, ids=list(session.ids), logits=session.eval(json.loads(sys.stdin.read()), all_logits=True))
"""


@pytest.mark.parametrize("kv_dtype", ["f32", "f16"])
@pytest.mark.parametrize("architecture", MODELS)
def test_save_then_load_in_another_process(backend: str, architecture: str, kv_dtype: str, tmp_path: Path) -> None:
    session, more = start(backend, architecture, 77, kv_dtype), other(60, 13)
    session.save(tmp_path / "state")
    command = [sys.executable, "-c", LOAD, backend, architecture, kv_dtype, str(tmp_path / "state"), str(tmp_path / "out.npz")]
    subprocess.run(command, input=json.dumps(more).encode(), cwd=ROOT, check=True, timeout=120)
    with np.load(tmp_path / "out.npz") as out:
        assert out["ids"].tolist() == text(architecture, 77)
        assert tiny.nmse(out["logits"], session.eval(more, all_logits=True)) <= SAME
        if kv_dtype == "f32":
            anew = tiny.whole(session.engine, [*text(architecture, 77), *more])
            assert tiny.nmse(out["logits"], anew[77:]) <= SAME


@pytest.mark.parametrize("architecture", MODELS)
def test_save_then_load_into_another_store(backend: str, architecture: str, tmp_path: Path) -> None:
    start(backend, architecture, 77).save(tmp_path / "state")
    session = Session(tiny.engine(architecture, backend=backend))
    session.eval(other(20, 16))
    session.load(tmp_path / "state")
    goes_on(session, other(60, 17))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("architecture", MODELS)
def test_two_sessions_in_turns_change_no_bit(backend: str, architecture: str, shared: bool) -> None:
    """Two sequences of one store, or of two stores, that take steps of different sizes, against each of them alone."""
    texts = (other(90, 14), other(70, 15))
    cuts = ([0, 20, 21, 22, 60, 61, 90], [0, 5, 33, 34, 35, 64, 70])

    def step(session: Session, which: int, i: int) -> bytes:
        a, b = cuts[which][i : i + 2]
        logits: np.ndarray = session.eval(texts[which][a:b], all_logits=True)
        return logits.tobytes()

    engine = tiny.engine(architecture, backend=backend)
    alone = []
    for which in (0, 1):
        with Session(engine) as session:
            alone.append([step(session, which, i) for i in range(6)])
    first = Session(engine)
    sessions = (first, first.sibling() if shared else Session(engine))
    turns = [[step(session, which, i) for which, session in enumerate(sessions)] for i in range(6)]
    assert [list(one) for one in zip(*turns, strict=True)] == alone


@pytest.mark.parametrize("architecture", MODELS)
def test_f16_state_is_the_same_in_any_chunks(backend: str, architecture: str, tmp_path: Path) -> None:
    """Rows are rounded when they are appended and read back rounded, by the step that appends them too.

    The reference has the same bytes. Kernels for few tokens and for many may differ in the last bit of f32, so that now and
    then one of 16 bits differs, and V4 selects another row from there on: what holds for most tokens is compared.
    """
    ids, saved, logits = text(architecture, 150), [], []
    options = dataclasses.replace(tiny.engine(architecture, backend=backend).options, lowerings=("absorbed",))
    engine = Engine(tiny.model(architecture), backend, kv_dtype="f16", options=options)
    for chunk in (150, 48, 7):
        with Session(engine, step_tokens=chunk) as session:
            logits.append(session.eval(ids, all_logits=True))
            session.save(tmp_path / "state")
            saved.append((tmp_path / "state").read_bytes())
    n = min(150, len(tiny.tokens(architecture)))
    rounding = tiny.nmse(logits[0][:n], tiny.reference(architecture)["logits"][:n])
    assert 1e-9 < rounding < F16_NOISE[architecture]
    for found in logits[1:]:
        of_tokens = [tiny.nmse(a, b) for a, b in zip(found, logits[0], strict=True)]
        assert np.median(of_tokens) <= 1e-3 * rounding
    if backend == "reference":
        assert saved[1] == saved[0] and saved[2] == saved[0]
        assert max(tiny.nmse(found, logits[0]) for found in logits[1:]) <= 1e-12


def test_a_window_forgets_what_is_beyond_it(backend: str) -> None:
    """Through two layers a window of 20 reaches back 38 tokens and no further."""
    plain = tiny.model("llama")
    config = dataclasses.replace(plain.config, sliding_window=20)
    engine = Engine(Model(plain.architecture, config, plain.catalog, plain.file), backend, kv_dtype="f32")
    ids = text("llama", 90)
    changed = [*ids[:10], (ids[10] + 1) % 512, *ids[11:]]
    want = tiny.whole(engine, ids)
    for got in (tiny.whole(engine, changed), chunks_of_7(engine, changed)):
        differs = np.abs(got - want).max(1) > 1e-4
        assert np.flatnonzero(differs).min() == 10 and np.flatnonzero(differs).max() == 10 + 2 * 19
    assert np.abs(tiny.whole(tiny.engine("llama", backend=backend), ids) - want).max(1).argmax() >= 20


def chunks_of_7(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    with Session(engine, step_tokens=7) as session:
        logits: np.ndarray = session.eval(ids, all_logits=True)
    return logits
