"""The runtime that stands for a GPU where there is none: kernels built as C++ and run thread by thread on the processor."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.host_compiler import HostCompiler, sanitizer_environment
from tensorgraph.backends.cuda.launches import prelude
from tensorgraph.backends.cuda.runtime import Bytes, LaunchOf, Memory, Mirror, OutOfMemoryError, Reads, Runtime
from tensorgraph.errors import UnsupportedError


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

    def read(self, places: Reads) -> list[Bytes]:
        return [_at(address, n_bytes).copy() for address, n_bytes in places]

    def kernels(self, sources: Mapping[str, str]) -> dict[str, int]:
        missing = {name: source for name, source in sources.items() if name not in self._found}
        if missing:
            self._found |= self.compiler.load(missing, prelude(host=True))
        return {name: self._found[name] for name in sources}

    def mirror(self, size_bytes: int) -> Mirror:
        return Mirror(np.zeros(size_bytes, np.uint8), self.take(size_bytes))

    def recorded(self, mirror: Mirror, launches: Sequence[LaunchOf], places: Reads = ()) -> Callable[[], list[Bytes]]:
        found = [np.empty(n_bytes, np.uint8) for _, n_bytes in places]

        def run() -> list[Bytes]:
            self.write(mirror.memory.address, mirror.host)
            for each in launches:
                blocks, threads = (each.blocks, 1, 1), (each.threads, 1, 1)
                self.compiler.launch(each.kernel, each.args, blocks, threads, each.shared_bytes, self.schedule)
            for to, (address, n_bytes) in zip(found, places, strict=True):
                to[:] = _at(address, n_bytes)
            return found

        return run


class HostDevice(CudaDevice):
    """The kernels of `cuda`, run by the processor. What is a number of threads elsewhere is a schedule here.

    `cuda-host:sanitized` runs them under sanitizers of addresses and of undefined behaviour, in a process whose environment is
    that of `host_compiler.sanitizer_environment`.
    """

    def __init__(self, name: str, memory_bytes: int | None = None) -> None:
        super().__init__(name, self._started)
        self.threads, self.memory_bytes, self.sanitize = 0, memory_bytes, _sanitized(name)

    def _started(self) -> HostRuntime:
        self.host = HostRuntime(self.threads, self.memory_bytes, self.sanitize)
        return self.host

    def set_threads(self, threads: int | Literal["auto"]) -> None:
        self.threads = 0 if threads == "auto" else threads
        if "runtime" in vars(self):
            self.host.schedule = self.threads


def _sanitized(name: str) -> bool:
    """Whether a device's name asks for sanitizers.

    Raises: UnsupportedError: it asks for something else, or the process does not have them.
    """
    wanted = name.partition(":")[2]
    if wanted not in ("", "sanitized"):
        raise UnsupportedError(f"[cuda-host] wanted cuda-host or cuda-host:sanitized; got {name!r}")
    if wanted and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        given = " ".join(f"{key}='{value}'" for key, value in sanitizer_environment().items())
        raise UnsupportedError(f"[cuda-host] {name} wanted the sanitizers in the process; start it with {given}")
    return bool(wanted)


def _at(address: int, n_bytes: int) -> Bytes:
    if n_bytes == 0:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (n_bytes,))
