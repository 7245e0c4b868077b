"""Constants as the CPU holds them: an array in memory that is aligned, in the layout that its kernels read."""

from __future__ import annotations

import mmap
import threading
import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
LARGE_PAGE = 2 << 20
SLAB_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Held:
    """A constant on the device.

    Attributes:
        data: what owns its memory.
        layout: "dense" (row order; block types decoded to f32) or a layout of `backends.cpu.weights`.
    """

    data: np.ndarray
    layout: str
    shape: tuple[int, ...] = ()
    dtype: np.dtype | None = None

    @cached_property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    def array(self) -> np.ndarray:
        """A dense constant as an array."""
        return np.ndarray(self.shape, self.dtype, self.data)


def forget(array: np.ndarray) -> None:
    """Give back the memory of a mapped file that an array lies in; what is read of it again comes from the file."""
    base = mapped_file(array)
    if base is None or not hasattr(mmap, "MADV_DONTNEED") or not array.flags.c_contiguous:
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        base.madvise(mmap.MADV_DONTNEED, first, last - first)


def mapped_file(array: np.ndarray) -> mmap.mmap | None:
    """The file whose content an array is, None where it is, or may come to be, anything else."""
    base: object = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) and not array.flags.writeable else None  # a writable one may differ from it


class ConstantMemory:
    """Memory for constants, one behind the other as they are asked for: what is read ahead at the end of one is the next.

    It comes in slabs of large pages, where the system has such. A slab lives as long as something that lies in it. Safe to call
    from several threads: models may be bound to one device at the same time.
    """

    def __init__(self) -> None:
        self._slab: weakref.ref[NDArray[np.uint8]] | None = None
        self._used = 0
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> NDArray[np.uint8]:
        """Bytes as `aligned` gives them."""
        needed = -(-(size_bytes + ALIGNMENT) // ALIGNMENT) * ALIGNMENT
        with self._lock:
            slab = self._slab() if self._slab is not None else None
            if slab is None or self._used + needed > len(slab):
                slab = _slab(max(SLAB_BYTES, needed))
                self._slab, self._used = weakref.ref(slab), -slab.ctypes.data % LARGE_PAGE
            start, self._used = self._used, self._used + needed
        return slab[start : start + size_bytes]


def _slab(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes, and room to begin at a large page."""
    size_bytes += LARGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(size_bytes, np.uint8)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system without them
        pass
    return np.frombuffer(memory, np.uint8)


def aligned(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes that begin at a multiple of 64, with 64 more that may be read behind them."""
    whole = np.zeros(size_bytes + 2 * ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + size_bytes]
