"""Steps of one token after another, prepared in advance: they differ in the token and in lengths alone."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from tensorgraph.extents import StepInputs
from tensorgraph.plan import Executable
from tensorgraph.state_step import Lease

if TYPE_CHECKING:
    from tensorgraph.session import Session

Replay = Callable[[int, int], "np.ndarray | None"]
"""`replay(i, token)`: the logits [V] of the i-th step; None where the device has done something else in between."""


class Decoding:
    """The next hundred tokens or so of one session, each computed with hardly any work outside the device.

    Holds as long as its lease does, and nothing else ran on the device.
    """

    __slots__ = ("_lock", "_lease", "_replay", "_first", "_vocab_size", "_ids", "_stats")

    def __init__(self, session: Session, lease: Lease, replay: Replay) -> None:
        engine = session.engine
        self._lock, self._vocab_size, self._stats = engine.lock, engine.vocab_size, engine.stats
        self._lease, self._replay, self._ids, self._first = lease, replay, session._ids, lease.length
        lease.stop = min(lease.stop, session.context)

    @staticmethod
    def begin(session: Session, executable: Executable, make_inputs: StepInputs) -> Decoding | None:
        """The steps that follow now; None where they cannot be prepared."""
        lease = session._store.lease(session._open())
        if lease is None:
            return None
        one = np.zeros(1, np.int32)
        runs = [(*make_inputs(step, one, one), step) for step in lease.steps(2)]
        inputs, dims, step = runs[-1]
        by = {name: n - runs[0][1][name] for name, n in dims.items()}
        for i in range(1, lease.stop - lease.length - 1):  # only extents are looked at beyond the second
            runs.append((inputs, {name: n + i * by[name] for name, n in dims.items()}, step))
        replay = executable.replay(runs, "tokens")
        return Decoding(session, lease, replay) if replay is not None else None

    def next(self, token: int) -> np.ndarray | None:
        """Append a token: the logits [V] after it; None where it takes a step of its own, or is none."""
        began = perf_counter()
        self._lock.acquire()  # on cold caches, `with` takes twice as long
        try:
            lease = self._lease
            length = lease.length
            if length >= lease.stop or type(token) is not int or not 0 <= token < self._vocab_size:
                return None
            logits = self._replay(length - self._first, token)
            if logits is not None:
                lease.length = length + 1
                self._ids.append(token)
                stats = self._stats
                stats.steps += 1
                stats.prepared += 1
                stats.tokens += 1
                stats.run_s += perf_counter() - began
            return logits
        finally:
            self._lock.release()
