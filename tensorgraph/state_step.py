"""One step of a state store: what a ragged batch of new tokens writes and sees, until it is committed or rolled back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tensorgraph import registry
from tensorgraph.errors import ShapeError, StateError
from tensorgraph.state import StateSpec, StreamClass
from tensorgraph.state_pages import ClassStep, Rows, Table, ragged

if TYPE_CHECKING:
    from tensorgraph.state_store import StateStore


@dataclass(frozen=True, eq=False)
class SequenceState:
    """Everything a sequence holds at one length; a table for each class."""

    length: int
    tables: tuple[Table, ...]


class Step:
    """Everything an executable needs for one ragged batch; made by `StateStore.begin`.

    Streams are appended to first and read afterwards. Ends with `commit` or `rollback`; as a context manager it rolls
    back unless it was committed. Kernels that go to `StateStore.pages` directly use the slots in `classes`.

    Shapes: T new tokens of all sequences, in batch order.
    """

    def __init__(self, store: StateStore, seqs: list[int], before: list[SequenceState], counts: list[int]) -> None:
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
        dtype = spec.stored_dtype(self.store.kv_dtype)
        self.store._write(stream, step.new.slots, registry.encoders.get(dtype.name)(given) if dtype.is_block else given)

    def read(self, stream: str) -> NDArray[Any]:
        """The visible rows, in the stream's dtype (block types: decoded) and the order of the class's `seen`.

        Shapes: [S, *row_shape].
        Raises: StateError, UnknownNameError.
        """
        spec, step = self._find(stream, "read")
        rows, dtype = self.store._read(stream, step.seen.slots), spec.stored_dtype(self.store.kv_dtype)
        return registry.decoders.get(dtype.name)(rows) if dtype.is_block else rows

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
            state = SequenceState(self._stop[i], tuple(tables[i] for tables in kept))
            for pool, old, new in zip(store._pools.values(), self._before[i].tables, state.tables, strict=True):
                if new is not old:
                    pool.hold(new.pages)
                    pool.release(old.pages)
            store._sequences[seq].state = state
        self._release_fresh()
        self._fresh = [[] for _ in store._pools]

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


class Lease:
    """The next tokens of one sequence, one a step, with pages for all of them: they take new lengths, nothing else of the store.

    Good up to `stop` tokens, or until anything else is done with the store, which gives back the pages that were not needed;
    `stop` is the length then. `length` is raised by whoever has computed a token's rows.
    """

    __slots__ = ("store", "seq", "length", "stop", "_tables")

    def __init__(self, store: StateStore, seq: int, state: SequenceState, n_pages: int) -> None:
        self.store, self.seq, self.length = store, seq, state.length
        self.stop = -(-state.length // store.page_rows) * store.page_rows + n_pages * store.page_rows
        pairs = zip(store._pools.values(), state.tables, strict=True)
        self._tables = tuple(Table(t.first, np.concatenate([t.pages, pool.allocate(n_pages)])) for pool, t in pairs)

    def steps(self, most: int) -> list[Step]:
        """Steps for the tokens to come, so many at most; to be read, not committed."""
        lengths = range(self.length, min(self.stop, self.length + most))
        return [Step(self.store, [self.seq], [SequenceState(n, self._tables)], [1]) for n in lengths]

    def settle(self) -> SequenceState:
        """The sequence as it is now, with the pages that it needs."""
        tables = []
        for pool, table in zip(self.store._pools.values(), self._tables, strict=True):
            kept = pool.cut(table, self.length)
            pool.release(table.pages[len(kept.pages) :])
            tables.append(kept)
        return SequenceState(self.length, tuple(tables))
