"""The CUDA device: kernels of a runtime, one arena in its memory, and programs that launch them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from tensorgraph.backends.cpu.kernel_device import KernelDevice, held_array
from tensorgraph.backends.cuda.launches import Written
from tensorgraph.backends.cuda.pages import DevicePages
from tensorgraph.backends.cuda.program import Program
from tensorgraph.backends.cuda.runtime import Memory, Runtime
from tensorgraph.backends.cuda.spread import TARGET
from tensorgraph.backends.cuda.weights import LAYOUT, codes_of, elements, pack, planes_of, unpack
from tensorgraph.device import Part, Run, Values
from tensorgraph.dims import evaluate
from tensorgraph.dtypes import DType
from tensorgraph.graph import Graph, Node


@dataclass(frozen=True, eq=False)
class Held:
    """A constant on the device."""

    memory: Memory
    layout: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        return self.memory.address


class CudaDevice(KernelDevice):
    """A GPU, or with another runtime what stands for one."""

    family = "cuda"
    target = TARGET
    weight_layouts = (LAYOUT,)

    def __init__(self, name: str, make: Callable[[], Runtime]) -> None:
        super().__init__()
        self.name, self._make = name, make
        self.arena = self.scratch = Memory(0, 0, None)
        self.version = 0  # how often memory has moved
        self.draw: Callable[[np.ndarray, DType, str], Held] | None = None  # makes constants that come without data of their own

    @cached_property
    def runtime(self) -> Runtime:
        """Made when something is first to lie or run there: plans need no GPU.

        Raises: UnsupportedError: there is none.
        """
        return self._make()

    def constant_layout(self, constant: Node, graph: Graph) -> str:
        return super().constant_layout(constant, graph) if codes_of(constant.dtype) is not None else "dense"

    def constant_bytes(self, constant: Node, graph: Graph) -> int:
        """How much memory a constant takes."""
        shape = [evaluate(extent, {}) for extent in constant.shape]
        if self.constant_layout(constant, graph) == LAYOUT:
            return planes_of(shape, constant.dtype).size_bytes
        return prod(shape) * (4 if constant.dtype.is_block else constant.dtype.block_bytes)

    def upload(self, array: np.ndarray, dtype: DType, *, constant: bool = False, layout: str = "dense") -> Any:
        if constant and self.draw is not None and array.ndim and not any(array.strides):
            return self.draw(array, dtype, layout)
        if layout == LAYOUT:
            return self._in_planes(array, dtype)
        value = np.ascontiguousarray(held_array(array, dtype))
        if not constant:
            return value
        memory = self.runtime.take(max(value.nbytes, 1))
        self.runtime.write(memory.address, value)
        return Held(memory, "dense", value.shape, value.dtype)

    def _in_planes(self, array: np.ndarray, dtype: DType) -> Held:
        shape = elements(array, dtype)
        memory = self.runtime.take(max(planes_of(shape, dtype).size_bytes, 1))
        pack(array, dtype, lambda at, content: self.runtime.write(memory.address + at, content))
        return Held(memory, LAYOUT, shape, np.dtype(np.uint8))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DevicePages:
        return DevicePages.zeros(self.runtime, shape, dtype)

    def download(self, value: Any, dtype: DType) -> np.ndarray:
        if isinstance(value, Held) and value.layout == LAYOUT:
            return unpack(self.runtime.read([(value.address, value.memory.size_bytes)])[0], dtype, value.shape)
        if isinstance(value, Held):
            n_bytes = int(np.prod(value.shape)) * value.dtype.itemsize
            value = self.runtime.read([(value.address, n_bytes)])[0].view(value.dtype).reshape(value.shape)
        return np.array(value, np.float32 if dtype.is_block else dtype.numpy, order="C")

    def compile(self, part: Part) -> Callable[[Values, Run], None]:
        return Program(self, part)

    # What programs ask for.

    def kernels(self, written: Sequence[Written]) -> Mapping[str, int]:
        """Kernels by name."""
        return self.runtime.kernels({each.name: each.source for each in written})

    def require(self, arena_bytes: int) -> None:
        """Make room in the arena; what is there moves."""
        if arena_bytes > self.arena.size_bytes:
            self.version += 1
            self.arena = self.runtime.take(arena_bytes)

    def scratch_for(self, size_bytes: int) -> int:
        """The address of memory that kernels share one after another."""
        if size_bytes > self.scratch.size_bytes:
            self.version += 1
            self.scratch = self.runtime.take(size_bytes)
        return self.scratch.address

    def free_bytes(self) -> int | None:
        """How much memory can be taken; None where there is no limit."""
        return self.runtime.free_bytes()

    def fill_arena(self, n_bytes: int, value: int) -> bool:
        """Fill the arena's beginning, for checks of what is written where; False where there is no room yet."""
        room = n_bytes <= self.arena.size_bytes
        if room and n_bytes:
            self.runtime.write(self.arena.address, np.full(n_bytes, value, np.uint8))
        return room

    def arena_bytes(self, n_bytes: int) -> np.ndarray:
        """The arena's beginning."""
        return self.runtime.read([(self.arena.address, n_bytes)])[0]
