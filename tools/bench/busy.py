"""Other processes that keep cores busy while something is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tensorgraph.errors import TensorGraphError

LOOP = """
import os, sys
parent = int(sys.argv[1])
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""
"""Arithmetic without pause, by which little memory is touched; ends within milliseconds of the process that it is for."""


class NeighbourError(TensorGraphError):
    """A process that was to be busy has ended."""


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Until the block ends, `n` processes keep a core busy each.

    Raises: NeighbourError: at the end, one of them was there no more.
    """
    processes: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-I", "-S", "-c", LOOP, str(os.getpid())]
    quiet = subprocess.DEVNULL
    try:
        for _ in range(n):  # a session each: Ctrl-C is for us, and we end them
            processes.append(subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True))
        yield
        if ended := [p.returncode for p in processes if p.poll() is not None]:
            raise NeighbourError(f"[busy] wanted {n} busy processes to the end; {len(ended)} ended before, with {ended}")
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
