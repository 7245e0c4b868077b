"""What the backend asks of a machine: memory, copies, kernels made from source, and launches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorgraph.errors import TensorGraphError

Bytes = NDArray[np.uint8]
Reads = Sequence[tuple[int, int]]
"""Addresses, and how many bytes lie at each."""


@dataclass(frozen=True, eq=False)
class Memory:
    """A piece of a device's memory, given back when nobody holds this any more."""

    address: int
    size_bytes: int
    owner: Any


@dataclass(frozen=True, eq=False)
class Mirror:
    """What is written anew before each run: an array on the host, and memory of the same size that it is copied to."""

    host: Bytes
    memory: Memory


class LaunchOf(NamedTuple):
    """A kernel and how it is started: blocks of a grid, threads of a block, bytes of dynamic shared memory, its parameters."""

    kernel: int
    blocks: int
    threads: int
    shared_bytes: int
    args: NDArray[np.int64]


class Runtime(ABC):
    """A machine.

    Attributes:
        name: what code and plans made for it depend on.
        most_blocks: of a grid whose blocks go on to further work: as many as run at once, a few times over.
    """

    name: str
    most_blocks: int

    @abstractmethod
    def take(self, size_bytes: int) -> Memory:
        """Memory, at a multiple of 256; what is in it is any.

        Raises: OutOfMemoryError.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """How much can be taken; None where there is no limit."""

    @abstractmethod
    def held_bytes(self) -> int:
        """How much is taken at the moment, by this process."""

    @abstractmethod
    def write(self, address: int, content: NDArray[Any]) -> None:
        """Copy an array there, which may be changed afterwards."""

    @abstractmethod
    def copy(self, to: int, source: int, n_bytes: int) -> None:
        """From one address to another; the two have nothing in common."""

    @abstractmethod
    def clear(self, address: int, n_bytes: int) -> None:
        """Write zeros."""

    @abstractmethod
    def read(self, places: Reads) -> list[Bytes]:
        """What lies there, once all that was launched has ended."""

    @abstractmethod
    def kernels(self, sources: Mapping[str, str]) -> dict[str, int]:
        """Kernels by name: what `LaunchOf` takes, made of sources that begin with the prelude.

        Raises: KernelError.
        """

    @abstractmethod
    def mirror(self, size_bytes: int) -> Mirror:
        """Memory that is written before each run.

        Raises: OutOfMemoryError.
        """

    @abstractmethod
    def recorded(self, mirror: Mirror, launches: Sequence[LaunchOf], places: Reads = ()) -> Callable[[], list[Bytes]]:
        """What copies a mirror to its memory, then starts kernels one after another, each when the one before has ended.

        Where there are places, they are read as `read` does, into arrays that are the same each time; without any, nobody waits.
        """

    def seconds(self, run: Callable[[], Any], times: int) -> float:
        """How long one run takes, of so many that are started one after another, once all before has ended."""
        self.read([])
        began = perf_counter()
        for _ in range(times):
            run()
        self.read([])
        return (perf_counter() - began) / times

    def describe(self) -> dict[str, Any]:
        """The machine, as JSON takes it: its `name`, and what else figures depend on."""
        return {"name": self.name}


class OutOfMemoryError(TensorGraphError):
    """A device has no room left."""
