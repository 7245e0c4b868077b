"""Constants that are made in a device's memory: they have no data on the host, and take no time to come from there."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any, NamedTuple

import numpy as np

from tensorgraph.backends.cuda.device import CudaDevice, Held
from tensorgraph.backends.cuda.pages import DevicePages
from tensorgraph.backends.cuda.runtime import Memory
from tensorgraph.backends.cuda.weights import LAYOUT, Planes, codes_of, pack
from tensorgraph.dtypes import DType
from tensorgraph.ops.formats import random_blocks
from tensorgraph.tools.bench.cuda.kernels import Kernels
from tensorgraph.tools.synth.values import SMALL

PIECE_ROWS = 48
"""Rows whose scales are drawn on the host, and repeated; codes differ in all rows."""
C_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "Brain"}


def without_data(shape: tuple[int, ...], dtype: DType, middle: float = 0.0) -> np.ndarray[Any, Any]:
    """What stands for a constant that is to be drawn around `middle`: one number, seen as an array of any size."""
    if dtype.is_block:
        return np.broadcast_to(np.uint8(0), (*shape[:-1], dtype.size_bytes(shape[-1])))
    return np.broadcast_to(np.asarray(middle, dtype.numpy), shape)


def middle_of(name: str, shape: tuple[int, ...]) -> float:
    """Around what the values of a weight lie: those of norms around 1."""
    return 1.0 if len(shape) == 1 and "norm" in name and name.endswith(".weight") else 0.0


class Piece(NamedTuple):
    """Of some rows, what is not drawn for each of them: bytes of a plane each (none of codes)."""

    n_rows: int
    planes: tuple[Memory | None, ...]


class Drawing:
    """Has a device draw what comes without data."""

    def __init__(self, device: CudaDevice) -> None:
        self.device, self.kernels = device, Kernels(device.runtime)
        self._seeds = itertools.count(1)
        self._pieces: dict[tuple[str, int], Piece] = {}
        device.draw = self.constant

    def constant(self, array: np.ndarray[Any, Any], dtype: DType, layout: str) -> Held:
        """A constant of this shape: a product with a matrix keeps the size of what it is given."""
        if layout == LAYOUT:
            return self._in_planes(array.shape, dtype)
        width = array.shape[-1] // dtype.block_bytes * dtype.block_size if dtype.is_block else array.shape[-1]
        shape = (*array.shape[:-1], width)
        held = np.dtype(np.float32) if dtype.is_block else array.dtype
        memory = self.device.runtime.take(max(math.prod(shape) * held.itemsize, 1))
        middle = 0.0 if dtype.is_block else float(array.flat[0])
        self.floats(memory.address, math.prod(shape), held, middle, SMALL if len(shape) == 1 else width**-0.5)
        return Held(memory, "dense", shape, held)

    def floats(self, address: int, n: int, dtype: np.dtype[Any], middle: float = 0.0, deviation: float = 1.0) -> None:
        """Write numbers of f32, f16 or bf16."""
        about, by = (int(struct.unpack("<i", struct.pack("<f", x))[0]) for x in (middle, deviation))
        numbers = {"address": address, "n": n, "seed": next(self._seeds), "middle": about, "deviation": by}
        self.kernels.run(self.kernels.launch("fill.cu", f"fill_floats<{C_TYPES[dtype.name]}>", None, **numbers))

    def pages(self, pages: DevicePages) -> None:
        """Write all rows of a stream; those that hold no plain numbers stay as they are."""
        if pages.dtype.name in C_TYPES and pages.nbytes:
            self.floats(pages.memory.address, pages.nbytes // pages.dtype.itemsize, pages.dtype)

    def _in_planes(self, stored: tuple[int, ...], dtype: DType) -> Held:
        codes, width = codes_of(dtype), stored[-1] // dtype.block_bytes * dtype.block_size
        assert codes is not None
        planes = Planes(codes, math.prod(stored[:-1]), width)
        memory = self.device.runtime.take(max(planes.size_bytes, 1))
        if planes.size_bytes:
            piece, launch = self._piece(dtype, width), self.kernels.launch
            launches = []
            for n, (row_bytes, part) in enumerate(zip(planes.row_bytes, piece.planes, strict=True)):
                address, size_bytes = memory.address + planes.offsets[n], planes.offsets[n + 1] - planes.offsets[n]
                if part is None:
                    numbers = {"address": address, "n_words": size_bytes // 8, "seed": next(self._seeds)}
                    launches.append(launch("fill.cu", "fill_bits", None, **numbers))
                elif row_bytes:
                    numbers = {"address": address, "n_bytes": planes.rows * row_bytes}
                    numbers |= {"piece": part.address, "piece_bytes": piece.n_rows * row_bytes}
                    launches.append(launch("fill.cu", "fill_repeated", None, **numbers))
            self.kernels.run(*launches)
        return Held(memory, LAYOUT, (*stored[:-1], width), np.dtype(np.uint8))

    def _piece(self, dtype: DType, width: int) -> Piece:
        """Factors, scales and exponents of some rows, whose values have a deviation as `constant` wants it."""
        key = dtype.name, width
        if key not in self._pieces:
            codes = codes_of(dtype)
            assert codes is not None
            drawn = random_blocks(dtype, PIECE_ROWS * width // dtype.block_size, width**-0.5, np.random.default_rng(0))
            planes = Planes(codes, PIECE_ROWS, width)
            held = np.zeros(planes.size_bytes, np.uint8)

            def write(at: int, part: np.ndarray[Any, Any]) -> None:
                held[at : at + part.nbytes] = part

            pack(drawn.reshape(PIECE_ROWS, -1), dtype, write)
            kept = [self._kept(held[at : at + PIECE_ROWS * n]) for at, n in zip(planes.offsets, planes.row_bytes, strict=False)]
            self._pieces[key] = Piece(PIECE_ROWS, (*([None] * (len(kept) - 3)), *kept[-3:]))
        return self._pieces[key]

    def _kept(self, part: np.ndarray[Any, Any]) -> Memory:
        memory = self.device.runtime.take(max(part.nbytes, 1))
        if part.nbytes:
            self.device.runtime.write(memory.address, part)
        return memory
