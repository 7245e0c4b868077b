"""Pages of streams in a device's memory, with as much of an array's indexing as a state store makes use of."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cuda.runtime import Memory, Runtime


class DevicePages:
    """An array on a device whose first axis can be indexed: by a number, a slice from the beginning, or several numbers.

    What is read comes as a NumPy array, what is written may be one, 0, or another of these (whose rows are copied there).
    """

    def __init__(self, runtime: Runtime, memory: Memory, shape: tuple[int, ...], dtype: Any) -> None:
        self.runtime, self.memory, self.shape, self.dtype = runtime, memory, shape, np.dtype(dtype)

    @staticmethod
    def zeros(runtime: Runtime, shape: tuple[int, ...], dtype: Any) -> DevicePages:
        """Filled with zeros."""
        made = DevicePages(runtime, runtime.take(prod(shape) * np.dtype(dtype).itemsize), shape, dtype)
        runtime.clear(made.memory.address, made.nbytes)
        return made

    @property
    def nbytes(self) -> int:
        return int(prod(self.shape) * self.dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        return int(prod(self.shape[1:]) * self.dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole = self.runtime.read([(self.memory.address, self.nbytes)])[0]
        found: NDArray[Any] = whole.view(self.dtype).reshape(self.shape).astype(dtype or self.dtype, copy=False)
        return found

    def reshape(self, first: int, *inner: int) -> DevicePages:
        """The same elements, with the first two axes made one (`first` is -1)."""
        return DevicePages(self.runtime, self.memory, (self.shape[0] * self.shape[1], *inner), self.dtype)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, np.integer)) or (isinstance(key, slice) and key.start is None):
            stop = self.shape[0] if isinstance(key, slice) and key.stop is None else key.stop if isinstance(key, slice) else 1
            shape = (stop, *self.shape[1:]) if isinstance(key, slice) else self.shape[1:]
            at = 0 if isinstance(key, slice) else int(key)
            memory = Memory(self.memory.address + at * self.row_bytes, stop * self.row_bytes, self.memory)
            return DevicePages(self.runtime, memory, shape, self.dtype)
        runs = _runs(np.asarray(key))
        found = self.runtime.read([(self.memory.address + at * self.row_bytes, n * self.row_bytes) for at, n in runs])
        rows = np.concatenate([np.empty(0, np.uint8), *found]).view(self.dtype)
        return rows.reshape(len(key), *self.shape[1:])

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, DevicePages):
            self.runtime.copy(self[key].memory.address, value.memory.address, value.nbytes)
            return
        assert not isinstance(value, int) or value == 0
        rows = None if isinstance(value, int) else np.ascontiguousarray(value, self.dtype)
        done = 0
        for at, n in _runs(np.atleast_1d(np.asarray(key))):
            address = self.memory.address + at * self.row_bytes
            if rows is None:
                self.runtime.clear(address, n * self.row_bytes)
            else:
                self.runtime.write(address, rows[done : done + n])
            done += n


def _runs(numbers: NDArray[Any]) -> Sequence[tuple[int, int]]:
    """Numbers that follow one another, as the first of them and how many."""
    found: list[tuple[int, int]] = []
    for number in numbers.tolist():  # a few, for which arrays take longer
        if found and number == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return found
