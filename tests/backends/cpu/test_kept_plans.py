"""Plans on disk: what is read is what was compiled, for every architecture; anything else is compiled again."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.backends.cpu import recipes
from tensorgraph.backends.cpu.code_cache import CodeCache
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.kept_plans import KeptPlans, plan_content, read_plan
from tensorgraph.compiler import CompileOptions, PlanCache
from tensorgraph.device import Device
from tensorgraph.engine import Engine
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, constant, input
from tensorgraph.op import Op
from tensorgraph.ops import mul_mat, rms_norm
from tests.models import tiny
from tests.models.tiny import ARCHITECTURES

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of ours that have changed since this process began, in a checkout that is worked in, keep plans off the disk."""
    monkeypatch.setattr(recipes, "_last_change_s", lambda: 0.0)


class Counted(KeptPlans):
    """Counts what is compiled."""

    compiled = 0

    @property
    def entries(self) -> int:
        return len(list(self.disk.folder.iterdir()))


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counted, make = Counted(CodeCache(tmp_path / "code")), PlanCache.make

    def made(self: PlanCache, *given: Any) -> Any:
        counted.compiled += 1
        return make(self, *given)

    monkeypatch.setattr(PlanCache, "make", made)
    yield counted


def again(plans: Counted) -> KeptPlans:
    """What another process has: the disk alone."""
    return KeptPlans(CodeCache(plans.disk.folder))


def logits(architecture: str, plans: PlanCache) -> tuple[Array, str]:
    engine = Engine(tiny.model(architecture), CpuDevice(), cache=plans)
    return tiny.whole(engine, range(1, 20)), "\n".join(str(plan) for plan in plans._plans.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_read_is_what_was_compiled(architecture: str, plans: Counted) -> None:
    wanted, text = logits(architecture, plans)
    n = plans.compiled
    assert n == plans.entries > 0
    found, read = logits(architecture, again(plans))
    assert plans.compiled == n and read == text
    np.testing.assert_array_equal(found, wanted)


def graph(width: int = 64, literal: float | None = None) -> Graph:
    x = input("x", (Extents().new_tokens, width))
    w = constant("w", shape=(16, width)) if literal is None else constant("w", np.full((16, width), literal, np.float32))
    return Graph(y=mul_mat(w, rms_norm(x, eps=1e-6)))


def test_only_the_same_is_found(plans: Counted) -> None:
    device = CpuDevice()
    plans.get(graph(), device)
    for other, options in (graph(128), None), (graph(), CompileOptions(exact=True)), (graph(), CompileOptions(fuse=False)):
        n = plans.compiled
        again(plans).get(other, device, options)
        assert plans.compiled == n + 1
    n = plans.compiled
    again(plans).get(graph(), device, CompileOptions())
    assert plans.compiled == n


def test_literals_are_those_of_the_graph_that_asks(plans: Counted) -> None:
    x = np.ones((3, 64), np.float32)
    for literal in (1.0, 2.0):
        found = again(plans).get(graph(literal=literal), CpuDevice()).run(x=x)["y"]
        np.testing.assert_allclose(found, 64 * literal, rtol=1e-5)
    assert plans.compiled == 1


def test_a_deep_graph_is_kept(plans: Counted) -> None:
    x = input("x", (4, 8))
    y = x
    for i in range(3000):
        y = rms_norm(y, eps=1e-6 * (1 + i % 7))
    deep = Graph(y=y)
    for cache in (plans, again(plans)):
        assert len(cache.get(deep, CpuDevice(), CompileOptions(fuse=False)).graph) == 3001
    assert plans.compiled == 1


def test_nothing_is_kept_where_other_code_takes_part(plans: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CpuDevice()
    Op("test_kept_op", "x[...]: real -> y[...]: x")
    try:
        plans.get(graph(), device)
    finally:
        registry.ops.remove("test_kept_op")
    plans.get(graph(128), [device, registry.backends.get("reference")("reference")])
    plans.get(graph(256), device, CompileOptions(verify_passes=True))
    monkeypatch.setattr(recipes, "_digest", lambda: None)
    plans.get(graph(512), device)
    assert plans.compiled == 4 and plans.entries == 0


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c[3:], lambda c: c[::-1]]
)
def test_what_is_no_plan_is_compiled(damage: Any, plans: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own check passes here: a file that we wrote when plans were written otherwise."""
    plans.get(graph(), CpuDevice())
    get = CodeCache.get
    monkeypatch.setattr(CodeCache, "get", lambda self, key: damage(get(self, key)))
    assert len(again(plans).get(graph(), CpuDevice()).graph) == 4 and plans.compiled == 2


class Bad:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/nowhere/at/all",)


@pytest.mark.parametrize("value", [Bad(), os.getcwd, eval, [], None, CompileOptions()])
def test_a_pickle_of_anything_else_is_no_plan(value: Any) -> None:
    listed = pickle.dumps([])
    assert read_plan(listed + pickle.dumps(([], value))) is None
    assert read_plan(pickle.dumps([value]) + listed) is None and read_plan(pickle.dumps(value)) is None


def test_what_cannot_be_written_down_is_no_content(plans: Counted) -> None:
    plan = plans.get(graph(), CpuDevice())
    assert plan_content(plan) is not None
    device: Device = CpuDevice()
    for value in (lambda: None, device.lock):
        assert plan_content(replace(plan, key=value)) is None  # type: ignore[arg-type]


def test_a_loaded_model_keeps_its_plans() -> None:
    from tensorgraph.models.text.model import load
    from tests.reference import reference_path

    with load(reference_path("llama/llama-f32.gguf")) as model:
        assert isinstance(model.engine.cache, KeptPlans)
    with load(reference_path("llama/llama-f32.gguf"), backend="reference") as model:
        assert type(model.engine.cache) is PlanCache
