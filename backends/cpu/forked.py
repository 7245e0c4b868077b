"""Jobs run in forked children, because a job may kill the process that runs it."""

from __future__ import annotations

import faulthandler
import gc
import os
import selectors
import signal
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn

from tensorgraph.errors import KernelError

Job = Callable[[], bytes]
Outcome = bytes | KernelError
_HEADER = struct.Struct("<?Q")  # whether it went well, bytes that follow
_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)


def can_fork() -> bool:
    """Whether a child would be safe: of several threads, it inherits only one, and the locks that the others held."""
    return hasattr(os, "fork") and threading.active_count() == 1


def run_here(job: Job) -> Outcome:
    """What a job gives, in this process."""
    try:
        return job()
    except KernelError as error:
        return error


def run_forked(jobs: Sequence[Job], weights: Sequence[int]) -> list[Outcome]:
    """What each job gives, in children of this process, one for each processor at most; `weights` say how long jobs take.

    A job that kills its child gives a KernelError, and the rest of its share goes to another child. No child outlives the call.
    """
    outcomes: list[Outcome | None] = [None] * len(jobs)
    with selectors.DefaultSelector() as selector:
        children: dict[int, _Child] = {}
        try:
            for share in _shares(weights, min(_processors(), len(jobs))):
                _start(share, jobs, outcomes, children, selector)
            while children:
                for key, _ in selector.select():
                    child: _Child = key.data
                    data = os.read(key.fd, 1 << 16)
                    child.received[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
                        child.open.remove(key.fd)
                        os.close(key.fd)
                    if not child.open:
                        del children[child.pid]
                        rest = _finish(child, outcomes)
                        if rest:
                            _start(rest, jobs, outcomes, children, selector)
        finally:
            with _interrupts_held():
                for child in children.values():
                    _end(child)
    return [outcome for outcome in outcomes if outcome is not None]


@dataclass
class _Child:
    """A child at work: the jobs it has, and the pipes of its results and of its standard error."""

    pid: int
    share: list[int]
    results: int
    errors: int
    open: set[int] = field(init=False)
    received: dict[int, bytearray] = field(init=False)

    def __post_init__(self) -> None:
        self.open = {self.results, self.errors}
        self.received = {self.results: bytearray(), self.errors: bytearray()}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(weights: Sequence[int], count: int) -> list[list[int]]:
    """Indices dealt into `count` shares of about the same weight: the heaviest first, each to the lightest share."""
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        lightest = totals.index(min(totals))
        shares[lightest].append(index)
        totals[lightest] += weights[index]
    return shares


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(
    share: list[int],
    jobs: Sequence[Job],
    outcomes: list[Outcome | None],
    children: dict[int, _Child],
    selector: selectors.BaseSelector,
) -> None:
    """Give a share to a new child; where the system refuses one, do it here."""
    with _interrupts_held():  # until the child is known, and in the child until an interrupt ends it quietly
        fds: list[int] = []
        try:
            fds += os.pipe()
            fds += os.pipe()
            with warnings.catch_warnings():  # from 3.12 on: of threads of NumPy's, which hold no lock that a job takes
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError:
            for fd in fds:
                os.close(fd)
            fds.clear()
        else:
            if pid == 0:
                _work([jobs[index] for index in share], fds[1], fds[3])
            os.close(fds[1])
            os.close(fds[3])
            child = children[pid] = _Child(pid, share, fds[0], fds[2])
            for fd in child.open:
                selector.register(fd, selectors.EVENT_READ, child)
    if not fds:
        for index in share:
            outcomes[index] = run_here(jobs[index])


def _work(jobs: Sequence[Job], results: int, errors: int) -> NoReturn:
    """All that a child does. It leaves without the parent's exit handlers, and without flushing the parent's buffers."""
    try:
        gc.disable()  # collecting would run finalizers of the parent's objects
        faulthandler.disable()
        for number in _OURS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        _no_core_file()
        os.dup2(errors, 2)
        for job in jobs:
            outcome = run_here(job)
            good = isinstance(outcome, bytes)
            payload = outcome if isinstance(outcome, bytes) else str(outcome).encode()
            rest = memoryview(_HEADER.pack(good, len(payload)) + payload)
            while rest:
                rest = rest[os.write(results, rest) :]
        os._exit(0)
    except BaseException as error:
        with suppress(BaseException):
            os.write(errors, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def _no_core_file() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _finish(child: _Child, outcomes: list[Outcome | None]) -> list[int]:
    """Take a child's results; the jobs that it left undone, without the one that it died of."""
    received, at, done = child.received[child.results], 0, 0
    while at + _HEADER.size <= len(received):
        good, length = _HEADER.unpack_from(received, at)
        payload = bytes(received[at + _HEADER.size : at + _HEADER.size + length])
        if len(payload) < length:
            break
        outcomes[child.share[done]] = payload if good else KernelError(payload.decode())
        at += _HEADER.size + length
        done += 1
    ended = _reap(child.pid)
    if done == len(child.share):
        return []
    said = child.received[child.errors].decode(errors="replace").strip()
    said = said[max(said.find("LLVM ERROR"), 0) :][:600]
    outcomes[child.share[done]] = KernelError(": ".join(filter(None, (f"the compiler {ended}", said))))
    return child.share[done + 1 :]


def _reap(pid: int) -> str:
    """Wait for a child that ends; how it ended."""
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # a program that ignores SIGCHLD never hears
        return "stopped"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with status {code}"


def _end(child: _Child) -> None:
    """Kill a child and forget it."""
    for fd in child.open:
        os.close(fd)
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    _reap(child.pid)
