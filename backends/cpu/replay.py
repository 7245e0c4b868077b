"""Runs of a program prepared in advance: what differs between them is written down before the first.

The runs are steps of one token after another, so that all their numbers but extents grow evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorgraph.backends.cpu.kernel import MESSAGES
from tensorgraph.device import Run
from tensorgraph.graph import Node

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.program import Program

Given = tuple[Mapping[Node, np.ndarray], Run]
"""Inputs, extents and state of one run; of the inputs and the state, those of the first two runs are looked at."""


class Replay:
    """Several runs of a program that has one output, of one row: `replay(i, x)` makes the i-th with x as the only element of one
    input, and gives the row; None where the program has run otherwise since these were prepared."""

    def __init__(self, program: Program, runs: Sequence[Given], varying: Node) -> None:
        self._program, self._device = program, program.device
        self._input = program.external[varying]
        self._changing: list[tuple[np.ndarray, np.ndarray]] = []  # where it goes, and a row for each run
        first, second = runs[0], runs[min(1, len(runs) - 1)]
        if program.n_dynamic:
            rows = np.array([program.evaluate(run.dims) for _, run in runs], np.int64)
            self._changing.append((program.extents[: program.n_dynamic], rows))
        for node, buffer in program.external.items():
            if node is not varying:
                self._add(buffer, first[0][node].reshape(-1), second[0][node].reshape(-1), len(runs))
        for table in program.class_tables.values():
            numbers = []
            for _, run in (first, second):
                state: Any = run.state
                table.fill(state.classes[table.stream_class])
                numbers.append(table.numbers.copy())
            self._add(table.numbers, numbers[0], numbers[1], len(runs))
        self._table, self._dims = program.table_of(first[1].dims), [run.dims for _, run in runs]
        self._row = program.outputs[0].array(self._device.arena, first[1].dims)[0]
        self._version = self._device.version
        program.owner = self

    def _add(self, to: np.ndarray, first: np.ndarray, second: np.ndarray, n: int) -> None:
        """Numbers that grow by the same from run to run."""
        by = second - first
        to[: len(first)] = first
        if by.any():
            self._changing.append((to[: len(first)], first + np.arange(n)[:, None] * by))

    def __call__(self, i: int, x: Any) -> np.ndarray | None:
        device = self._device
        with device.lock:
            if self._program.owner is not self or device.version != self._version:
                return None
            for to, rows in self._changing:
                to[:] = rows[i]
            self._input[0] = x
            if device.note is None:
                device.run(self._table, MESSAGES)
            else:
                device.profile(self._table, MESSAGES, self._program.made_calls(self._dims[i]), self._dims[i])
            row: np.ndarray = self._row.copy()
            return row


def prepare(program: Program, runs: Sequence[Given], varying: Node) -> Replay | None:
    """None where runs differ in more than numbers, or results are more than one row."""
    if not runs:
        return None
    dims = [run.dims for _, run in runs]
    alike = len({program.holds(d) for d in dims}) == 1 and not program.checks
    (first, _), (second, _) = runs[0], runs[min(1, len(runs) - 1)]
    alike = alike and all(value.shape == second[node].shape for node, value in first.items())
    outputs = program.outputs
    rows = [o.shape(d)[0] if o.where is None and o.shape(d) else 0 for o in outputs for d in dims]
    if not alike or len(outputs) != 1 or set(rows) != {1} or varying not in program.external:
        return None
    with program.device.lock:
        program.bind(runs[0][1])
        return Replay(program, runs, varying)
