"""Every architecture against logits, hidden states and selections that another implementation computed in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tensorgraph.engine import Engine
from tensorgraph.session import Session
from tests.models import tiny

pytestmark = tiny.on_every_backend

SELECTIONS = {"deepseek_v2": 26, "deepseek_v3": 2, "deepseek_v32": 5, "glm_moe_dsa": 4, "deepseek_v4": 6, "qwen3moe": 2}
"""How many were recorded."""
SLOW = {("deepseek_v2", 3), ("deepseek_v2", 7), ("deepseek_v4", 3), ("deepseek_v4", 7)}
"""Chunks of many steps on the models with most nodes; their other chunks run always."""


def chunked() -> list[object]:
    pairs = [(a, n) for a in tiny.ARCHITECTURES for n in (3, 7, 48, 130)]
    return [pytest.param(a, n, marks=[pytest.mark.deep] if (a, n) in SLOW else []) for a, n in pairs]


def check(architecture: str, got: tiny.Array, stop: int | None = None, start: int = 0) -> None:
    """Logits of the positions start..stop-1."""
    found = tiny.nmse(got, tiny.reference(architecture)["logits"][start:stop])
    assert found <= tiny.bound(architecture), f"NMSE {found:.1e}"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_prefill_then_one_by_one(backend: str, architecture: str) -> None:
    engine, stored = tiny.engine(architecture, backend=backend), tiny.reference(architecture)
    ids, n_prefill = stored["input_ids"], int(stored["n_prefill"])
    with Session(engine) as session:
        check(architecture, session.eval(ids[:n_prefill], all_logits=True), n_prefill)
        decoded = [session.eval(ids[i : i + 1]) for i in range(n_prefill, len(ids))]
    check(architecture, np.stack(decoded), None, n_prefill)
    found = tiny.nmse(np.stack(decoded), stored["decode_logits"])
    assert found <= tiny.bound(architecture), f"NMSE {found:.1e}"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy(backend: str, architecture: str) -> None:
    """Whole prefill, then the 16 tokens that the reference generates."""
    stored, generated, logits = tiny.reference(architecture), [], []
    with Session(tiny.engine(architecture, backend=backend)) as session:
        all_logits = session.eval(stored["input_ids"], all_logits=True)
        check(architecture, all_logits)
        next_logits = all_logits[-1]
        for _ in stored["greedy_tokens"]:
            logits.append(next_logits)
            generated.append(int(np.argmax(next_logits)))
            next_logits = session.eval(generated[-1:])
    assert generated == stored["greedy_tokens"].tolist()
    assert tiny.nmse(np.stack(logits), stored["greedy_logits"]) <= tiny.bound(architecture)


@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        *((a, form) for a in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa") for form in ("naive", "absorbed")),
        *((a, "selected rows") for a in ("deepseek_v32", "glm_moe_dsa")),
    ],
)
def test_each_form_of_attention(backend: str, architecture: str, form: str) -> None:
    """Whichever is asked for, in steps of any number of tokens; that of selected rows, too, where there are no more."""
    options = dataclasses.replace(tiny.engine(architecture, backend=backend).options, lowerings=(form,))
    engine = Engine(tiny.model(architecture), backend, kv_dtype="f32", options=options)
    for n in (130, 48, 3):
        with Session(engine, step_tokens=n) as session:
            check(architecture, session.eval(tiny.tokens(architecture)[:96], all_logits=True), 96)


@pytest.mark.parametrize(("architecture", "n"), chunked())
def test_chunks(backend: str, architecture: str, n: int) -> None:
    with Session(tiny.engine(architecture, backend=backend), step_tokens=n) as session:
        check(architecture, session.eval(tiny.tokens(architecture), all_logits=True))


@pytest.mark.parametrize("architecture", [pytest.param(a, marks=pytest.mark.deep) for a in tiny.ARCHITECTURES])
def test_one_by_one_from_the_start(backend: str, architecture: str) -> None:
    with Session(tiny.engine(architecture, backend=backend), step_tokens=1) as session:
        check(architecture, np.stack([session.eval([i]) for i in tiny.tokens(architecture)]))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_ragged_batch(backend: str, architecture: str) -> None:
    """A third sequence, of another text, stands first: rows taken from the wrong sequence are wrong rows."""
    engine, ids = tiny.engine(architecture, backend=backend), tiny.tokens(architecture)
    text = (ids[:61] * 7 + 3) % 512
    with Session(engine) as other, other.sibling() as a, other.sibling() as b:
        logits = Session.batch([(other, text), (a, ids), (b, ids[:37])], all_logits=True)
    check(architecture, logits[1])
    check(architecture, logits[2], 37)
    assert tiny.nmse(logits[0], tiny.whole(engine, text)) <= tiny.bound(architecture)


@pytest.mark.parametrize(("mine", "yours"), [(61, 40), pytest.param(7, 5, marks=pytest.mark.deep)])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_ragged_batch_with_phases_shifted(backend: str, architecture: str, mine: int, yours: int) -> None:
    """Sequence b starts when a is at 77; each step takes other numbers of tokens of the two."""
    ids = tiny.tokens(architecture)
    with Session(tiny.engine(architecture, backend=backend)) as a, a.sibling() as b:
        of_a, of_b = [a.eval(ids[:77], all_logits=True)], []
        while a.length < len(ids):
            chunks = ids[a.length : a.length + mine], ids[b.length : b.length + yours]
            logits = Session.batch([(b, chunks[1]), (a, chunks[0])], all_logits=True)
            of_b.append(logits[0])
            of_a.append(logits[1])
        check(architecture, np.concatenate(of_a))
        check(architecture, np.concatenate(of_b), b.length)


@pytest.mark.parametrize("n", [pytest.param(512, id="whole"), pytest.param(48, id="chunks of 48")])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_hidden_states_and_selections(backend: str, architecture: str, n: int) -> None:
    stored, config = tiny.reference(architecture), tiny.model(architecture).config
    states = {"hidden_embed": "embed", "hidden_norm": "norm"}
    states |= {f"hidden_layer{i}": f"blk.{i}.out" for i in range(config.num_hidden_layers)}
    chosen = list(tiny.selections(stored, getattr(config, "compress_ratios", ())))
    wanted = {*states.values(), *(tap for tap, _, _ in chosen)}
    with Session(tiny.engine(architecture, backend=backend), step_tokens=n) as session:
        taps = session.eval(stored["input_ids"], outputs=sorted(wanted), all_logits=True)
    for key, tap in states.items():
        found = tiny.nmse(taps[tap][stored["hidden_pos"]], stored[key])
        assert found <= tiny.bound(architecture), f"{key}: NMSE {found:.1e}"
    for tap, ids, every in chosen:
        assert tiny.same_sets(taps[tap], ids, every), tap
    assert len(chosen) == SELECTIONS.get(architecture, 0)


OF_THE_PEER = {"gemma3": 2e-7}
"""These logits are the peer's, whose GELU goes through a table of 16 bits: on Gemma's F32 file that alone is 1.4e-7."""
FILES = [("llama", kind) for kind in ("f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")]
FILES += [("deepseek_v3", "q8_0"), ("deepseek_v4", "mxfp4"), ("qwen3moe", "q8_0"), ("gemma3", "q8_0")]


@pytest.mark.parametrize("n", [512, pytest.param(48, marks=pytest.mark.deep)])
@pytest.mark.parametrize(("architecture", "kind"), FILES)
def test_other_weight_types(backend: str, architecture: str, kind: str, n: int) -> None:
    """The same arithmetic on dequantised weights."""
    stored = tiny.reference(architecture, "quant_refs")
    with Session(tiny.engine(architecture, kind, backend=backend), step_tokens=n) as session:
        logits = session.eval(tiny.tokens(architecture), all_logits=True)
    found = tiny.nmse(logits[stored["pos"]], stored[f"{architecture}-{kind}/deq"])
    assert found <= OF_THE_PEER.get(architecture, 1e-9), f"NMSE {found:.1e}"
