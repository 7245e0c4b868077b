"""Runs of a program prepared in advance: steps of one token after another, of which all that is written before a run is known.

A step is then a few copies within the host's memory, one recorded launch that also reads the row of the output, and a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorgraph.backends.cuda.runtime import Bytes
from tensorgraph.device import Run
from tensorgraph.dtypes import i32
from tensorgraph.graph import Node

if TYPE_CHECKING:
    from tensorgraph.backends.cuda.program import Program

Given = tuple[Mapping[Node, np.ndarray], Run]
"""Inputs, extents and state of one run; of the inputs and the state, those of the first two runs are looked at."""
MOST_ROWS = 4
Prepared = Callable[[int, int], "np.ndarray | None"]


class Replay:
    """Several runs of a program that has one output, of one row."""

    def __init__(self, program: Program, runs: Sequence[Given], varying: Node) -> None:
        self._program, self._device = program, program.device
        first, second = runs[0], runs[min(1, len(runs) - 1)]
        if program.streams:
            program.bind_streams(first[1].state)  # may lay out anew what is written
        dims: dict[str, Any] = {name: np.array([run.dims[name] for _, run in runs]) for name in first[1].dims}
        self._moves: list[tuple[np.ndarray, np.ndarray]] = []  # where numbers go, and a row of them for each run
        extents = [np.broadcast_to(e, len(runs)) for e in program.evaluate(dims)]
        if extents:
            self._moves.append((program.extents, np.stack(extents, axis=1)))
        for node, buffer in program.external.items():
            if node is not varying:
                self._grows(buffer, first[0][node].reshape(-1), second[0][node].reshape(-1), len(runs))
        for name, table in program.tables.items():
            steps: list[Any] = [run.state for _, run in (first, second)]
            a, b = (np.array(table.numbers(step.classes[table.stream_class]), np.int64) for step in steps)
            self._grows(program.table_rows[name], a, b, len(runs))
        holds = [np.broadcast_to(h, len(runs)).tolist() for h in program.holds(dims)]
        wide = [program.widths(name, dims[name].tolist()) for name in program.widest]
        by_guards: list[Any] = [*zip(*holds, strict=True)] or [()] * len(runs)
        by_extents: list[Any] = [*zip(*wide, strict=True)] or [()] * len(runs)
        self._keys = [*zip(by_guards, by_extents, strict=True)]  # of runs of which the same is recorded
        self._recorded: dict[tuple[Any, Any], Callable[[], list[Bytes]]] = {}
        self._dims = [run.dims for _, run in runs]
        self._x = program.external[varying]
        self._places, _ = program.places_of(first[1].dims)
        self._dtype = program.outputs[0].dtype
        self._rows: list[np.ndarray] = []
        self._version = self._device.version
        program.owner = self

    def _grows(self, to: np.ndarray, first: np.ndarray, second: np.ndarray, n: int) -> None:
        """Numbers that grow by the same from run to run."""
        by, to = second - first, to[: len(first)]
        to[:] = first
        if by.any():
            self._moves.append((to, (first + np.arange(n)[:, None] * by).astype(to.dtype)))

    def run(self, i: int, x: int) -> np.ndarray | None:
        """Make the i-th, with x as the only element of one input: the row; None where the program has run otherwise since these
        were prepared, or memory has moved."""
        program = self._program
        with self._device.lock:
            if program.owner is not self or self._device.version != self._version:
                return None
            for to, rows in self._moves:
                to[...] = rows[i]
            self._x[0] = x
            key = self._keys[i]
            recorded = self._recorded.get(key)
            if recorded is None:
                recorded = program.recorded(key[0], self._dims[i], self._places)
                if self._device.version != self._version:  # what kernels share has moved, of which the others do not know
                    self._recorded.clear()
                    self._version = self._device.version
                self._recorded[key] = recorded
            status, row = recorded()
            program.refuse(status)
            return self._kept(row.view(self._dtype))

    def _kept(self, row: np.ndarray) -> np.ndarray:
        """A row for the caller to keep: in memory that was touched before where there is some that nobody views."""
        found = next((each for each, n in zip(self._rows, _references(self._rows), strict=True) if n == _UNSEEN), None)
        if found is None:
            found = np.empty_like(row)
            if len(self._rows) < MOST_ROWS:
                self._rows.append(found)
        found[:] = row
        return found.view()


def _references(rows: Sequence[np.ndarray]) -> list[int]:
    """How many hold each array, the list and this among them: how many those are differs between versions of Python."""
    found = []
    for row in rows:
        found.append(getrefcount(row))
    return found


(_UNSEEN,) = _references([np.empty(0)])


def prepare(program: Program, runs: Sequence[Given], varying: Node) -> Prepared | None:
    """`Replay.run` of these runs; None where results are more than one row, or more is written than goes along with the rest."""
    if not runs or program.checks or program.large or varying not in program.external or varying.dtype != i32:
        return None
    (first, run), (second, _) = runs[0], runs[min(1, len(runs) - 1)]
    alike = all(value.shape == second[node].shape for node, value in first.items())
    shapes = [o.shape(run.dims) for o in program.outputs if o.where is None and o.buffer is None]
    if not alike or len(program.outputs) != 1 or [len(s) == 2 and s[0] for s in shapes] != [1]:
        return None
    with program.device.lock:
        return Replay(program, runs, varying).run
