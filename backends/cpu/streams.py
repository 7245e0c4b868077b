"""How kernels find the rows of a stream: a table of each class's sequences, and the pages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensorgraph.dtypes import DType
from tensorgraph.state import StreamClass
from tensorgraph.state_pages import ClassStep

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.ir import Value
    from tensorgraph.backends.cpu.kernel import Kernel

PAGE_ROWS = 16
PANEL = 16
"""Elements of a row that lie side by side in layout "panels", where its type has no blocks."""
FIELDS = ("pages", "first", "seen_start", "seen_stop", "new_start", "new_stop", "seen_at", "new_at")
"""Of each sequence of the batch, i64 each: the address of its page numbers (i64), the row its first page begins with; the rows
(numbers within the sequence) that are seen, and those that this step writes, from start to stop - 1; and where the first of
either stands in the concatenation over sequences. Row r lies on page `pages[(r - first) / 16]`, in place `r % 16`."""


@dataclass(frozen=True)
class Coded:
    """A block type that streams may have: a block is an f16 scale and a signed byte for each of its elements.

    Attributes:
        encode: `(k, values)` -> the scale's bits (i16) and the codes (i8 [block]) of f32 [block].
    """

    encode: Callable[[Kernel, Value], tuple[Value, Value]]


CODED: dict[str, Coded] = {}
"""By dtype; filled by `tensorgraph.ops.formats.streams_cpu`."""


def coded(dtype: DType) -> Coded:
    """How blocks of a type are written to streams."""
    if not CODED:
        importlib.import_module("tensorgraph.ops.formats.streams_cpu")
    return CODED[dtype.name]


class ClassTable:
    """The table of one class, as kernels read it: i64 [8 + 8 * sequences], the number of sequences, from 8 on their fields."""

    def __init__(self, stream_class: StreamClass) -> None:
        self.stream_class = stream_class
        self.numbers = np.zeros(8 + 8 * 4, np.int64)
        self.address: int = self.numbers.ctypes.data
        self._kept: list[np.ndarray] = []

    def fill(self, step: ClassStep) -> bool:
        """Write a step's rows; True if the table had to grow, and moved."""
        n = len(step.tables)
        moved = 8 + 8 * n > len(self.numbers)
        if moved:
            self.numbers = np.zeros(8 + 16 * n, np.int64)
            self.address = self.numbers.ctypes.data
        listed = [n, 0, 0, 0, 0, 0, 0, 0]
        seen_at = new_at = 0
        self._kept = [table.pages for table in step.tables]  # the addresses below stay good for the run
        for i, table in enumerate(step.tables):
            a, b, c, d = step.seen.start[i], step.seen.stop[i], step.new.start[i], step.new.stop[i]
            listed += (table.pages.__array_interface__["data"][0], table.first, a, b, c, d, seen_at, new_at)
            seen_at, new_at = seen_at + b - a, new_at + d - c
        self.numbers[: len(listed)] = listed
        return moved
