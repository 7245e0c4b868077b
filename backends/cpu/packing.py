"""Native work that nobody waits for yet: steps that put weights into their layout.

A thread walks them while the program that loaded a model goes on, with its tokenizer for instance. Who needs what they write
calls `settle`, which does with all threads what is left. Steps come in batches, so that no more of a file is resident at a time.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu.executor import Executor

BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class Step:
    """A line of a table, all that it reads and writes, and what is to be called when it is done.

    Attributes:
        size_bytes: of what it reads.
    """

    line: tuple[int, ...]
    memory: Sequence[Any]
    done: Callable[[], None]
    size_bytes: int


class Packing:
    """Steps of one executor that write constants and may be repeated; safe to add to from several threads.

    Attributes:
        idle: nothing is to be done.
    """

    def __init__(self, executor: Executor) -> None:
        self.idle = True
        self._executor = executor
        self._lock = threading.Lock()
        self._open: list[Step] = []  # not yet a batch
        self._waiting: deque[Sequence[Step]] = deque()
        self._taken: dict[str, list[Sequence[Step]]] = {"thread": [], "caller": []}  # at work on, by whom
        self._thread: threading.Thread | None = None
        self._running = False  # whether the thread will look for more
        self._error: BaseException | None = None
        _ALL.add(self)

    def add(self, step: Step) -> None:
        """Have a step done before long; it must not be able to fail, and nobody may change what it reads."""
        with self._lock:
            self.idle = False
            self._open.append(step)
            if sum(s.size_bytes for s in self._open) < BATCH_BYTES:
                return
            self._close_batch()
            if not self._running:
                self._begin()

    def settle(self) -> None:
        """Return when everything is done. The executor's lock is held, or nobody else runs anything."""
        while not self.idle:
            self._settle()

    def _settle(self) -> None:
        while True:
            with self._lock:
                self._close_batch()
                if not self._take("caller"):
                    break
            self._run("caller", self._executor.run)
        thread = self._thread
        if thread is not None and thread.ident is not None:
            thread.join()
        with self._lock:
            if not self._running:  # what it has left was ended by an error, or by the end of the program
                self._waiting.extend(self._taken["thread"])
                self._taken["thread"].clear()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            self.idle = not (self._open or self._waiting or self._running)

    def _close_batch(self) -> None:
        if self._open:
            self._waiting.append(self._open)
            self._open = []

    def _begin(self) -> None:
        """Start a thread; where the system refuses one, whoever settles does the work."""
        self._thread = threading.Thread(target=self._work, name="tensorgraph-packing")
        try:
            self._running = True
            self._thread.start()
        except BaseException as error:
            self._running = self._thread.ident is not None
            if not isinstance(error, RuntimeError):
                raise

    def _work(self) -> None:
        """A thread's life: batches one after the other, alone, until there are none or the program ends."""
        try:
            team = self._executor.alone()
            while self._goes_on():
                self._run("thread", lambda table, n: team.run(team.address, table, n))
        except BaseException as error:
            with self._lock:
                self._error, self._running = error, False

    def _goes_on(self) -> bool:
        with self._lock:
            self._running = threading.main_thread().is_alive() and self._take("thread")
            return self._running

    def _take(self, who: str) -> bool:
        """Take the next batch unless there is one in hand, which an interrupt has left there."""
        if not self._taken[who] and self._waiting:
            self._taken[who].append(self._waiting[0])
            self._waiting.popleft()
        return bool(self._taken[who])

    def _run(self, who: str, run: Callable[[int, int], Any]) -> None:
        batch = self._taken[who][0]
        table: NDArray[np.int64] = np.array([step.line for step in batch], np.int64)
        run(int(table.ctypes.data), len(table))
        for step in batch:
            step.done()
        self._taken[who].clear()

    def _forget_thread(self) -> None:
        """In a forked child, where no thread is left to finish what it had begun."""
        self._lock = threading.Lock()
        self._waiting.extend(self._taken["thread"])
        self._taken["thread"].clear()
        self._thread, self._running, self._error = None, False, None


_ALL: weakref.WeakSet[Packing] = weakref.WeakSet()


def _after_fork() -> None:
    for packing in list(_ALL):
        packing._forget_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
