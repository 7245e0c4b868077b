"""What SmolLM2 takes on the CPU: memory, and native steps a token."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu.program import Program
from tensorgraph.compiler import CompileOptions
from tensorgraph.memory import storage_roots
from tensorgraph.models import load
from tensorgraph.plan import Plan
from tests.layout import ROOT

MEASURE = """
import gc, json, os, resource, sys
import numpy as np
from tensorgraph.models import load

def status(name):
    # the kernel's own count where there is one; elsewhere the most so far, which neither may grow
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most

def use(n_prompt, n_tokens):
    with load("smollm2", backend="cpu") as model, model.session(context=2048) as session:
        session.eval(np.random.default_rng(0).integers(3, 30_000, n_prompt))
        for _ in range(n_tokens):
            session.eval([7])
        return session.state_bytes

"""
DROP = """
resident = []
for _ in range(21):
    use(64, 3)
    gc.collect()
    resident.append(status("VmRSS"))
print(json.dumps(resident))
"""
PEAK = """
from pathlib import Path
from tensorgraph.models import find_packaged
state_bytes = use(1024, 20)
print(json.dumps({"peak": status("VmHWM"), "weights": find_packaged('smollm2').stat().st_size, "state": state_bytes}))
"""


def measured(script: str) -> Any:
    """What a script prints, in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", MEASURE + script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_what_is_dropped_is_given_back() -> None:
    """Loaded, used and dropped 20 times more, the model leaves no more resident than after the first time."""
    resident = measured(DROP)
    assert resident[-1] <= 1.05 * resident[0], resident


def test_peak_memory() -> None:
    """Of a long prompt and some tokens: weights, state, and 300 MB for all else, the file's own pages among it."""
    found = measured(PEAK)
    assert found["weights"] > 95e6 and found["state"] > 20e6
    assert found["peak"] <= 1.1 * found["weights"] + found["state"] + 300e6, found


def live_bytes(plan: Plan) -> int:
    """The most bytes that must be kept at one time, from what groups store, need, and read."""
    groups = [group for split in plan.groups for group in split]
    last: dict[Any, int] = {}
    for position, group in enumerate(groups):
        for value in group.reads:
            last |= dict.fromkeys(storage_roots(value), position)
    for output in plan.graph.outputs.values():
        last |= dict.fromkeys(storage_roots(output), len(groups))
    change = np.zeros(len(groups) + 2, np.int64)
    for position, group in enumerate(groups):
        for node in group.stored:
            change[position] += group.size_of(node)
            change[last.get(node, position) + 1] -= group.size_of(node)
        for size_bytes in group.scratch.values():
            change[position] += size_bytes
            change[position + 1] -= size_bytes
    return int(np.cumsum(change).max())


@pytest.mark.parametrize("tokens", [512, 64, 1])
def test_the_arena_is_hardly_larger_than_what_lives_at_one_time(tokens: int) -> None:
    with load("smollm2", backend="cpu") as model, model.session(context=2048, step_tokens=tokens) as session:
        plan = session.plan
        assert live_bytes(plan) <= plan.memory["cpu"].peak_bytes <= 1.1 * live_bytes(plan)
        assert plan.memory["cpu"].total_bytes > 3 * live_bytes(plan)


@pytest.mark.parametrize("exact", [False, True])
def test_native_steps_of_a_token(exact: bool) -> None:
    """Five for each of 30 layers and a few more, in the table that the executor walks."""
    with load("smollm2", backend="cpu", options=CompileOptions(exact=exact)) as model, model.session(context=2048) as session:
        session.eval([7])
        ((_, program, _, _),) = model.engine.executable(session.extents())._program(())
        assert isinstance(program, Program)
        table, calls = program.table({"T": 1, "O": 1, "S": 1, "R": 1})
        assert len(table) == len(calls) <= 160
