"""Paging, visibility, fork, trim, snapshots and files of state, once for every architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tensorgraph.dtypes import DType
from tensorgraph.errors import CannotTrim, ShapeError, StateError, UnknownNameError
from tensorgraph.state import Layout, StateSpec, StreamClass
from tensorgraph.state_file import MAX_LENGTH, SavedState, load_state, save_state
from tensorgraph.state_pages import ClassStep, PagePool, Rows, Table, ragged


@dataclass(frozen=True, eq=False)
class _State:
    """Everything a sequence holds at one length; a table for each class."""

    length: int
    tables: tuple[Table, ...]


class Snapshot:
    """A sequence's state at one length, kept until `release`; made by `StateStore.snapshot`."""

    def __init__(self, store: StateStore, state: _State, history: dict[Snapshot, int]) -> None:
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
    state: _State
    # snapshots that begin with the same tokens as this sequence, and how many of those they share with it
    history: dict[Snapshot, int] = field(default_factory=dict)


class Step:
    """Everything an executable needs for one ragged batch; made by `StateStore.begin`.

    Streams are appended to first and read afterwards. Ends with `commit` or `rollback`; as a context manager it rolls
    back unless it was committed. Kernels that go to `StateStore.pages` directly use the slots in `classes`.

    Shapes: T new tokens of all sequences, in batch order.
    """

    def __init__(self, store: StateStore, seqs: list[int], before: list[_State], counts: list[int]) -> None:
        self.is_open = True
        self.store, self._ids, self._before = store, seqs, before
        self._start = [state.length for state in before]
        self._stop = [n + count for n, count in zip(self._start, counts, strict=True)]
        self._fresh: list[list[NDArray[np.int64]]] = [[] for _ in store._pools]
        self.classes: dict[StreamClass, ClassStep] = {}
        try:
            for i, (cls, pool) in enumerate(store._pools.items()):
                start, stop = [n // cls.every for n in self._start], [n // cls.every for n in self._stop]
                tables = [
                    pool.extend(state.tables[i], a, b, self._fresh[i]) for state, a, b in zip(before, start, stop, strict=True)
                ]
                low = [cls.first_read(n) for n in self._start]
                new, seen = (Rows(pool.page_rows, tables, first, stop) for first in (start, low))
                self.classes[cls] = ClassStep(tables, new, seen)
        except BaseException:
            self._release_fresh()
            raise

    @cached_property
    def _tokens(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return ragged(self._start, self._stop)

    @property
    def positions(self) -> NDArray[np.int32]:
        """Position of each new token in its sequence: [T]."""
        return self._tokens[0]

    @property
    def seqs(self) -> NDArray[np.int32]:
        """Index in the batch of each new token's sequence: [T]."""
        return self._tokens[1]

    def append(self, stream: str, rows: ArrayLike) -> None:
        """Write the rows that this step completes, rounded to the stream's dtype.

        Shapes: rows [N, *row_shape], in the order of the class's `new`.
        Raises: ShapeError, StateError, UnknownNameError.
        """
        spec, step = self._find(stream, "append")
        given, wanted = np.asarray(rows), (len(step.new), *spec.row_shape)
        if given.shape != wanted:
            raise ShapeError(f'[append] wanted rows {list(wanted)} for "{stream}"; got {list(given.shape)}')
        self.store._write(stream, step.new.slots, given)

    def read(self, stream: str) -> NDArray[Any]:
        """The visible rows, in the stream's dtype and the order of the class's `seen`.

        Shapes: [S, *row_shape].
        Raises: StateError, UnknownNameError.
        """
        return self.store._read(stream, self._find(stream, "read")[1].seen.slots)

    def _find(self, stream: str, what: str) -> tuple[StateSpec, ClassStep]:
        if not self.is_open:
            raise StateError(f'[{what}] wanted an open step for "{stream}"; got one that was committed or rolled back')
        spec = self.store._spec(stream, what)
        return spec, self.classes[spec.stream_class]

    def commit(self) -> None:
        """Make the new tokens part of their sequences, and let whole pages fall out of `keep`."""
        if not self.is_open:
            raise StateError("[commit] wanted an open step; got one that was committed or rolled back")
        store = self.store
        kept: list[list[Table]] = []
        for cls, pool in store._pools.items():
            lows = [cls.first_read(max(0, n - store.slack)) for n in self._stop]
            tables = self.classes[cls].tables
            kept.append([pool.drop_below(table, low) for table, low in zip(tables, lows, strict=True)])
        self.is_open, store._open = False, None
        for i, seq in enumerate(self._ids):
            state = _State(self._stop[i], tuple(tables[i] for tables in kept))
            for pool, old, new in zip(store._pools.values(), self._before[i].tables, state.tables, strict=True):
                if new is not old:
                    pool.hold(new.pages)
                    pool.release(old.pages)
            store._sequences[seq].state = state
        self._release_fresh()

    def rollback(self) -> None:
        """Leave every sequence as it was before the step, whatever was appended; nothing if the step has ended."""
        if self.is_open:
            self.is_open, self.store._open = False, None
            self._release_fresh()

    def _release_fresh(self) -> None:
        for pool, fresh in zip(self.store._pools.values(), self._fresh, strict=True):
            for pages in fresh:
                pool.release(pages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.rollback()


class StateStore:
    """The state of many sequences: streams of rows in pages that forks and snapshots share, copied on write.

    Not thread safe: one thread at a time, and one open step at a time. A sequence can always be trimmed by `slack`
    tokens from the longest it has been, which speculative decoding relies on.

    Args:
        specs: the streams, by name.
        kv_dtype: dtype of streams that do not say theirs.
        page_rows: rows in one page; a multiple of 16 where a layout is "rows16".
        slack: how many tokens a sequence can be trimmed by, at least, in spite of `keep`.
        layouts: physical layout by stream, "rows" unless given. "rows16" interleaves 16 rows: [R / 16, *row_shape, 16].
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
        initial_pages: int = 16,
    ) -> None:
        if page_rows < 1 or slack < 0 or initial_pages < 0:
            given = f"{page_rows}, {slack}, {initial_pages}"
            raise StateError(f"[state] wanted page_rows >= 1, slack >= 0, initial_pages >= 0; got {given}")
        self.specs, self.kv_dtype, self.page_rows, self.slack = dict(specs), kv_dtype, page_rows, slack
        self.layouts: dict[str, Layout] = dict.fromkeys(self.specs, "rows")
        for name, layout in (layouts or {}).items():
            self._spec(name, "state layouts")
            if layout not in ("rows", "rows16") or (layout == "rows16" and page_rows % 16):
                wanted = 'layout "rows", or "rows16" with page_rows a multiple of 16'
                raise StateError(f'[state] wanted {wanted}; got "{layout}" with page_rows {page_rows} for "{name}"')
            self.layouts[name] = layout
        self._pools: dict[StreamClass, PagePool] = {}
        for name, spec in self.specs.items():
            pool = self._pools.setdefault(spec.stream_class, PagePool(spec.stream_class, page_rows))
            groups = (page_rows // 16, *spec.row_shape, 16)
            shape = groups if self.layouts[name] == "rows16" else (page_rows, *spec.row_shape)
            pool.arrays[name] = np.zeros((0, *shape), spec.stored_dtype(kv_dtype).numpy)
        for pool in self._pools.values():
            pool.grow(initial_pages)
        self._no_tables = tuple(Table(0, np.empty(0, np.int64)) for _ in self._pools)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._open: Step | None = None

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
        return {cls: pool.n_used for cls, pool in self._pools.items()}

    def pages(self, stream: str) -> NDArray[Any]:
        """The pages of a stream themselves, for kernels; valid until the next `begin` or `load`, which may move them.

        Shapes: [P, page_rows, *row_shape], or [P, page_rows / 16, *row_shape, 16] for layout "rows16".
        """
        return self._pools[self._spec(stream, "pages").stream_class].arrays[stream]

    def new(self) -> int:
        """An empty sequence; its id is never used again."""
        return self._add(_Sequence(_State(0, self._no_tables)))

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
        return self._entry(seq, "length").state.length

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
            reached = [(0, _State(0, self._no_tables))]
        if not reached:
            raise CannotTrim(length, min(low for low, n, _ in ranges if low <= n))
        reach, state = max(reached, key=lambda pair: pair[0])
        tables = [p.cut(t, p.cls.n_rows(reach)) for p, t in zip(self._pools.values(), state.tables, strict=True)]
        self._replace(entry, _State(reach, tuple(tables)))
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

    def save(self, seq: int, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
        """Write a sequence to a safetensors file, rows in row order; `extra` comes back from `load`."""
        state = self._entry(seq, "save").state
        tables = dict(zip(self._pools, state.tables, strict=True))
        rows = {}
        for name, spec in self.specs.items():
            table, n_rows = tables[spec.stream_class], spec.stream_class.n_rows(state.length)
            rows[name] = self._read(name, table.slots(table.first, n_rows, self.page_rows))
        first = {cls: table.first for cls, table in tables.items()}
        save_state(path, SavedState(state.length, first, rows, extra or {}), self.specs, self.kv_dtype)

    def load(self, path: str | os.PathLike[str]) -> tuple[int, dict[str, str]]:
        """A new sequence from a file, and the `extra` it was saved with.

        Raises: FormatError if the file is damaged; StateError if it holds other streams than this store's.
        """
        self._no_step("load")
        saved = load_state(path, self.specs, self.kv_dtype)
        tables = {}
        for cls, pool in self._pools.items():
            first, n_rows = saved.first[cls], cls.n_rows(saved.length)
            n_pages = -(-n_rows // self.page_rows) - first // self.page_rows
            tables[cls] = Table(first, pool.allocate(n_pages))
            for name in pool.arrays:
                self._write(name, tables[cls].slots(first, n_rows, self.page_rows), saved.rows[name])
        return self._add(_Sequence(_State(saved.length, tuple(tables.values())))), dict(saved.extra)

    def _spec(self, stream: str, what: str) -> StateSpec:
        if stream not in self.specs:
            raise UnknownNameError(f'[{what}] wanted one of the streams {", ".join(self.specs)}; got "{stream}"')
        return self.specs[stream]

    def _entry(self, seq: int, what: str) -> _Sequence:
        if seq not in self._sequences:
            raise UnknownNameError(f"[{what}] wanted one of the sequences {list(self._sequences)}; got {seq}")
        return self._sequences[seq]

    def _no_step(self, what: str) -> None:
        if self._open is not None:
            raise StateError(f"[{what}] wanted no open step; got one that is neither committed nor rolled back")

    def _idle(self, seq: int, what: str) -> _Sequence:
        self._no_step(what)
        return self._entry(seq, what)

    def _add(self, entry: _Sequence) -> int:
        self._sequences[self._next_id] = entry
        self._next_id += 1
        return self._next_id - 1

    def _hold(self, state: _State) -> None:
        for pool, table in zip(self._pools.values(), state.tables, strict=True):
            pool.hold(table.pages)

    def _release(self, state: _State) -> None:
        for pool, table in zip(self._pools.values(), state.tables, strict=True):
            pool.release(table.pages)

    def _replace(self, entry: _Sequence, state: _State) -> None:
        self._hold(state)  # first, since the two may share pages
        self._release(entry.state)
        entry.state = state

    def _earliest(self, state: _State) -> int:
        return max((cls.earliest(t.first) for cls, t in zip(self._pools, state.tables, strict=True)), default=0)

    def _at(self, stream: str, slots: NDArray[np.int64]) -> tuple[NDArray[Any], Any]:
        """A stream's pages without the page axis, and the index at which rows of `slots` lie in it."""
        pages = self.pages(stream)
        flat = pages.reshape(-1, *pages.shape[2:])
        return flat, slots if self.layouts[stream] == "rows" else (slots // 16, ..., slots % 16)

    def _read(self, stream: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        flat, at = self._at(stream, slots)
        return np.ascontiguousarray(flat[at])

    def _write(self, stream: str, slots: NDArray[np.int64], rows: NDArray[Any]) -> None:
        flat, at = self._at(stream, slots)
        flat[at] = rows
