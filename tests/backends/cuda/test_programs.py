"""Programs on a device between runs: extents that fall as others grow, no room for what they lay out, stores that are gone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cuda.runtime import Mirror, OutOfMemoryError
from tensorgraph.compiler import compile
from tensorgraph.dims import Dim
from tensorgraph.engine import Engine
from tensorgraph.graph import Graph, input
from tensorgraph.ops import relu
from tensorgraph.session import Session
from tests.backends.cuda import where
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("machine")
N_SEQUENCES = 18
"""More than there is room for at first."""


@pytest.mark.parametrize(("s", "t"), [(17, 3), (16, 9), (33, 32), (40, 33)])
def test_an_extent_that_falls_as_another_grows(s: int, t: int) -> None:
    """At the largest extents of its class, there would be nothing to do."""
    T, S = Dim("T", 64), Dim("S", 64)
    outputs = {"y": relu(input("x", (S, 8)).slice(0, T, S)), "z": relu(input("t", (T, 8)))}
    on: Any = where.device()
    step = compile(Graph(outputs), on).bind()
    x = np.arange(s * 8, dtype=np.float32).reshape(s, 8) + 1
    for _ in range(2):
        on.fill_arena(on.arena.size_bytes, 0xEE)
        found = step.run({"x": x, "t": np.ones((t, 8), np.float32)})
        np.testing.assert_array_equal(found["y"], x[t:])


@pytest.mark.parametrize("failing", [2, 3])
def test_without_room_for_what_is_written_a_program_is_as_it_was(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first tables, and as there are to be more sequences: the next try finds room, and gives the same bits."""
    on, ids = where.device(), tiny.tokens("llama").tolist()
    engine = Engine(tiny.model("llama"), on, kv_dtype="f16")
    with Session(engine, context=64) as first:
        sessions = [first, *(first.sibling() for _ in range(N_SEQUENCES - 1))]
        make, made = on.runtime.mirror, []

        def mirror(size_bytes: int) -> Mirror:
            made.append(size_bytes)
            if len(made) == failing:
                raise OutOfMemoryError("[cuda] no room")
            return make(size_bytes)

        monkeypatch.setattr(on.runtime, "mirror", mirror)
        with pytest.raises(OutOfMemoryError, match="no room"):
            Session.batch([(session, ids[:2]) for session in sessions])
        assert [session.length for session in sessions] == [0] * N_SEQUENCES
        found = Session.batch([(session, ids[:2]) for session in sessions])
        assert len(made) > failing
    with Session(Engine(tiny.model("llama"), where.device(), kv_dtype="f16"), context=64) as alone:
        wanted = alone.eval(ids[:2])
    for logits in found:
        assert tiny.nmse(logits, wanted) <= 1e-10


def test_the_state_of_a_session_that_is_gone_is_given_back() -> None:
    """Nobody else needs to run for that."""
    on, ids = where.device(), tiny.tokens("llama").tolist()
    engine = Engine(tiny.model("llama"), on, kv_dtype="f16")
    with Session(engine, context=64) as session:
        for n in (5, 1, 1, 1):  # by several programs, the last of them prepared in advance
            session.eval(ids[:n])
        store, held = weakref.ref(session._store), on.runtime.held_bytes()
        size_bytes = sum(session._store.pages(name).nbytes for name in session._store.specs)
    del session
    gc.collect()
    assert store() is None
    assert on.runtime.held_bytes() <= held - size_bytes
