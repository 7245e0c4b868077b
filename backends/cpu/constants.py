"""Constants as the CPU holds them: an array in memory that is aligned, in the layout that its kernels read."""

from __future__ import annotations

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


def aligned(size_bytes: int) -> np.ndarray:
    """Zeroed bytes that begin at a multiple of 64, with 64 more that may be read behind them."""
    whole = np.zeros(size_bytes + 2 * ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + size_bytes]
