"""Whole steps of small models through the kernels of CUDA, run by the host: logits beside those of other implementations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions
from tensorgraph.engine import Engine
from tensorgraph.session import Session
from tests.backends.cuda import where
from tests.models import tiny
from tests.reference import reference_path
from tests.tools.commands import ok

pytestmark = pytest.mark.usefixtures("machine")
LARGEST = 1e-9
MAIN = ("llama", "deepseek_v32", "deepseek_v4")
OTHERS = tuple(a for a in tiny.ARCHITECTURES if a not in MAIN)
QUANTISED = [("llama", "q8_0"), *(pytest.param(*pair, marks=pytest.mark.deep) for pair in (("llama", "q4_0"), ("llama", "f16")))]
QUANTISED += [pytest.param("deepseek_v4", "mxfp4", marks=pytest.mark.deep)]


def check(got: tiny.Array, want: tiny.Array) -> None:
    found = tiny.nmse(got, want)
    assert found <= LARGEST, f"NMSE {found:.1e}"


def engine(architecture: str, kind: str = "f32", *, exact: bool = True, schedule: int = 0, fuse: bool = True) -> Engine:
    device = where.device()
    device.set_threads(schedule)
    options = CompileOptions(exact=exact, fuse=fuse)
    return Engine(tiny.model(architecture, kind), device, kv_dtype="f32", options=options)


@pytest.mark.parametrize("architecture", MAIN)
def test_logits_of_the_command(architecture: str, tmp_path: Path) -> None:
    """A prompt in chunks, whose borders are no block's, then one by one."""
    stored, n = tiny.reference(architecture), 44
    (tmp_path / "ids.json").write_text(json.dumps(stored["input_ids"][:n].tolist()))
    file = reference_path(f"{architecture}/{architecture}-f32.gguf")
    given = ["--ids", tmp_path / "ids.json", "--prefill", 38, "--chunk", 19, "--out", tmp_path / "out.npz"]
    ok("logits", file, *given, "--backend", where.NAME, "--exact", "--kv-type", "f32")
    with np.load(tmp_path / "out.npz") as found:
        check(found["logits"], stored["logits"][:n])


@pytest.mark.parametrize("architecture", [pytest.param(a, marks=pytest.mark.deep) for a in OTHERS])
def test_other_architectures(architecture: str) -> None:
    stored, n = tiny.reference(architecture), 21
    with Session(engine(architecture)) as session:
        check(session.eval(stored["input_ids"][:n], all_logits=True), stored["logits"][:n])
        check(np.stack([session.eval([int(i)]) for i in stored["input_ids"][n : n + 3]]), stored["logits"][n : n + 3])


@pytest.mark.parametrize("schedule", [1, pytest.param(3, marks=pytest.mark.deep), pytest.param(4, marks=pytest.mark.deep)])
@pytest.mark.parametrize("architecture", ["llama", *(pytest.param(a, marks=pytest.mark.deep) for a in MAIN[1:])])
def test_the_same_bits_in_any_order_of_threads(architecture: str, schedule: int) -> None:
    ids, found = tiny.tokens(architecture), []
    for order in (0, schedule):
        with Session(engine(architecture, exact=False, schedule=order)) as session:
            found.append((session.eval(ids[:9], all_logits=True).tobytes(), session.eval(ids[9:10]).tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("deepseek_v4", marks=pytest.mark.deep)])
def test_a_ragged_batch(architecture: str) -> None:
    """Rows taken from the wrong sequence are wrong rows."""
    stored = tiny.reference(architecture)
    ids = stored["input_ids"]
    text = (ids[:17] * 7 + 3) % 512
    with Session(engine(architecture)) as other, other.sibling() as a, other.sibling() as b:
        logits = Session.batch([(other, text), (a, ids[:26]), (b, ids[:5])], all_logits=True)
        check(logits[1], stored["logits"][:26])
        check(logits[2], stored["logits"][:5])
        logits = Session.batch([(other, text[:1]), (a, ids[26:27]), (b, ids[5:7])], all_logits=True)
    check(logits[1], stored["logits"][26:27])
    check(logits[2], stored["logits"][5:7])


@pytest.mark.parametrize(("architecture", "kind"), QUANTISED)
def test_weights_in_their_own_bits(architecture: str, kind: str) -> None:
    """Exactly, and as they are multiplied by rounded activations: what that changes is small."""
    stored, ids = tiny.reference(architecture, "quant_refs"), tiny.tokens(architecture)
    want = stored[f"{architecture}-{kind}/deq"]
    known = [int(i) for i in stored["pos"] if i < 40]
    rows, chosen = np.arange(len(known)), []
    for exact, largest in ((True, LARGEST), (False, 2e-3)):
        with Session(engine(architecture, kind, exact=exact)) as session:
            names = [n.name for n in session.engine.graph(session.extents()) if n.op in ("top_k", "index_top_k") and n.name]
            found = session.eval(ids[:38], outputs=["logits", *names], all_logits=True)
            chosen.append([np.sort(found[name], axis=-1) for name in names])
            logits = np.concatenate([found["logits"], [session.eval([int(i)]) for i in ids[38:40]]])
        if not exact:  # rounding may turn a choice of experts: what follows of it is no measure of rounding
            turned = {int(t) for a, b in zip(*chosen, strict=True) for t in np.nonzero((a != b).any(axis=-1))[0]}
            rows = np.array([j for j, t in enumerate(known) if t not in turned])
        assert len(rows) >= 0.8 * len(known)
        error = tiny.nmse(logits[known][rows], want[rows])
        assert error <= largest, f"NMSE {error:.1e}"


def test_trim_and_restore() -> None:
    """State lies in the device's memory: pages that are written again, and those that a snapshot keeps."""
    stored = tiny.reference("llama")
    ids = stored["input_ids"]
    with Session(engine("llama")) as session:
        session.eval(ids[:20])
        kept = session.snapshot()
        session.trim(14)
        check(session.eval(ids[14:22], all_logits=True), stored["logits"][14:22])
        session.restore(kept)
        check(session.eval(ids[20:24], all_logits=True), stored["logits"][20:24])
