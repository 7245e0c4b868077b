"""Runs programs (see `native_loop`) on any number of threads, with the same bits from each number.

Workers are Python threads that stay inside the native loop, without the interpreter's lock, until the executor closes. No run
depends on them: whatever they do not claim the calling thread does itself.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu import native_loop as loop
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.loop_function import WAKE, LoopFunction
from tensorgraph.backends.cpu.thread_choice import ThreadChoice
from tensorgraph.errors import AttributeValueError

MOST_THREADS = 1024
_CLOCK_S = 5e-3  # the clock's rate is taken over no less
_Int = ctypes.c_int64
_RUN = ctypes.CFUNCTYPE(_Int, _Int, _Int, _Int)
_WORK = ctypes.CFUNCTYPE(None, _Int, _Int)
_TICKS = ctypes.CFUNCTYPE(_Int)


def usable_cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ThreadCounters(NamedTuple):
    """What a thread has done: chunks, runs that it was in, times that it slept, seconds in kernels."""

    chunks: int
    runs: int
    parks: int
    busy_s: float


class Follower(Protocol):
    """Who runs programs past the executor."""

    def halt(self) -> None: ...


class Executor:
    """Runs programs of native steps; workers start with the first run that can use them. Safe to call from several threads.

    Args:
        threads: how many take part, the calling one among them; "auto" is one for each usable core, or the caller alone
            for programs of a size that were lately faster so.

    Attributes:
        lock: held while a program runs, and by whoever must not be disturbed by one.
        team: who runs programs, None until the first; it changes with the number of threads.
        status: what kernels left in the last run or profile: a code and three details; None where all went well.
        status_address: of four i64, where a kernel stores these if something is wrong; the code, which is not 0, last.
    """

    def __init__(self, jit: Jit, threads: int | str = "auto") -> None:
        self.jit = jit
        self.status: list[int] | None = None
        self._memory = _lines(1)
        self.status_address = int(self._memory.ctypes.data)
        self._code = _Code(jit, timed=False)
        self._ticks = _TICKS(jit.compile([loop.ticks_text(jit.target)])[0])
        self._origin = self._clocks()
        self.lock = threading.RLock()
        self.team: Team | None = None
        self._timed: Team | None = None  # the one that takes times, apart so that the other never pays for it
        self._finalizers: list[weakref.finalize[..., Executor]] = []
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._choice: ThreadChoice | None = None
        self.set_threads(threads)
        _EXECUTORS.add(self)

    @property
    def max_threads(self) -> int:
        """The most threads that take part in a run."""
        return self._threads

    def set_threads(self, threads: int | str) -> None:
        """Change how many threads take part in later runs.

        Raises: AttributeValueError for anything but "auto" and 1 to 1024.
        """
        count = usable_cores() if threads == "auto" else threads
        if not isinstance(count, int) or not 1 <= count <= MOST_THREADS:
            raise AttributeValueError(f'[executor] wanted 1 to {MOST_THREADS} threads or "auto"; got {threads!r}')
        with self.lock:
            self.close()
            self._threads = count
            about = LoopFunction(self.jit.target, {}).ticks_per_s
            self._choice = ThreadChoice(about) if threads == "auto" and count > 1 else None

    def run(self, table_address: int, n_steps: int) -> list[int] | None:
        """Run a program, an int64 table [n_steps, 8]; what its kernels left, code and three details, or None: all went well."""
        with self.lock:
            team = self.team = self.team or self._start(self._code, self._choice)
            return self.left(team.run(team.address, table_address, n_steps))

    def left(self, code: int) -> list[int] | None:
        """The status, where a program has ended with this code."""
        if code & loop.TOLD and self.team is not None:
            self.team.look()
        code &= ~loop.TOLD
        self.status = [code, *self._memory[1:4].tolist()] if code else None
        return self.status

    def profile(self, table_address: int, n_steps: int) -> NDArray[np.float64]:
        """Run a program; the seconds from begin to end of each step [n_steps], which include waiting for the last chunk."""
        with self.lock:
            team = self._timed = self._timed or self._start(_Code(self.jit, timed=True), None)
            spent = np.zeros(n_steps, np.int64)
            team.put(loop.SPENT, int(spent.ctypes.data))
            self.left(team.run(team.address, table_address, n_steps))
            return spent.astype(np.float64) * self._seconds_per_tick()

    def tell(self, follower: Follower) -> None:
        """From now on it may run programs with `team`, under `lock`, until it is told to halt."""
        with self.lock:
            self._followers.add(follower)

    def halt(self) -> None:
        """Tell all followers to look around before they run anything."""
        with self.lock:
            for follower in list(self._followers):
                follower.halt()

    def counters(self) -> list[dict[str, int]]:
        """Of each thread, the calling one first, since the workers started: chunks it ran, runs it was in, times it slept."""
        with self.lock:
            return self._counted(self.team, {"chunks": loop.CHUNKS, "runs": loop.RUNS, "parks": loop.PARKS})

    def profile_counters(self) -> list[ThreadCounters]:
        """The same of all profiles, which have threads of their own, and the seconds that each was in kernels."""
        with self.lock:
            names = {"chunks": loop.CHUNKS, "runs": loop.RUNS, "parks": loop.PARKS, "busy": loop.BUSY}
            counted = self._counted(self._timed, names)
            per_tick = self._seconds_per_tick()
            return [ThreadCounters(c["chunks"], c["runs"], c["parks"], c["busy"] * per_tick) for c in counted]

    def _counted(self, team: Team | None, names: Mapping[str, int]) -> list[dict[str, int]]:
        lines = [loop.THREADS + loop.LINE_BYTES * thread for thread in range(self._threads)]
        return [{name: team.at(line + at) if team else 0 for name, at in names.items()} for line in lines]

    def close(self) -> None:
        """End the workers and wait until they have; a later run starts them again."""
        with self.lock:
            self.halt()
            finalizers, self._finalizers = self._finalizers, []
            self.team = self._timed = None
            for finalizer in finalizers:
                finalizer()

    def _start(self, code: _Code, choice: ThreadChoice | None) -> Team:
        team = Team(code, self._threads, self.status_address, choice)
        self._finalizers.append(weakref.finalize(self, team.end))  # before there are threads, so that none is forgotten
        team.begin()
        return team

    def alone(self) -> Team:
        """Somebody else who runs programs, on one thread, at the same time; what kernels refuse is not heard of."""
        return Team(self._code, 1, int(_NOBODY.ctypes.data), None)

    def _seconds_per_tick(self) -> float:
        ticks, time_s = self._origin
        time.sleep(max(0.0, time_s + _CLOCK_S - time.perf_counter()))
        ticks_now, now_s = self._clocks()
        return (now_s - time_s) / (ticks_now - ticks)

    def _clocks(self) -> tuple[int, float]:
        """The same moment by the loops' clock and by Python's: of several readings the one that took least."""
        readings = [(self._ticks(), time.perf_counter(), self._ticks()) for _ in range(5)]
        before, time_s, after = min(readings, key=lambda reading: reading[2] - reading[0])
        return (before + after) // 2, time_s

    def _forget_workers(self) -> None:
        """In a forked child, where only the thread that forked goes on."""
        self.lock = threading.RLock()
        self.halt()
        for finalizer in self._finalizers:
            finalizer.detach()
        self._finalizers, self.team, self._timed = [], None, None
        self._memory[:] = 0


class _Code:
    """The loops as functions that Python calls; keeps them loaded."""

    def __init__(self, jit: Jit, *, timed: bool) -> None:
        texts = [text(jit.target, timed) for text in (loop.alone_text, loop.caller_text, loop.worker_text)]
        alone, caller, worker, chooser = jit.compile([*texts, loop.chooser_text(jit.target)])
        self.jit, self.worker = jit, _WORK(worker)
        self.alone, self.caller, self.chooser = _RUN(alone), _RUN(caller), _RUN(chooser)
        self.futex = LoopFunction(jit.target, {}).futex


class Team:
    """The shared block of memory, and the threads that work on it.

    Attributes:
        run: `run(address, table_address, n_steps)` runs a program: the code that its kernels left, 0 where all went well. On
            all threads, or the calling one alone where that was lately faster and `choice` is there.
        address: of the shared block.
    """

    def __init__(self, code: _Code, threads: int, status_address: int, choice: ThreadChoice | None) -> None:
        self.code, self.pid = code, os.getpid()
        self.memory = _lines(loop.THREADS // loop.LINE_BYTES + threads)
        self.address, self.words = int(self.memory.ctypes.data), self.memory.data  # as quick to read as a list
        self.put(loop.STATUS, status_address)
        self.put(loop.TEAM, 1)
        self.choice = choice
        self.run: Callable[[int, int, int], int] = code.alone if threads == 1 else code.chooser if choice else code.caller
        if choice is not None:
            self.put(loop.SIZES, int(choice.lines.ctypes.data))
        arguments = [(code, self.memory, thread) for thread in range(1, threads)]
        self.workers = [threading.Thread(target=_work, args=a, name=f"tensorgraph-{a[-1]}", daemon=True) for a in arguments]

    def begin(self) -> None:
        """Start the workers; where the system refuses one, go on with those there are."""
        try:
            for count, worker in enumerate(self.workers, 2):
                worker.start()
                self.put(loop.TEAM, count)
        except RuntimeError:
            pass

    def end(self) -> None:
        """Tell the workers to leave, and wait until they have."""
        if os.getpid() != self.pid:
            return
        self.put(loop.STOP, 1)
        for worker in self.workers:
            while worker.is_alive():
                self._wake()
                worker.join(0.01)

    def look(self) -> None:
        """Whether programs of the last one's size go on to run as they do."""
        if self.choice is not None:
            self.choice.look(self.at(loop.WEIGHT).bit_length())

    def at(self, offset: int) -> int:
        return self.words[offset // 8]

    def put(self, offset: int, value: int) -> None:
        self.words[offset // 8] = value

    def _wake(self) -> None:
        if self.code.futex is not None:
            self.put(loop.WAKES, (self.at(loop.WAKES) + 1) & 0x7FFFFFFF)
            ctypes.CDLL(None).syscall(_Int(self.code.futex), _Int(self.address + loop.WAKES), _Int(WAKE), _Int(1 << 30))


def _work(code: _Code, memory: NDArray[np.int64], thread: int) -> None:
    """A worker's life; holds on to what the native loop uses."""
    code.worker(int(memory.ctypes.data), thread)


def _lines(count: int) -> NDArray[np.int64]:
    """Zeros on `count` lines of their own."""
    words = loop.LINE_BYTES // 8
    raw: NDArray[Any] = np.zeros((count + 1) * words, np.int64)
    start = -raw.ctypes.data % loop.LINE_BYTES // 8
    return raw[start : start + count * words]


_NOBODY = _lines(1)
_EXECUTORS: weakref.WeakSet[Executor] = weakref.WeakSet()


def _after_fork() -> None:
    for executor in list(_EXECUTORS):
        executor._forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
