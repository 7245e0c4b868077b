"""A barrier or a fence that is left out is found by running a kernel on the host, under one of a few schedules of its threads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.backends.cuda.host import HostDevice, HostRuntime
from tensorgraph.errors import TensorGraphError
from tensorgraph.tools.conformance.evaluate import evaluate, node_of

Array = np.ndarray[Any, Any]
SCHEDULES = (0, 1, 2, 3)
BARRIER = re.compile(r"__(sync(threads|warp)|threadfence)\(\);")


class Without(HostRuntime):
    """Kernels without their n-th barrier, counted over what follows `function` in their source."""

    def __init__(self, schedule: int, function: str, n: int) -> None:
        super().__init__(schedule)
        self.function, self.n, self.removed = function, n, 0

    def kernels(self, sources: Mapping[str, str]) -> dict[str, int]:
        return super().kernels({name: self._broken(source) for name, source in sources.items()})

    def _broken(self, source: str) -> str:
        begin = source.find(self.function)
        places = [*BARRIER.finditer(source, begin)] if begin >= 0 else []
        if len(places) <= self.n:
            return source
        self.removed += 1
        at = places[self.n]
        return source[: at.start()] + ";" + source[at.end() :]


class Device(HostDevice):
    def __init__(self, runtime: Without) -> None:
        super().__init__("cuda-host")
        self.made = runtime

    def _started(self) -> HostRuntime:
        self.host = self.made
        return self.made


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wide(op: str, **attrs: Any) -> tuple[str, dict[str, Array], dict[str, Any]]:
    return op, {"x": numbers(5, 2500)}, attrs


ATTENTION = {"q": numbers(5, 4, 64), "k0": numbers(70, 2, 64, seed=1), "v0": numbers(70, 2, 64, seed=2)}
MANY_ROWS = {"q": numbers(8, 2, 32), "k0": numbers(2048, 1, 32, seed=1)}  # in each split, so that none is left empty
SPLIT = ("flash_attn", MANY_ROWS, {"scale": 0.2, "segments": ((1, None, False),)})
CASES: dict[str, tuple[tuple[str, dict[str, Array], dict[str, Any]], str, int]] = {
    "a sum over a block, before it is read": (wide("rms_norm", eps=1e-5), "__global__", 0),
    "a sum over a block, before the next": (wide("norm", eps=1e-5), "__global__", 1),
    "a maximum over a block": (wide("soft_max"), "__global__", 0),
    "what other lanes wrote": (wide("cumsum"), "__global__", 0),
    "a tile in shared memory": (("mul_mat", {"a": numbers(70, 100), "b": numbers(40, 100, seed=1)}, {}), "tg_fma_tile(", 1),
    "rows of keys": (("flash_attn", ATTENTION, {"scale": 0.2, "segments": ((1, None, True),)}), "attend(", 1),
    "parts, before their block is counted": (SPLIT, "is_last(", 1),
    "parts, without a fence": (SPLIT, "is_last(", 0),
}
"""An op and its inputs; where in its kernel's source barriers are counted from, and which is left out."""


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("case", CASES)
def test_a_removed_barrier_is_found(case: str) -> None:
    (name, slots, attrs), function, n = CASES[case]
    node = node_of(registry.ops.get(name), slots, attrs)
    wanted = evaluate(node, slots, HostDevice("cuda-host"))
    found = []
    for schedule in SCHEDULES:
        runtime = Without(schedule, function, n)
        try:
            got = evaluate(node, slots, Device(runtime))
            found.append(got.tobytes() != wanted.tobytes())
        except TensorGraphError:
            found.append(True)
        assert runtime.removed, "there is no such barrier"
    assert any(found)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("case", CASES)
def test_with_all_barriers_every_schedule_gives_the_same(case: str) -> None:
    (name, slots, attrs), _, _ = CASES[case]
    node = node_of(registry.ops.get(name), slots, attrs)
    results = {evaluate(node, slots, Device(Without(schedule, "no such", 0))).tobytes() for schedule in SCHEDULES}
    assert len(results) == 1
