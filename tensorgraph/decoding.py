"""Steps of one token after another, prepared in advance: they differ in the token and in lengths alone."""

from __future__ import annotations

from collections.abc import Callable
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
    """The next hundred tokens or so of one sequence, each computed with hardly any work outside the device.

    Holds as long as its lease does, and nothing else ran on the device.
    """

    def __init__(self, lease: Lease, replay: Replay) -> None:
        self.lease, self._replay, self._first = lease, replay, lease.length

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
        return Decoding(lease, replay) if replay is not None else None

    def next(self, token: int) -> np.ndarray | None:
        """Append a token: the logits [V] after it; None where it takes a step of its own."""
        lease = self.lease
        if lease.length >= lease.stop or lease.store.leased is not lease:
            return None
        logits = self._replay(lease.length - self._first, token)
        if logits is not None:
            lease.length += 1
        return logits
