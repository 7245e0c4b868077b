"""Pages of rows: who holds which, where a row lies, and which rows one step writes and sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.state import StreamClass

Zeros = Callable[[tuple[int, ...], Any], Any]  # `Device.zeros`


@dataclass(frozen=True, eq=False)
class Table:
    """The pages of one sequence in one class, without gaps: `pages[0]` is the one that row `first` belongs to.

    Tables are values: forks and snapshots share them, and a change makes a new one.
    """

    first: int
    pages: NDArray[np.int64]

    def slots(self, start: int, stop: int, page_rows: int) -> NDArray[np.int64]:
        """Physical rows of the rows start..stop-1."""
        base = self.first // page_rows
        pages = self.pages[start // page_rows - base : -(-stop // page_rows) - base]
        rows = (pages[:, None] * page_rows + np.arange(page_rows)).reshape(-1)
        skip = start % page_rows
        return rows[skip : skip + stop - start]


class PagePool:
    """The physical pages of all streams of one class, with one reference count for each page id."""

    def __init__(self, cls: StreamClass, page_rows: int) -> None:
        self.cls, self.page_rows = cls, page_rows
        self.arrays: dict[str, Any] = {}  # [P, ...], as a page of the stream's layout
        self.zeros: dict[str, Zeros] = {}
        self.refs = np.zeros(0, np.int64)
        self.unused: list[int] = []  # ids that were used before
        self.top = 0  # ids from here on never were, and are still zero
        self.moved = 0  # how often the pages have moved

    @property
    def n_used(self) -> int:
        return self.top - len(self.unused)

    def grow(self, n_pages: int) -> None:
        """Make room for page ids below `n_pages`."""
        n_old = len(self.refs)
        if n_pages > n_old:
            self.moved += 1
            for name, old in self.arrays.items():
                self.arrays[name] = self.zeros[name]((n_pages, *old.shape[1:]), old.dtype)
                self.arrays[name][:n_old] = old[:n_old]
            self.refs = np.concatenate([self.refs, np.zeros(n_pages - n_old, np.int64)])

    def allocate(self, n_pages: int) -> NDArray[np.int64]:
        """Zeroed pages with one reference each."""
        n_kept = max(0, len(self.unused) - n_pages)
        again = self.unused[n_kept:]
        top = self.top + n_pages - len(again)
        if top > len(self.refs):
            self.grow(max(top, 2 * len(self.refs)))
        for array in self.arrays.values() if again else ():
            array[again] = 0
        pages = np.concatenate([np.array(again, np.int64), np.arange(self.top, top)])
        del self.unused[n_kept:]
        self.top = top
        self.refs[pages] = 1
        return pages

    def hold(self, pages: NDArray[np.int64]) -> None:
        self.refs[pages] += 1

    def release(self, pages: NDArray[np.int64]) -> None:
        self.refs[pages] -= 1
        self.unused.extend(pages[self.refs[pages] == 0].tolist())

    def extend(self, table: Table, start: int, stop: int, fresh: list[NDArray[np.int64]]) -> Table:
        """`table` made ready for writing rows start..stop-1; the pages this takes are added to `fresh`."""
        if start == stop:
            return table
        pages = table.pages
        if start % self.page_rows and self.refs[pages[-1]] > 1:  # somebody else sees the page being written to
            copy = self.allocate(1)
            fresh.append(copy)
            for array in self.arrays.values():
                array[copy[0]] = array[pages[-1]]
            pages = np.concatenate([pages[:-1], copy])
        n_more = -(-stop // self.page_rows) - table.first // self.page_rows - len(pages)
        if n_more > 0:
            fresh.append(self.allocate(n_more))
            pages = np.concatenate([pages, fresh[-1]])
        return table if pages is table.pages else Table(table.first, pages)

    def drop_below(self, table: Table, row: int) -> Table:
        """`table` without the pages that lie wholly below `row`."""
        n = row // self.page_rows - table.first // self.page_rows
        return Table(row // self.page_rows * self.page_rows, table.pages[n:]) if n > 0 else table

    def cut(self, table: Table, n_rows: int) -> Table:
        """`table` without the pages that lie wholly at or above `n_rows`."""
        return Table(table.first, table.pages[: -(-n_rows // self.page_rows) - table.first // self.page_rows])


def ragged(starts: Sequence[int], stops: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The ranges starts[i]..stops[i]-1 one after the other, and beside each value its i."""
    ranges = [np.arange(a, b, dtype=np.int32) for a, b in zip(starts, stops, strict=True)]
    if len(ranges) == 1:
        return ranges[0], np.zeros(len(ranges[0]), np.int32)
    owners = np.repeat(np.arange(len(ranges), dtype=np.int32), [len(r) for r in ranges])
    return np.concatenate([np.empty(0, np.int32), *ranges]), owners


class Rows:
    """Rows `start[i]..stop[i]-1` of the sequence at each index i of the batch; the vectors are made when first asked for.

    `rows`, `seqs`: index in the sequence, and of the sequence in the batch, i32 [N]; ascending, sequences in batch order.
    """

    def __init__(self, page_rows: int, tables: Sequence[Table], start: Sequence[int], stop: Sequence[int]) -> None:
        self._page_rows, self._tables, self.start, self.stop = page_rows, tables, start, stop

    def __len__(self) -> int:
        return sum(self.stop) - sum(self.start)

    @cached_property
    def _vectors(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return ragged(self.start, self.stop)

    @property
    def rows(self) -> NDArray[np.int32]:
        return self._vectors[0]

    @property
    def seqs(self) -> NDArray[np.int32]:
        return self._vectors[1]

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """Where each row lies, `page * page_rows + row % page_rows`: [N]."""
        parts = zip(self._tables, self.start, self.stop, strict=True)
        slots = [table.slots(start, stop, self._page_rows) for table, start, stop in parts]
        return slots[0] if len(slots) == 1 else np.concatenate([np.empty(0, np.int64), *slots])


@dataclass(frozen=True)
class ClassStep:
    """The rows of one class in one step: those that it completes, and those that any of its tokens sees after the append.

    Which are seen follows from positions alone, not from what happens to be retained.
    """

    tables: Sequence[Table]
    new: Rows
    seen: Rows
