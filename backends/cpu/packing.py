"""Native work that nobody waits for yet: steps that put weights into their layout.

A thread walks them while the program that loaded a model goes on, with its tokenizer for instance. Who needs what they write
calls `settle`, which does with all threads what is left. Steps come in batches, so that no more of a file is resident at a time.
"""

from __future__ import annotations

import os
import threading
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
    """Steps of one executor that write constants and may be repeated; safe to add to from several threads."""

    def __init__(self, executor: Executor) -> None:
        self.idle = True  # nothing is to be done
        self._executor = executor
        self._reset()

    def _reset(self, unfinished: Sequence[Sequence[Step]] = ()) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._open: list[Step] = []
        self._waiting: deque[Sequence[Step]] = deque(unfinished)
        self._taken: dict[str, list[Sequence[Step]]] = {"thread": [], "caller": []}  # at work on, by whom
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, step: Step) -> None:
        """Have a step done before long; it must not be able to fail."""
        self._notice_fork()
        with self._lock:
            self.idle = False
            self._open.append(step)
            if sum(s.size_bytes for s in self._open) < BATCH_BYTES:
                return
            self._waiting.append(self._open)
            self._open = []
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tensorgraph-packing")
                self._thread.start()

    def settle(self) -> None:
        """Return when everything is done. The executor's lock is held, or nobody else runs anything."""
        self._notice_fork()
        while True:
            with self._lock:
                if self._open:
                    self._waiting.append(self._open)
                    self._open = []
                if not self._take("caller"):
                    break
            self._run("caller", self._executor.run)
        thread = self._thread
        if thread is not None:
            thread.join()
        with self._lock:
            self._thread, error, self._error = None, self._error, None
            self._waiting.extend(self._taken["thread"])  # of a thread that an error, or the end of the program, has ended
            self._taken["thread"].clear()
            self.idle = not (self._open or self._waiting)
        if error is not None:
            raise error

    def _work(self) -> None:
        """A thread's life: batches one after the other, alone, until there are none or the program ends."""
        team = self._executor.alone()
        try:
            while threading.main_thread().is_alive():
                with self._lock:
                    if not self._take("thread"):
                        return
                self._run("thread", lambda table, n: team.run(team.address, table, n))
        except BaseException as error:
            self._error = error

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

    def _notice_fork(self) -> None:
        """In a forked child, where no thread is left to finish what it had begun."""
        if self._pid != os.getpid():
            self._reset([*self._taken["thread"], *self._taken["caller"], *self._waiting, *([self._open] if self._open else [])])
