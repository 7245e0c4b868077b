"""Runs of a program prepared in advance: what differs between them is written down before the first.

The runs are steps of one token after another, so that all their numbers but extents grow evenly. What Python does between two of
them runs on caches and page tables that hold nothing of it: 2 us of work take 60, up to a microsecond for each page of memory, of
code too, that it comes to first. So it comes to few, does in advance what it can, and is told what others change instead of
looking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorgraph.backends.cpu.ir import I32, I64, PTR
from tensorgraph.backends.cpu.kernel import MESSAGES, Kernel
from tensorgraph.device import Run
from tensorgraph.dtypes import i32
from tensorgraph.graph import Node

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.program import Program

Prepared = Callable[[int, int], "np.ndarray | None"]
Given = tuple[Mapping[Node, np.ndarray], Run]
"""Inputs, extents and state of one run; of the inputs and the state, those of the first two runs are looked at."""
MOST_ROWS = 4
VIEWS = 32  # made at once: of a row, for so many runs
Row = tuple[np.ndarray, int, "list[np.ndarray]"]
"""An array, its address, and views of it that nobody has yet."""
RUN, X, ROW, INPUT, N_MOVES, N_WRITTEN = range(6)  # told to `advance`: the run, x, addresses of its row and of x, counts
MOVE_BYTES, WRITTEN_BYTES = 4 * 8, 2 * 8
_ROW: Row = (np.empty(0), 0, [])
_FREE = getrefcount(_ROW[0])  # of an array that nobody but its row and views hold


class Replay:
    """Several runs of a program that has one output, of one row.

    Kernels write the row where the caller will have it, in one of a few arrays of which he gets views; what nobody views is
    used again.
    """

    __slots__ = (
        *("_program", "_device", "_executor", "_go", "_team", "_device_lock", "_lock", "_version", "_dims", "_table", "_lines"),
        *("_address", "_n_lines", "_now", "_changing", "_places", "_written", "_before", "_rows", "_width", "_dtype"),
        "__weakref__",
    )

    def __init__(self, program: Program, runs: Sequence[Given], varying: Node) -> None:
        self._program, self._device = program, program.device
        self._executor, self._device_lock = self._device.code.executor, self._device.lock
        self._team = 0
        self._executor.tell(self)
        self.halt()
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
        self._written = program.written(program.outputs[0].node)
        self._before = [program.args[at] for at, _ in self._written]
        self._begin(program.external[varying])
        (_, self._width), self._dtype = program.outputs[0].shape(first[1].dims), program.outputs[0].dtype
        self._rows = [self._new_row() for _ in range(2)]
        self._version = self._device.version
        program.owner = self

    def _begin(self, varying: np.ndarray) -> None:
        """The table of `advance` and what it reads, before the program's own."""
        moves = [(to.ctypes.data, rows.ctypes.data, rows.strides[0], to.nbytes // 4) for to, rows in self._changing]
        args = self._program.args.ctypes.data
        written = [(args + 8 * at, offset) for at, offset in self._written]
        now = np.array([0, 0, 0, varying.ctypes.data, len(moves), len(written)], np.int64)  # in this order
        listed, addresses = np.array([*moves, (0,) * 4], np.int64), np.array([*written, (0, 0)], np.int64)
        places = np.array([0, 0, 0, *(x.ctypes.data for x in (now, listed, addresses)), 1], np.int64)  # and the number of items
        line = [self._program.advance, places.ctypes.data, places.ctypes.data + 8 * 6, 1, 1, 0, 0, 0]
        self._lines = np.concatenate([np.array([line], np.int64), self._table[0]])
        self._address, self._n_lines = self._lines.ctypes.data, len(self._lines)
        self._now, self._places = now.data, (listed, addresses, places)

    def _add(self, to: np.ndarray, first: np.ndarray, second: np.ndarray, n: int) -> None:
        """Numbers that grow by the same from run to run."""
        by = second - first
        to[: len(first)] = first
        if by.any():
            self._changing.append((to[: len(first)], (first + np.arange(n)[:, None] * by).astype(to.dtype)))

    def run(self, i: int, x: int) -> np.ndarray | None:
        """Make the i-th, with x as the only element of one input: the row; None where the program has run otherwise since these
        were prepared."""  # a method that is called by name takes no other way through the interpreter, as `__call__` does
        device_lock, lock = self._device_lock, self._lock
        device_lock.acquire()  # on cold caches, `with` takes twice as long
        lock.acquire()
        try:
            go = self._go
            if go is None and not self._holds():
                return None
            for found in self._rows:
                if getrefcount(found[0]) - len(found[2]) == _FREE:
                    break
            else:
                found = self._another_row()
            views, now = found[2] or _more_views(found), self._now
            now[RUN], now[X], now[ROW] = i, x, found[1]
            if go is None:
                self._run(i)
            elif code := go(self._team, self._address, self._n_lines):
                self._device.refuse(self._executor.left(code), MESSAGES)
            return views.pop()
        finally:
            lock.release()
            device_lock.release()

    def _new_row(self) -> Row:
        row = np.empty(self._width, self._dtype)
        return row, row.ctypes.data, []

    def _another_row(self) -> Row:
        """A row where callers have all others."""
        new = self._new_row()
        if len(self._rows) < MOST_ROWS:
            self._rows.append(new)
        return new

    def halt(self) -> None:
        """Threads, memory or whether times are taken may have changed since the last run: look before the next."""
        self._go: Callable[[int, int, int], int] | None = None  # runs programs, by the address of its team
        self._lock = self._executor.lock

    def _holds(self) -> bool:
        return self._program.owner is self and self._device.version == self._version

    def _run(self, i: int) -> None:
        """The way of other runs, which starts threads where there are none and takes times where that is wanted."""
        device = self._device
        if device.note is None:
            device.run((self._lines, self._address), MESSAGES)
            team = self._executor.team
            if team is not None:
                self._go, self._team = team.run, team.address
        else:
            device.run((self._lines[:1], self._address), MESSAGES)
            device.profile(self._table, MESSAGES, self._program.made_calls(self._dims[i]), self._dims[i])

    def release(self) -> None:
        """Kernels write where they do in other runs."""
        for (at, _), before in zip(self._written, self._before, strict=True):
            self._program.args[at] = before
        self.halt()


def _more_views(row: Row) -> list[np.ndarray]:
    row[2].extend(row[0].view() for _ in range(VIEWS))
    return row[2]


def emit_advance(k: Kernel, operands: Mapping[str, Any]) -> None:
    """Put in place the numbers of the i-th run, x, and the address of its row: see `Replay._begin`."""
    now, moves, written = k.slot(), k.slot(), k.slot()
    i, x, row, n_moves, n_written = (k.load(now + 8 * n, I64) for n in (RUN, X, ROW, N_MOVES, N_WRITTEN))
    with k.loop(0, n_moves) as each:
        each.next()
        line = moves + each.i * MOVE_BYTES  # where to, where from in the first run, how far on from run to run, words of 4 bytes
        to, source = k.load(line, PTR), k.load(line + 8, PTR) + i * k.load(line + 16, I64)
        with k.loop(0, k.load(line + 24, I64)) as words:
            words.next()
            k.store(k.load(source + words.i * 4, I32), to + words.i * 4)
    with k.loop(0, n_written) as each:
        each.next()
        line = written + each.i * WRITTEN_BYTES  # the argument, bytes into the row
        k.store(row + k.load(line + 8, I64), k.load(line, PTR))
    k.store(k.convert(x, I32), k.load(now + 8 * INPUT, PTR))


ADVANCE = (emit_advance, (), (), ())
"""What its kernel is written from."""


def prepare(program: Program, runs: Sequence[Given], varying: Node) -> Prepared | None:
    """`Replay.run` of these runs; None where they differ in more than numbers, or results are more than one row."""
    if not runs:
        return None
    dims = [run.dims for _, run in runs]
    alike = len({program.holds(d) for d in dims}) == 1 and not program.checks
    (first, _), (second, _) = runs[0], runs[min(1, len(runs) - 1)]
    alike = alike and all(value.shape == second[node].shape for node, value in first.items())
    outputs = program.outputs
    rows = [o.shape(d)[0] if o.where is None and len(o.shape(d)) == 2 else 0 for o in outputs for d in dims]
    if not alike or len(outputs) != 1 or set(rows) != {1} or varying not in program.external:
        return None
    whole = all(buffer.itemsize % 4 == 0 for buffer in program.external.values())  # `advance` copies four bytes at a time
    if not whole or not program.written(outputs[0].node) or varying.dtype != i32:
        return None
    with program.device.lock:
        program.disown()
        program.bind(runs[0][1])
        return Replay(program, runs, varying).run
