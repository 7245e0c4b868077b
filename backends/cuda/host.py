"""The runtime that stands for a GPU where there is none: kernels built as C++ and run thread by thread on the processor."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tensorgraph.backends.cuda.launches import prelude
from tensorgraph.backends.cuda.runtime import Bytes, LaunchOf, Memory, Mirror, OutOfMemoryError, Runtime


class HostRuntime(Runtime):
    """Few blocks, so that each goes on to further work; `schedule` is the order in which threads run (`host_runtime.cpp`)."""

    name = "host"
    most_blocks = 3

    def __init__(self, schedule: int = 0, memory_bytes: int | None = None, sanitize: bool = False) -> None:
        self.compiler, self.schedule, self.memory_bytes = HostCompiler(sanitize), schedule, memory_bytes
        self._found: dict[str, int] = {}
        self._taken_bytes = 0

    def free_bytes(self) -> int | None:
        return None if self.memory_bytes is None else self.memory_bytes - self._taken_bytes

    def held_bytes(self) -> int:
        return self._taken_bytes

    def take(self, size_bytes: int) -> Memory:
        free = self.free_bytes()
        if free is not None and size_bytes > free:
            raise OutOfMemoryError(f"[cuda-host] wanted {size_bytes} bytes; {free} of {self.memory_bytes} are free")
        held = np.zeros(size_bytes + 256, np.uint8)
        self._taken_bytes += size_bytes
        weakref.finalize(held, self._give, size_bytes)
        address = -(-held.ctypes.data // 256) * 256
        return Memory(address, size_bytes, held)

    def _give(self, size_bytes: int) -> None:
        self._taken_bytes -= size_bytes

    def write(self, address: int, content: NDArray[Any]) -> None:
        _at(address, content.nbytes)[:] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        _at(to, n_bytes)[:] = _at(source, n_bytes)

    def clear(self, address: int, n_bytes: int) -> None:
        _at(address, n_bytes)[:] = 0

    def read(self, places: Sequence[tuple[int, int]]) -> list[Bytes]:
        return [_at(address, n_bytes).copy() for address, n_bytes in places]

    def kernels(self, sources: Mapping[str, str]) -> dict[str, int]:
        missing = {name: source for name, source in sources.items() if name not in self._found}
        if missing:
            self._found |= self.compiler.load(missing, prelude(host=True))
        return {name: self._found[name] for name in sources}

    def mirror(self, size_bytes: int) -> Mirror:
        return Mirror(np.zeros(size_bytes, np.uint8), self.take(size_bytes))

    def recorded(self, mirror: Mirror, launches: Sequence[LaunchOf]) -> Callable[[], None]:
        def run() -> None:
            self.write(mirror.memory.address, mirror.host)
            for each in launches:
                blocks, threads = (each.blocks, 1, 1), (each.threads, 1, 1)
                self.compiler.launch(each.kernel, each.args, blocks, threads, each.shared_bytes, self.schedule)

        return run


class HostDevice(CudaDevice):
    """The kernels of `cuda`, run by the processor. What is a number of threads elsewhere is a schedule here."""

    def __init__(self, name: str, memory_bytes: int | None = None) -> None:
        super().__init__(name, self._started)
        self.threads, self.memory_bytes = 0, memory_bytes

    def _started(self) -> HostRuntime:
        self.host = HostRuntime(self.threads, self.memory_bytes)
        return self.host

    def set_threads(self, threads: int | Literal["auto"]) -> None:
        self.threads = 0 if threads == "auto" else threads
        if "runtime" in vars(self):
            self.host.schedule = self.threads


def _at(address: int, n_bytes: int) -> Bytes:
    if n_bytes == 0:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (n_bytes,))
