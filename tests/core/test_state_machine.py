"""The store against a naive oracle that keeps every row ever appended."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tensorgraph.dtypes import f16
from tensorgraph.errors import (
    CannotTrim,
    UnknownNameError,
)
from tensorgraph.ops.formats import decode
from tensorgraph.state import Layout, StateSpec, StreamClass
from tensorgraph.state_step import Step
from tensorgraph.state_store import Snapshot, StateStore
from tests.core.state_cases import SPECS, assert_same, fill, look_back, numpy_type, q8_0


@dataclasses.dataclass
class Naive:
    """A sequence as the oracle knows it: every row since token 0, and per stream the first row that is retained."""

    length: int
    rows: dict[str, list[np.ndarray]]
    first: dict[str, int]
    history: list[tuple[Taken, int]] = dataclasses.field(default_factory=list)

    def copy(self) -> Naive:
        return Naive(self.length, {k: list(v) for k, v in self.rows.items()}, dict(self.first), list(self.history))

    def can_go_on(self, length: int) -> bool:
        """Whether all rows that the next token looks back at are retained."""
        return all(
            self.first[name] == 0 or (length > 0 and look_back(spec, length).start >= self.first[name])
            for name, spec in SPECS.items()
        )


@dataclasses.dataclass(eq=False)
class Taken:
    snapshot: Snapshot
    content: Naive


class StoreMachine(RuleBasedStateMachine):
    @initialize(page_rows=st.sampled_from([1, 2, 4, 16]), slack=st.sampled_from([0, 3, 20]), wide=st.booleans())
    def start(self, page_rows: int, slack: int, wide: bool) -> None:
        self.page_rows, self.slack = page_rows, slack
        layouts: dict[str, Layout] = {}
        if wide and page_rows == 16:
            layouts = {
                "k": "rows16",
                "near": "rows16",
                "c4near": "rows16",
                "wide": "panels",
                "coded": "panels",
                "c4coded": "rows16",
            }
        self.store = StateStore(SPECS, kv_dtype=f16, page_rows=page_rows, slack=slack, layouts=layouts, initial_pages=1)
        self.naive: dict[int, Naive] = {}
        self.taken: list[Taken] = []
        self.rng = np.random.default_rng(page_rows * 100 + slack)
        self.folder = tempfile.TemporaryDirectory()
        self.new()
        self.run_step([(self.fork_of(0), 40), (0, 9)], "commit")

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.naive)))

    @rule()
    def new(self) -> None:
        self.naive[self.store.new()] = Naive(0, {k: [] for k in SPECS}, dict.fromkeys(SPECS, 0))

    @precondition(lambda self: self.naive)
    @rule(data=st.data(), end=st.sampled_from(["commit", "commit", "rollback", "partial"]))
    def ragged_step(self, data: st.DataObject, end: str) -> None:
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.naive)), unique=True, max_size=3))
        self.run_step([(seq, data.draw(st.integers(0, 20))) for seq in seqs], end)

    @precondition(lambda self: self.naive)
    @rule(data=st.data(), n=st.sampled_from([1, 7, 33, 64, 130]))
    def long_step(self, data: st.DataObject, n: int) -> None:
        self.run_step([(self.pick(data), n)], "commit")

    def run_step(self, batch: list[tuple[int, int]], end: str) -> None:
        seqs = [seq for seq, _ in batch]
        before = [self.naive[seq] for seq in seqs]
        step = self.store.begin(batch)
        tokens = [(s.length + i, b) for b, s in enumerate(before) for i in range(batch[b][1])]
        assert list(zip(step.positions.tolist(), step.seqs.tolist(), strict=True)) == tokens
        if end == "partial":
            rows = self.rng.standard_normal((len(step.classes[StreamClass(1, None)].new), 2, 3), np.float32)
            step.append("k", rows)
            step.rollback()
            return
        stored = fill(step, SPECS, self.rng)
        after = [self.extended(step, stored, before[b], b, n) for b, (_, n) in enumerate(batch)]
        for name, spec in SPECS.items():
            self.check_rows(step, name, spec, before, after)
        if end == "rollback":
            step.rollback()
            return
        step.commit()
        for seq, state in zip(seqs, after, strict=True):
            self.naive[seq] = state
            for name, spec in SPECS.items():
                low = look_back(spec, max(0, state.length - self.slack)).start
                state.first[name] = max(state.first[name], low // self.page_rows * self.page_rows)

    @staticmethod
    def extended(step: Step, stored: dict[str, np.ndarray], before: Naive, at: int, n: int) -> Naive:
        """`before` and the rows of index `at` in the batch."""
        state = before.copy()
        state.length += n
        for name, spec in SPECS.items():
            state.rows[name] += list(stored[name][step.classes[spec.stream_class].new.seqs == at])
        return state

    def check_rows(self, step: Step, name: str, spec: StateSpec, before: list[Naive], after: list[Naive]) -> None:
        rows = step.classes[spec.stream_class]
        new, seen, values = [], [], []
        for b, (old, now) in enumerate(zip(before, after, strict=True)):
            tokens = range(old.length, now.length)
            new += [(t // spec.every, b) for t in tokens if (t + 1) % spec.every == 0]
            low = look_back(spec, old.length).start
            assert low >= old.first[name]
            seen += [(row, b) for row in range(low, now.length // spec.every)]
            values += now.rows[name][low:]
        assert list(zip(rows.new.rows.tolist(), rows.new.seqs.tolist(), strict=True)) == new
        assert list(zip(rows.seen.rows.tolist(), rows.seen.seqs.tolist(), strict=True)) == seen
        assert (len(rows.new), len(rows.seen)) == (len(new), len(seen))
        wanted = np.array(values, numpy_type(spec)).reshape(len(seen), *spec.row_shape)
        assert_same(step.read(name), wanted)
        if self.store.layouts[name] == "rows":
            pages = self.store.pages(name)
            raw = pages.reshape(-1, *pages.shape[2:])[rows.seen.slots]
            assert_same(decode(raw, q8_0) if spec.dtype is q8_0 else raw, wanted)

    @precondition(lambda self: self.naive)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.fork_of(self.pick(data))

    def fork_of(self, seq: int) -> int:
        child = self.store.fork(seq)
        self.naive[child] = self.naive[seq].copy()
        return child

    @precondition(lambda self: len(self.naive) > 2)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.store.free(seq)
        del self.naive[seq]
        with pytest.raises(UnknownNameError):
            self.store.length(seq)

    @precondition(lambda self: self.naive)
    @rule(data=st.data(), n=st.sampled_from([0, 30, 130]))
    def snapshot_and_go_on(self, data: st.DataObject, n: int) -> None:
        seq = self.pick(data)
        taken = Taken(self.store.snapshot(seq), self.naive[seq].copy())
        assert taken.snapshot.length == taken.content.length
        self.naive[seq].history.append((taken, taken.content.length))
        self.taken.append(taken)
        self.run_step([(seq, n)], "commit")

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        taken = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        taken.snapshot.release()
        taken.snapshot.release()

    @precondition(lambda self: self.taken and self.naive)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        seq, taken = self.pick(data), data.draw(st.sampled_from(self.taken))
        self.store.restore(seq, taken.snapshot)
        self.naive[seq] = taken.content.copy()
        self.naive[seq].history.append((taken, taken.content.length))

    @precondition(lambda self: self.naive)
    @rule(data=st.data(), near=st.booleans())
    def trim(self, data: st.DataObject, near: bool) -> None:
        seq = self.pick(data)
        now = self.naive[seq]
        length = now.length - data.draw(st.integers(0, min(30, now.length) if near else now.length))
        history = [(taken, n) for taken, n in now.history if not taken.snapshot.released and n > 0]
        states = [(now, now.length), *((taken.content, n) for taken, n in history)]

        def reached(wanted: int) -> tuple[int, Naive | None]:
            best: tuple[int, Naive | None] = (-1, None)
            for state, n in states:
                if state.can_go_on(min(wanted, n)) and min(wanted, n) > best[0]:
                    best = min(wanted, n), state
            return (0, None) if wanted == 0 else best

        wanted, source = reached(length)
        if wanted < 0:
            with pytest.raises(CannotTrim) as caught:
                self.store.trim(seq, length)
            assert (caught.value.wanted, self.store.length(seq)) == (length, now.length)
            assert caught.value.earliest == next(n for n in range(1, now.length + 1) if reached(n)[0] >= 0)
            return
        assert self.store.trim(seq, length) == wanted
        first = source.first if source else dict.fromkeys(SPECS, 0)
        rows = {name: now.rows[name][: wanted // spec.every] for name, spec in SPECS.items()}
        self.naive[seq] = Naive(wanted, rows, dict(first), [(taken, min(n, wanted)) for taken, n in history])

    @precondition(lambda self: self.naive)
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        path = Path(self.folder.name, "state.safetensors")
        self.store.save(seq, path, {"model": "a\u00e9\n"})
        copy, extra = self.store.load(path)
        assert extra == {"model": "a\u00e9\n"}
        self.naive[copy] = dataclasses.replace(self.naive[seq].copy(), history=[])

    @invariant()
    def lengths_and_references(self) -> None:
        if not hasattr(self, "store"):
            return
        for seq, state in self.naive.items():
            assert self.store.length(seq) == state.length
        states = [entry.state for entry in self.store._sequences.values()]
        states += [taken.snapshot._state for taken in self.taken]
        for i, (cls, pool) in enumerate(self.store._pools.items()):
            held = np.concatenate([np.empty(0, np.int64), *(s.tables[i].pages for s in states)])
            assert np.array_equal(np.bincount(held, minlength=len(pool.refs)), pool.refs)
            assert self.store.used_pages[cls] == len(set(held.tolist()))
            assert len(set(pool.unused)) == len(pool.unused)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for seq in self.naive:
                self.store.free(seq)
            for taken in self.taken:
                taken.snapshot.release()
            assert set(self.store.used_pages.values()) == {0}
            self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
