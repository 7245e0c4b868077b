"""Constants as the CPU holds them: an array in memory that is aligned, in the layout that its kernels read."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64


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

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    def array(self) -> np.ndarray:
        """A dense constant as an array."""
        return np.ndarray(self.shape, self.dtype, self.data)


def forget(array: np.ndarray) -> None:
    """Give back the memory of a mapped file that an array lies in; what is read of it again comes from the file."""
    base: object = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not array.flags.c_contiguous:
        return
    if array.flags.writeable:  # then it may hold what the file does not
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        base.madvise(mmap.MADV_DONTNEED, first, last - first)


def aligned(size_bytes: int) -> np.ndarray:
    """Zeroed bytes that begin at a multiple of 64, with 64 more that may be read behind them."""
    whole = np.zeros(size_bytes + 2 * ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + size_bytes]
