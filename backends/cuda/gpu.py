"""The runtime of a GPU, by CuPy: machine code from NVRTC, kept on disk; steps recorded into CUDA graphs."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu.code_cache import CodeCache, default_folder
from tensorgraph.backends.cuda import nvrtc
from tensorgraph.backends.cuda.launches import SHARED_BYTES, prelude
from tensorgraph.backends.cuda.runtime import Bytes, LaunchOf, Memory, Mirror, OutOfMemoryError, Reads, Runtime
from tensorgraph.errors import KernelError, UnsupportedError

INSTALL = "pip install 'cupy-cuda13x[ctk]'"
OLDEST = (8, 0)
"""Compute capability: mma of 16-bit floats and asynchronous copies."""
WAVES = 8
"""Blocks of a grid for each multiprocessor, at most."""
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3


def _cupy() -> Any:
    """CuPy.

    Raises: UnsupportedError: it is not installed, or finds no GPU that it can use.
    """
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(f"[cuda] wanted CuPy; it is not installed ({INSTALL}); the backend cpu needs none") from error
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        said = "a driver of NVIDIA's for CUDA 13 (580 or newer)" if "InsufficientDriver" in str(error) else "a GPU"
        raise UnsupportedError(f"[cuda] wanted {said}; got {error}; the backend cpu needs none") from error
    if not found:
        raise UnsupportedError("[cuda] wanted a GPU; found none; the backend cpu needs none")
    return cupy


class CupyRuntime(Runtime):
    """One GPU.

    Args:
        index: which one.
    Raises: UnsupportedError: it is not there, or too old.
    """

    def __init__(self, index: int = 0) -> None:
        self.cupy = cupy = _cupy()
        count = cupy.cuda.runtime.getDeviceCount()
        if not 0 <= index < count:
            raise UnsupportedError(f"[cuda] wanted GPU {index}; there are {count}, from 0 on")
        self.index = index
        about = cupy.cuda.runtime.getDeviceProperties(index)
        self.title = about["name"].decode()
        capability = about["major"], about["minor"]
        if capability < OLDEST:
            wanted, got = (".".join(map(str, each)) for each in (OLDEST, capability))
            raise UnsupportedError(f"[cuda] wanted a GPU of compute capability {wanted} or newer; {self.title} has {got}")
        self.arch = f"sm_{capability[0]}{capability[1]}"
        self.name = f"{self.arch} {about['multiProcessorCount']}"
        self.most_blocks = WAVES * int(about["multiProcessorCount"])
        with cupy.cuda.Device(index):
            self.stream = cupy.cuda.Stream(non_blocking=True)
        folder = default_folder("cuda")
        self._disk = CodeCache(folder) if folder is not None else None
        self._kernels: list[Any] = []
        self._allowed: list[int] = []  # dynamic shared memory that each may ask for
        self._lock = threading.RLock()
        self._found: dict[str, int] = {}

    def take(self, size_bytes: int) -> Memory:
        try:
            with self.using():
                held = self.cupy.cuda.alloc(max(size_bytes, 1))
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            free, total = self._memory()
            wanted = f"{size_bytes / 2**20:,.0f} MiB on {self.title}"
            help = "fewer layers there (--gpu-layers), experts on the CPU (--cpu-experts), or a smaller context (-c) take less"
            message = f"[cuda] wanted {wanted}; {free / 2**20:,.0f} of {total / 2**20:,.0f} MiB are free; {help}"
            raise OutOfMemoryError(message) from error
        return Memory(int(held.ptr), size_bytes, held)

    def free_bytes(self) -> int | None:
        return self._memory()[0]

    def held_bytes(self) -> int:
        with self.cupy.cuda.Device(self.index):
            return int(self.cupy.get_default_memory_pool().used_bytes())

    def _memory(self) -> tuple[int, int]:
        """Free, what CuPy keeps for the next who asks among it, and all."""
        with self.cupy.cuda.Device(self.index):
            free, total = self.cupy.cuda.runtime.memGetInfo()
            kept = self.cupy.get_default_memory_pool().free_bytes()
        return int(free) + int(kept), int(total)

    def _pinned(self, size_bytes: int) -> Bytes:
        """Memory of the host's that the device copies from and to by itself."""
        held = self.cupy.cuda.alloc_pinned_memory(max(size_bytes, 1))
        return np.frombuffer(held, np.uint8, max(size_bytes, 1))[:size_bytes]

    @contextmanager
    def using(self) -> Iterator[None]:
        """This GPU and this thread alone: another's copies would be recorded along with the launches of a step.

        Raises: KernelError: the GPU, or its driver, refuses what is done within.
        """
        cuda = self.cupy.cuda
        with self._lock, cuda.Device(self.index):
            try:
                yield
            except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
                wanted = f"{self.title} to go on; got {error}; after some errors this process has to start anew"
                raise KernelError(f"[cuda] wanted {wanted}; the backend cpu needs no GPU") from error

    def write(self, address: int, content: NDArray[Any]) -> None:
        flat = np.ascontiguousarray(content)
        if flat.nbytes:
            with self.using():
                self.cupy.cuda.runtime.memcpyAsync(address, flat.ctypes.data, flat.nbytes, TO_DEVICE, self.stream.ptr)
                self.stream.synchronize()  # the array may be changed once this returns

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        if n_bytes:
            with self.using():
                self.cupy.cuda.runtime.memcpyAsync(to, source, n_bytes, ON_DEVICE, self.stream.ptr)

    def clear(self, address: int, n_bytes: int) -> None:
        if n_bytes:
            with self.using():
                self.cupy.cuda.runtime.memsetAsync(address, 0, n_bytes, self.stream.ptr)

    def read(self, places: Reads) -> list[Bytes]:
        found = self.room_for(places)
        with self.using():
            self.fetch(places, found)
            self.stream.synchronize()
        return found

    def room_for(self, places: Reads) -> list[Bytes]:
        """Where `fetch` puts what lies at some places."""
        return [self._pinned(n_bytes) for _, n_bytes in places]

    def fetch(self, places: Reads, found: Sequence[Bytes]) -> None:
        """Copy to the host, on the stream."""
        for (address, n_bytes), to in zip(places, found, strict=True):
            if n_bytes:
                self.cupy.cuda.runtime.memcpyAsync(to.ctypes.data, address, n_bytes, TO_HOST, self.stream.ptr)

    def mirror(self, size_bytes: int) -> Mirror:
        host = self._pinned(size_bytes)
        host[:] = 0
        return Mirror(host, self.take(size_bytes))

    def recorded(self, mirror: Mirror, launches: Sequence[LaunchOf], places: Reads = ()) -> Callable[[], list[Bytes]]:
        return _Recorded(self, mirror, launches, places)

    def start(self, mirror: Mirror, launches: Sequence[LaunchOf]) -> None:
        """Copy a mirror, and start kernels, on the stream."""
        size_bytes, copy = mirror.memory.size_bytes, self.cupy.cuda.runtime.memcpyAsync
        copy(mirror.memory.address, mirror.host.ctypes.data, size_bytes, TO_DEVICE, self.stream.ptr)
        for each in launches:
            kernel = self._kernels[each.kernel]
            if each.shared_bytes > self._allowed[each.kernel]:
                kernel.max_dynamic_shared_size_bytes = self._allowed[each.kernel] = each.shared_bytes
            kernel((each.blocks,), (each.threads,), tuple(each.args.tolist()), shared_mem=each.shared_bytes)

    def seconds(self, run: Callable[[], Any], times: int) -> float:
        events = self.cupy.cuda
        with events.Device(self.index):
            first, last = events.Event(), events.Event()
            first.record(self.stream)
            for _ in range(times):
                run()
            last.record(self.stream)
            last.synchronize()
        return float(events.get_elapsed_time(first, last)) / 1e3 / times

    def describe(self) -> dict[str, Any]:
        runtime = self.cupy.cuda.runtime
        found = {"name": self.title, "arch": self.arch, "memory_bytes": self._memory()[1], "driver": runtime.driverGetVersion()}
        return found | {"cuda": runtime.runtimeGetVersion(), "nvrtc": nvrtc.version()}

    # Code.

    def kernels(self, sources: Mapping[str, str]) -> dict[str, int]:
        missing = {name: prelude() + source for name, source in sources.items() if name not in self._found}
        if missing:
            keys = {name: self._key(source) for name, source in missing.items()}
            kept = {name: self._disk.get(key) if self._disk is not None else None for name, key in keys.items()}
            new = {name: source for name, source in missing.items() if kept[name] is None}
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = dict(zip(new, pool.map(lambda s: nvrtc.compile_source(s, self.arch).content, new.values()), strict=True))
            for name, content in made.items():
                if self._disk is not None:
                    self._disk.put(keys[name], content)
            for name in missing:
                self._load(name, made.get(name) or kept[name] or b"")
        return {name: self._found[name] for name in sources}

    def _key(self, source: str) -> str:
        said = "|".join((self.arch, *nvrtc.OPTIONS, nvrtc.version(), source))
        return hashlib.sha256(said.encode()).hexdigest()

    def _load(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder, self._lock, self.cupy.cuda.Device(self.index):
            path = Path(folder) / f"{name}.cubin"
            path.write_bytes(content)
            try:
                kernel = self.cupy.RawModule(path=str(path)).get_function(name)
                allowed = SHARED_BYTES - int(kernel.shared_size_bytes)  # more of both kinds together has to be asked for
            except self.cupy.cuda.driver.CUDADriverError as error:
                wanted = f"a driver that loads kernels for {self.arch}, as NVRTC {nvrtc.version()} makes them"
                raise KernelError(f"[cuda] wanted {wanted}; got {error}; the backend cpu needs none") from error
        self._kernels.append(kernel)
        self._allowed.append(allowed)
        self._found[name] = len(self._kernels) - 1


class _Recorded:
    """Launches that are made as they are the first time, and recorded the second: most lengths of a prompt come but once."""

    def __init__(self, runtime: CupyRuntime, mirror: Mirror, launches: Sequence[LaunchOf], places: Reads) -> None:
        self.runtime, self.mirror, self.launches, self.places = runtime, mirror, launches, places
        self._found = runtime.room_for(places)
        self._has_run = False
        self._graph: Any = None

    def __call__(self) -> list[Bytes]:
        runtime = self.runtime
        with runtime.using(), runtime.stream:
            if self._graph is None and self._has_run:
                self._graph = self._record()
            if self._graph is None:
                self._start()
            else:
                self._graph.launch(runtime.stream)
            if self.places:
                runtime.stream.synchronize()
            self._has_run = True
        return self._found

    def _record(self) -> Any:
        stream = self.runtime.stream
        stream.begin_capture()
        try:
            self._start()
        except BaseException:
            with suppress(self.runtime.cupy.cuda.runtime.CUDARuntimeError):
                stream.end_capture()
            raise
        return stream.end_capture()

    def _start(self) -> None:
        self.runtime.start(self.mirror, self.launches)
        self.runtime.fetch(self.places, self._found)
