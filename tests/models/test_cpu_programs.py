"""Models on the CPU compute the same whether nodes are fused or not, and with the code of every target."""

from __future__ import annotations

import numpy as np
import pytest

from tensorgraph.backends.cpu.target import TARGETS, can_run
from tensorgraph.compiler import CompileOptions
from tensorgraph.engine import Engine
from tensorgraph.extents import Extents
from tensorgraph.session import Session
from tests.models import tiny

HERE = [f"cpu:{name}" for name in ("host", *(name for name, target in TARGETS.items() if can_run(target)))]
QUANTISED = ("q4_0", "q4_1", "q8_0")
"""The types whose products take activations of 8 bits. Rounding to them is not continuous: where a target or a fused kernel has
another last bit before, some round to the neighbour, and all later layers differ by a part of what rounding itself changes. So
their logits are held to the distance that `test_cpu_quantised` allows, and to each other only before the second layer."""


def evaluate(engine: Engine, architecture: str) -> dict[str, np.ndarray]:
    """Logits of a prefill of all but the last 20 tokens and of these one by one, and the first layer's result."""
    ids = tiny.tokens(architecture)
    with Session(engine) as session:
        parts = [session.eval(ids[:-20], outputs=["logits", "blk.0.out"], all_logits=True)]
        parts += [session.eval([int(i)], outputs=["logits", "blk.0.out"], all_logits=True) for i in ids[-20:]]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def distance(found: dict[str, np.ndarray], kind: str) -> float:
    """NMSE from dequantised weights, in parts of llama.cpp's own."""
    stored = tiny.reference("llama", "quant_refs")
    want, peer = stored[f"llama-{kind}/deq"], stored[f"llama-{kind}/native"]
    return tiny.nmse(found["logits"][stored["pos"]], want) / tiny.nmse(peer, want)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_fused_or_not(architecture: str) -> None:
    """Both in f32: by rounding of it, which 27 random layers amplify."""
    options = CompileOptions(exact=True, fuse=False)
    unfused = Engine(tiny.model(architecture), "cpu", kv_dtype="f32", options=options)
    plain, fused = evaluate(unfused, architecture), evaluate(tiny.engine(architecture, backend="cpu"), architecture)
    assert tiny.nmse(plain["logits"], tiny.reference(architecture)["logits"]) <= tiny.bound(architecture)
    assert tiny.nmse(fused["logits"], plain["logits"]) <= tiny.bound(architecture) / 10
    assert n_groups(unfused) > n_groups(tiny.engine(architecture, backend="cpu"))


def n_groups(engine: Engine) -> int:
    """How many groups the nodes of a step are joined into."""
    return sum(len(split) for split in engine.executable(Extents()).plan.groups)


@pytest.mark.parametrize("kind", QUANTISED)
def test_fused_or_not_with_activations_of_8_bits(kind: str) -> None:
    unfused = Engine(tiny.model("llama", kind), "cpu", kv_dtype="f32", options=CompileOptions(fuse=False))
    plain, fused = evaluate(unfused, "llama"), evaluate(tiny.engine("llama", kind, backend="cpu", exact=False), "llama")
    assert distance(plain, kind) <= 2 and distance(fused, kind) <= 2
    if kind == "q4_1":  # the others' embeddings, multiples of few numbers, are often just between two of 8 bits
        assert tiny.nmse(fused["blk.0.out"], plain["blk.0.out"]) <= 1e-6


def deep_but(plain: str, *others: str) -> list[object]:
    return [plain, *(pytest.param(other, marks=pytest.mark.deep) for other in others if other != plain)]


@pytest.mark.parametrize("architecture", deep_but(*tiny.ARCHITECTURES))
@pytest.mark.parametrize("backend", HERE)
def test_every_target_in_f32(backend: str, architecture: str) -> None:
    stored = tiny.reference(architecture)
    engine = tiny.engine(architecture, backend=backend)
    assert tiny.nmse(evaluate(engine, architecture)["logits"], stored["logits"]) <= tiny.bound(architecture)
    generated: list[int] = []
    with Session(engine) as session:
        logits = session.eval(stored["input_ids"])
        for _ in stored["greedy_tokens"]:
            generated.append(int(np.argmax(logits)))
            logits = session.eval(generated[-1:])
    assert generated == stored["greedy_tokens"].tolist()


@pytest.mark.parametrize("kind", deep_but("q4_1", *QUANTISED))
@pytest.mark.parametrize("backend", HERE)
def test_every_target_with_activations_of_8_bits(backend: str, kind: str) -> None:
    found = evaluate(tiny.engine("llama", kind, backend=backend, exact=False), "llama")
    assert distance(found, kind) <= 2
    if kind == "q4_1":
        host = evaluate(tiny.engine("llama", kind, backend="cpu", exact=False), "llama")
        assert tiny.nmse(found["blk.0.out"], host["blk.0.out"]) <= 1e-6


@pytest.mark.parametrize("kind", deep_but("q4_1", "q4_0", "q5_0", "q5_1", "q8_0", "f16"))
@pytest.mark.parametrize("backend", HERE)
def test_every_target_with_quantised_weights_exactly(backend: str, kind: str) -> None:
    stored = tiny.reference("llama", "quant_refs")
    found = evaluate(tiny.engine("llama", kind, backend=backend), "llama")
    assert tiny.nmse(found["logits"][stored["pos"]], stored[f"llama-{kind}/deq"]) <= 1e-9


PLACED = [
    ("cpu,reference", "blk.1.*", "reference"),
    ("cpu,reference", "*ffn*", "reference"),
    ("reference,cpu", "blk.0.*", "cpu"),
    ("cpu,cpu:host", "blk.1.*", "cpu:host"),
]


@pytest.mark.parametrize("architecture", deep_but(*tiny.ARCHITECTURES))
@pytest.mark.parametrize(("devices", "pattern", "on"), PLACED)
def test_some_nodes_on_another_device(architecture: str, devices: str, pattern: str, on: str) -> None:
    """A step is in parts, which read one another's results and the same streams."""
    options = CompileOptions(exact=True, placement={pattern: on})
    engine, ids = Engine(tiny.model(architecture), devices, kv_dtype="f32", options=options), tiny.tokens(architecture).tolist()
    with Session(engine) as session:
        logits = [session.eval(ids[:-6], all_logits=True), *(session.eval([i], all_logits=True) for i in ids[-6:])]
        assert len(engine.executable(session.extents()).plan.scheduled.splits) > 1
    assert tiny.nmse(np.concatenate(logits), tiny.reference(architecture)["logits"]) <= tiny.bound(architecture)
