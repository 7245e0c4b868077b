"""A runtime with memory and without kernels: what it was asked to make is noted, what it was asked to start does nothing."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cuda.runtime import Bytes, LaunchOf, Memory, Mirror, Reads, Runtime


class BareRuntime(Runtime):
    """Attributes:
    dynamic_bytes: by kernel, the most dynamic shared memory that any such runtime was to start it with.
    """

    dynamic_bytes: ClassVar[dict[str, int]] = {}
    name = "bare"
    most_blocks = 1000

    def __init__(self) -> None:
        self.taken_bytes = 0
        self.sources: dict[str, str] = {}
        self.launches: list[LaunchOf] = []
        self._names: list[str] = []

    def free_bytes(self) -> int | None:
        return None

    def held_bytes(self) -> int:
        return self.taken_bytes

    def take(self, size_bytes: int) -> Memory:
        held = np.zeros(size_bytes + 1, np.uint8)
        self.taken_bytes += size_bytes
        weakref.finalize(held, self._give, size_bytes)
        return Memory(held.ctypes.data, size_bytes, held)

    def _give(self, size_bytes: int) -> None:
        self.taken_bytes -= size_bytes

    def write(self, address: int, content: NDArray[Any]) -> None:
        if content.nbytes:
            ctypes.memmove(address, np.ascontiguousarray(content).ctypes.data, content.nbytes)

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        ctypes.memmove(to, source, n_bytes)

    def clear(self, address: int, n_bytes: int) -> None:
        ctypes.memset(address, 0, n_bytes)

    def read(self, places: Sequence[tuple[int, int]]) -> list[Bytes]:
        return [np.frombuffer(ctypes.string_at(address, n_bytes), np.uint8).copy() for address, n_bytes in places]

    def mirror(self, size_bytes: int) -> Mirror:
        return Mirror(np.zeros(size_bytes, np.uint8), self.take(size_bytes))

    def kernels(self, sources: Mapping[str, str]) -> dict[str, int]:
        self.sources |= sources
        self._names += [name for name in sources if name not in self._names]
        return {name: self._names.index(name) for name in sources}

    def recorded(self, mirror: Mirror, launches: Sequence[LaunchOf], places: Reads = ()) -> Callable[[], list[Bytes]]:
        self.launches = list(launches)
        for each in launches:
            self.starts(self._names[each.kernel], each.shared_bytes)
        return lambda: [np.zeros(n_bytes, np.uint8) for _, n_bytes in places]

    @classmethod
    def starts(cls, name: str, shared_bytes: int) -> None:
        """Note that a kernel is started so."""
        cls.dynamic_bytes[name] = max(shared_bytes, cls.dynamic_bytes.get(name, 0))
