"""What stands for CuPy where there is no GPU: as much of it as `gpu.py` calls, with streams that record, and kernels of g++.

Names and arguments are those of CuPy 14, and it refuses what CUDA refuses: other work than copies and kernels while a stream
records, copies from memory that is not pinned among them, more shared memory than was allowed (static and dynamic together), and
copies whose kind does not say where from and where to.
"""

from __future__ import annotations

import ctypes
import types
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tensorgraph.backends.cuda.launches import prelude
from tensorgraph.backends.cuda.nvrtc import Compiled


class CUDARuntimeError(RuntimeError):
    """As `cupy.cuda.runtime.CUDARuntimeError`."""


class CUDADriverError(RuntimeError):
    """As `cupy.cuda.driver.CUDADriverError`."""


class OutOfMemoryError(MemoryError):
    """As `cupy.cuda.memory.OutOfMemoryError`."""


def wrong(said: str) -> CUDARuntimeError:
    return CUDARuntimeError(f"cudaErrorInvalidValue: {said}")


class Block:
    """A piece of the device's memory, given back when nobody holds it."""

    def __init__(self, gpu: FakeGpu, size: int) -> None:
        self._bytes = np.zeros(size + 256, np.uint8)
        self.ptr = -(-self._bytes.ctypes.data // 256) * 256
        gpu.holds(self, self.ptr, size, "device")


class Stream:
    """Work is done at once, or recorded."""

    def __init__(self, gpu: FakeGpu, non_blocking: bool) -> None:
        assert non_blocking  # the default stream cannot be captured
        self.gpu, self.ptr = gpu, 1 + len(gpu.streams)
        self.recording: list[Callable[[], None]] | None = None
        gpu.streams[self.ptr] = self

    def __enter__(self) -> Stream:
        self.gpu.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.gpu.current.pop() is self

    def do(self, work: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(work)
        else:
            self.gpu.counts["done"] += 1
            work()

    def synchronize(self) -> None:
        if self.recording is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported")
        self.gpu.counts["waits"] += 1

    def begin_capture(self) -> None:
        assert self.recording is None
        self.recording = []

    def end_capture(self) -> Graph:
        assert self.recording is not None
        graph, self.recording = Graph(self.gpu, self.recording), None
        return graph


class Graph:
    def __init__(self, gpu: FakeGpu, work: list[Callable[[], None]]) -> None:
        self.gpu, self._work = gpu, work

    def launch(self, stream: Stream) -> None:
        assert stream.recording is None
        self.gpu.counts["graphs"] += 1
        for work in self._work:
            work()


class Function:
    """A kernel, with as much static shared memory as `FakeGpu` says of all."""

    def __init__(self, gpu: FakeGpu, address: int) -> None:
        self.gpu, self._address = gpu, address
        self.shared_size_bytes = gpu.static_bytes
        self.max_dynamic_shared_size_bytes = (48 << 10) - gpu.static_bytes

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[int, ...], *, shared_mem: int = 0) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes or not all(type(arg) is int for arg in args):
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory, or {args}")
        sizes = [tuple([*given, 1, 1][:3]) for given in (grid, block)]
        packed, host = np.array(args, np.int64), self.gpu.compiler
        self.gpu.current[-1].do(lambda: host.launch(self._address, packed, sizes[0], sizes[1], shared_mem))  # type: ignore[arg-type]


class FakeGpu:
    """One GPU with so much memory; `module` is what `import cupy` is to give.

    Attributes:
        static_bytes: static shared memory of every kernel.
        taken: bytes held, by kind of memory.
        counts: pieces of work done, graphs launched, waits.
    """

    static_bytes = 4096

    def __init__(self, compiler: HostCompiler, memory_bytes: int = 1 << 40, capability: tuple[int, int] = (9, 0)) -> None:
        self.compiler, self.memory_bytes, self.capability = compiler, memory_bytes, capability
        self.blocks: dict[int, tuple[int, str]] = {}
        self.taken, self.counts = {"device": 0, "pinned": 0}, {"done": 0, "graphs": 0, "waits": 0}
        self.streams: dict[int, Stream] = {}
        self.current: list[Stream] = []
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: 1,
            getDeviceProperties=self._properties,
            memGetInfo=lambda: (memory_bytes - self.taken["device"], memory_bytes),
            memcpyAsync=self._copy,
            memsetAsync=self._set,
        )
        cuda = types.SimpleNamespace(
            runtime=runtime,
            driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            Device=self._device,
            Stream=lambda non_blocking: Stream(self, non_blocking),
            alloc=self._alloc,
            alloc_pinned_memory=self._alloc_pinned,
        )
        pool = types.SimpleNamespace(free_bytes=lambda: 0)
        self.module = types.SimpleNamespace(cuda=cuda, RawModule=self._module, get_default_memory_pool=lambda: pool)

    @staticmethod
    def compile_source(source: str, arch: str) -> Compiled:
        """What stands for machine code: the source itself."""
        assert source.startswith(prelude()) and arch == "sm_90"
        return Compiled(source.removeprefix(prelude()).encode(), {})

    def _properties(self, index: int) -> dict[str, Any]:
        major, minor = self.capability
        return {"name": b"Fake GPU", "major": major, "minor": minor, "multiProcessorCount": 1}

    @contextmanager
    def _device(self, index: int) -> Iterator[None]:
        assert index == 0
        yield

    def _idle(self) -> None:
        if any(stream.recording is not None for stream in self.streams.values()):
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported")

    def _alloc(self, size: int) -> Block:
        self._idle()
        if self.taken["device"] + size > self.memory_bytes:
            raise OutOfMemoryError(f"{size} bytes")
        return Block(self, size)

    def _alloc_pinned(self, size: int) -> Any:
        self._idle()
        held = (ctypes.c_uint8 * size)()
        self.holds(held, ctypes.addressof(held), size, "pinned")
        return held

    def holds(self, what: object, address: int, size: int, kind: str) -> None:
        """Until it is gone."""
        self.blocks[address] = size, kind
        self.taken[kind] += size
        weakref.finalize(what, self._gives, address)

    def _gives(self, address: int) -> None:
        size, kind = self.blocks.pop(address)
        self.taken[kind] -= size

    def _kind(self, address: int, n_bytes: int) -> str:
        starts = sorted(self.blocks)
        at = bisect_right(starts, address) - 1
        if at < 0 or address >= starts[at] + self.blocks[starts[at]][0]:
            return "pageable"
        size, kind = self.blocks[starts[at]]
        if address + n_bytes > starts[at] + size:
            raise wrong(f"{n_bytes} bytes at {address - starts[at]} of {size}")
        return kind

    def _copy(self, to: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        kinds, recording = (self._kind(source, n_bytes), self._kind(to, n_bytes)), self.streams[stream].recording is not None
        if [each == "device" for each in kinds] != {1: [False, True], 2: [True, False], 3: [True, True]}[kind]:
            raise wrong(f"a copy of kind {kind} from {kinds[0]} to {kinds[1]} memory")
        if recording and "pageable" in kinds:
            raise wrong("a recorded copy of memory that is not pinned")
        self.streams[stream].do(lambda: ctypes.memmove(to, source, n_bytes) and None)

    def _set(self, to: int, value: int, n_bytes: int, stream: int) -> None:
        if self._kind(to, n_bytes) != "device":
            raise wrong("memory that is not the device's")
        self.streams[stream].do(lambda: ctypes.memset(to, value, n_bytes) and None)

    def _module(self, path: str) -> Any:
        self._idle()
        source = Path(path).read_text()

        def get_function(name: str) -> Function:
            return Function(self, self.compiler.load({name: source}, prelude(host=True))[name])

        return types.SimpleNamespace(get_function=get_function)
