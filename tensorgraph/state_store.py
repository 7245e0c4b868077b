"""Paging, visibility, fork, trim, snapshots and files of state, once for every architecture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dtypes import DType
from tensorgraph.errors import CannotTrim, StateError, UnknownNameError
from tensorgraph.state import MAX_LENGTH, Layout, StateSpec, StreamClass
from tensorgraph.state_pages import PagePool, Table, Zeros
from tensorgraph.state_step import Lease, SequenceState, Step


class Snapshot:
    """A sequence's state at one length, kept until `release`; made by `StateStore.snapshot`."""

    def __init__(self, store: StateStore, state: SequenceState, history: dict[Snapshot, int]) -> None:
        self._store, self._state, self._history = store, state, history
        self.released = False

    @property
    def length(self) -> int:
        """Length in tokens."""
        return self._state.length

    def release(self) -> None:
        """Give its pages back; doing so again does nothing."""
        if not self.released:
            self.released = True
            self._store._release(self._state)


@dataclass
class _Sequence:
    state: SequenceState
    # snapshots that begin with the same tokens as this sequence, and how many of those they share with it
    history: dict[Snapshot, int] = field(default_factory=dict)


class StateStore:
    """The state of many sequences: streams of rows in pages that forks and snapshots share, copied on write.

    Not thread safe: one thread at a time, and one open step at a time. A sequence can always be trimmed by `slack`
    tokens from the longest it has been, which speculative decoding relies on.

    Args:
        specs: the streams, by name.
        kv_dtype: dtype of streams that do not say theirs.
        page_rows: rows in one page; a multiple of 16 where a layout is not "rows".
        slack: how many tokens a sequence can be trimmed by, at least, in spite of `keep`.
        layouts: physical layout by stream, "rows" unless given. "rows16" interleaves 16 rows: [R / 16, *row, 16]; of "panels" 16
            elements (a block, of a block type) of 16 rows lie together: [R / 16, W / 16, 16, 16], W being a row's elements.
        zeros: by stream, what makes its pages, where that is not NumPy.
        initial_pages: pages of each class to allocate at once.
    Raises: StateError, DTypeError, UnknownNameError.
    """

    def __init__(
        self,
        specs: Mapping[str, StateSpec],
        *,
        kv_dtype: DType,
        page_rows: int = 16,
        slack: int = 64,
        layouts: Mapping[str, Layout] | None = None,
        zeros: Mapping[str, Zeros] | None = None,
        initial_pages: int = 16,
    ) -> None:
        if page_rows < 1 or slack < 0 or initial_pages < 0:
            given = f"{page_rows}, {slack}, {initial_pages}"
            raise StateError(f"[state] wanted page_rows >= 1, slack >= 0, initial_pages >= 0; got {given}")
        self.specs, self.kv_dtype, self.page_rows, self.slack = dict(specs), kv_dtype, page_rows, slack
        self.layouts: dict[str, Layout] = dict.fromkeys(self.specs, "rows")
        for name, layout in (layouts or {}).items():
            self._spec(name, "state layouts")
            if layout not in get_args(Layout) or (layout != "rows" and page_rows % 16):
                wanted = 'layout "rows", or "rows16" or "panels" with page_rows a multiple of 16'
                raise StateError(f'[state] wanted {wanted}; got "{layout}" with page_rows {page_rows} for "{name}"')
            self.layouts[name] = layout
        self._pools: dict[StreamClass, PagePool] = {}
        for name, spec in self.specs.items():
            pool = self._pools.setdefault(spec.stream_class, PagePool(spec.stream_class, page_rows))
            (row, dtype), unit = spec.held_row(kv_dtype), max(16, spec.stored_dtype(kv_dtype).block_bytes)
            if self.layouts[name] == "panels" and math.prod(row) % unit:
                raise StateError(f'[state] wanted rows of a multiple of 16 for layout "panels"; got {list(row)} for "{name}"')
            groups = {"rows16": (*row, 16), "panels": (math.prod(row) // unit, 16, unit)}.get(self.layouts[name])
            pool.zeros[name] = (zeros or {}).get(name, np.zeros)
            pool.arrays[name] = pool.zeros[name]((0, page_rows // 16, *groups) if groups else (0, page_rows, *row), dtype)
        for pool in self._pools.values():
            pool.grow(initial_pages)
        self._no_tables = tuple(Table(0, np.empty(0, np.int64)) for _ in self._pools)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._open: Step | None = None
        self.leased: Lease | None = None

    @property
    def classes(self) -> tuple[StreamClass, ...]:
        """The classes of its streams, in the order of their first stream."""
        return tuple(self._pools)

    @property
    def size_bytes(self) -> int:
        """Bytes of all pages, used or not."""
        return sum(array.nbytes for pool in self._pools.values() for array in pool.arrays.values())

    @property
    def moved(self) -> int:
        """How often pages have moved in memory so far."""
        return sum(pool.moved for pool in self._pools.values())

    @property
    def used_pages(self) -> dict[StreamClass, int]:
        """How many pages of each class some sequence, snapshot or open step holds."""
        self._end_lease()
        return {cls: pool.n_used for cls, pool in self._pools.items()}

    def pages(self, stream: str) -> Any:
        """The pages of a stream themselves, for kernels; valid until the next `begin` or `load`, which may move them.

        Shapes: [P, page_rows, *row], or as the layouts say.
        """
        return self._pools[self._spec(stream, "pages").stream_class].arrays[stream]

    def new(self) -> int:
        """An empty sequence; its id is never used again."""
        return self._add(_Sequence(SequenceState(0, self._no_tables)))

    def fork(self, seq: int) -> int:
        """Another sequence with the same tokens, which shares pages until one of the two writes to them."""
        entry = self._idle(seq, "fork")
        self._hold(entry.state)
        return self._add(_Sequence(entry.state, dict(entry.history)))

    def free(self, seq: int) -> None:
        """Forget a sequence; its snapshots live on."""
        self._release(self._idle(seq, "free").state)
        del self._sequences[seq]

    def length(self, seq: int) -> int:
        """Length in tokens."""
        lease = self.leased
        return lease.length if lease is not None and lease.seq == seq else self._find(seq, "length").state.length

    def snapshot(self, seq: int) -> Snapshot:
        """The sequence as it is now, for `restore` and for `trim` to fall back on, until it is released."""
        entry = self._idle(seq, "snapshot")
        entry.history = {snapshot: shared for snapshot, shared in entry.history.items() if not snapshot.released}
        snapshot = Snapshot(self, entry.state, dict(entry.history))
        self._hold(entry.state)
        entry.history[snapshot] = snapshot.length
        return snapshot

    def restore(self, seq: int, snapshot: Snapshot) -> None:
        """Make the sequence what the snapshot is, whichever sequence of this store that was taken of."""
        entry = self._idle(seq, "restore")
        if snapshot.released or snapshot._store is not self:
            raise StateError("[restore] wanted a snapshot of this store that is not released; got one that is not")
        self._replace(entry, snapshot._state)
        entry.history = {**snapshot._history, snapshot: snapshot.length}

    def trim(self, seq: int, length: int) -> int:
        """Forget the tokens from `length` on; returns the length reached.

        That is `length` itself where all rows that the next token looks back at are retained, by the sequence or by a
        snapshot of it; else the length of the nearest snapshot below, and the caller evaluates the gap again. Length 0
        always works, since nothing comes before it.

        Raises: CannotTrim, with the smallest length above 0 that works; StateError if the sequence is shorter.
        """
        entry, length = self._idle(seq, "trim"), int(length)
        now = entry.state
        if not 0 <= length <= now.length:
            raise StateError(f"[trim] wanted a length from 0 to {now.length} for sequence {seq}; got {length}")
        shared = {snapshot: n for snapshot, n in entry.history.items() if n and not snapshot.released}
        # each state below holds the first n tokens of this sequence and can go on from any length from low to n
        states = [(now, now.length), *((snapshot._state, n) for snapshot, n in shared.items())]
        ranges = [(self._earliest(state), n, state) for state, n in states]
        reached = [(min(length, n), state) for low, n, state in ranges if low <= min(length, n)]
        if length == 0:
            reached = [(0, SequenceState(0, self._no_tables))]
        if not reached:
            raise CannotTrim(length, min(low for low, n, _ in ranges if low <= n))
        reach, state = max(reached, key=lambda pair: pair[0])
        tables = [p.cut(t, p.cls.n_rows(reach)) for p, t in zip(self._pools.values(), state.tables, strict=True)]
        self._replace(entry, SequenceState(reach, tuple(tables)))
        entry.history = {snapshot: min(n, reach) for snapshot, n in shared.items()}
        return reach

    def begin(self, batch: Sequence[tuple[int, int]]) -> Step:
        """Start a step in which each (sequence, number of new tokens) of `batch` takes part.

        All pages the step needs are allocated here. A sequence may add no token: its rows are visible as they are.

        Raises: StateError, UnknownNameError.
        """
        self._no_step("begin")
        states = [self._entry(seq, "begin").state for seq, _ in batch]
        if len({seq for seq, _ in batch}) < len(batch):
            raise StateError(f"[begin] wanted each sequence at most once; got {[seq for seq, _ in batch]}")
        for (seq, count), state in zip(batch, states, strict=True):
            if not 0 <= count <= MAX_LENGTH - state.length:
                wanted = f"0 to {MAX_LENGTH - state.length} new tokens"
                raise StateError(f"[begin] wanted {wanted} for sequence {seq}; got {count}")
        self._open = Step(self, [seq for seq, _ in batch], states, [int(count) for _, count in batch])
        return self._open

    def lease(self, seq: int, n_pages: int = 8) -> Lease | None:
        """Pages for the next tokens of a sequence, so many new ones; None where its steps take more than lengths."""
        state = self._idle(seq, "lease").state
        plain = all(cls.every == 1 and cls.keep is None for cls in self._pools)
        tables = zip(self._pools.values(), state.tables, strict=True)
        if plain and (state.length % self.page_rows == 0 or all(pool.refs[t.pages[-1]] == 1 for pool, t in tables)):
            self.leased = Lease(self, seq, state, n_pages)
        return self.leased

    def save(self, seq: int, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
        """Write a sequence to a safetensors file, rows in row order; `extra` comes back from `load`."""
        from tensorgraph import state_file  # which imports a library that few processes need

        state = self._entry(seq, "save").state
        tables = dict(zip(self._pools, state.tables, strict=True))
        rows = {}
        for name, spec in self.specs.items():
            table, n_rows = tables[spec.stream_class], spec.stream_class.n_rows(state.length)
            rows[name] = self._read(name, table.slots(table.first, n_rows, self.page_rows))
        first = {cls: table.first for cls, table in tables.items()}
        state_file.save_state(path, state_file.SavedState(state.length, first, rows, extra or {}), self.specs, self.kv_dtype)

    def load(self, path: str | os.PathLike[str]) -> tuple[int, dict[str, str]]:
        """A new sequence from a file, and the `extra` it was saved with.

        Raises: FormatError if the file is damaged; StateError if it holds other streams than this store's.
        """
        from tensorgraph import state_file

        self._no_step("load")
        saved = state_file.load_state(path, self.specs, self.kv_dtype)
        tables = {}
        for cls, pool in self._pools.items():
            first, n_rows = saved.first[cls], cls.n_rows(saved.length)
            n_pages = -(-n_rows // self.page_rows) - first // self.page_rows
            tables[cls] = Table(first, pool.allocate(n_pages))
            for name in pool.arrays:
                self._write(name, tables[cls].slots(first, n_rows, self.page_rows), saved.rows[name])
        return self._add(_Sequence(SequenceState(saved.length, tuple(tables.values())))), dict(saved.extra)

    def _spec(self, stream: str, what: str) -> StateSpec:
        if stream not in self.specs:
            raise UnknownNameError(f'[{what}] wanted one of the streams {", ".join(self.specs)}; got "{stream}"')
        return self.specs[stream]

    def _find(self, seq: int, what: str) -> _Sequence:
        if seq not in self._sequences:
            raise UnknownNameError(f"[{what}] wanted one of the sequences {list(self._sequences)}; got {seq}")
        return self._sequences[seq]

    def _entry(self, seq: int, what: str) -> _Sequence:
        entry = self._find(seq, what)
        self._end_lease()
        return entry

    def _end_lease(self) -> None:
        if self.leased is not None:
            lease, self.leased = self.leased, None
            lease.stop = lease.length
            self._sequences[lease.seq].state = lease.settle()

    def _no_step(self, what: str) -> None:
        self._end_lease()
        if self._open is not None:
            raise StateError(f"[{what}] wanted no open step; got one that is neither committed nor rolled back")

    def _idle(self, seq: int, what: str) -> _Sequence:
        self._no_step(what)
        return self._entry(seq, what)

    def _add(self, entry: _Sequence) -> int:
        self._sequences[self._next_id] = entry
        self._next_id += 1
        return self._next_id - 1

    def _hold(self, state: SequenceState) -> None:
        for pool, table in zip(self._pools.values(), state.tables, strict=True):
            pool.hold(table.pages)

    def _release(self, state: SequenceState) -> None:
        for pool, table in zip(self._pools.values(), state.tables, strict=True):
            pool.release(table.pages)

    def _replace(self, entry: _Sequence, state: SequenceState) -> None:
        self._hold(state)  # first, since the two may share pages
        self._release(entry.state)
        entry.state = state

    def _earliest(self, state: SequenceState) -> int:
        return max((cls.earliest(t.first) for cls, t in zip(self._pools, state.tables, strict=True)), default=0)

    def _at(self, stream: str, slots: NDArray[np.int64]) -> tuple[NDArray[Any], Any]:
        """A stream's pages without the page axis, and the index at which rows of `slots` lie in it."""
        pages, layout = self.pages(stream), self.layouts[stream]
        flat, inner = pages.reshape(-1, *pages.shape[2:]), ... if layout == "rows16" else slice(None)
        return flat, slots if layout == "rows" else (slots // 16, inner, slots % 16)

    def _read(self, stream: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        flat, at = self._at(stream, slots)
        return np.ascontiguousarray(flat[at]).reshape(len(slots), *self.specs[stream].held_row(self.kv_dtype)[0])

    def _write(self, stream: str, slots: NDArray[np.int64], rows: NDArray[Any]) -> None:
        flat, at = self._at(stream, slots)
        flat[at] = rows.reshape(len(rows), *flat.shape[1::2]) if self.layouts[stream] == "panels" else rows
