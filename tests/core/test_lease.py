"""Leases: pages for the next tokens of one sequence, given back by whatever else is done with the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.dtypes import f32
from tensorgraph.state import StateSpec
from tensorgraph.state_step import Lease
from tensorgraph.state_store import StateStore

WIDTH = 3


def store() -> StateStore:
    return StateStore({"k": StateSpec((WIDTH,)), "v": StateSpec((WIDTH,))}, kv_dtype=f32, page_rows=4)


def rows(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.float32)[:, None] * np.ones(WIDTH, np.float32)


def feed(of: StateStore, seq: int, n: int) -> None:
    with of.begin([(seq, n)]) as step:
        start = of.length(seq)
        step.append("k", rows(start, start + n))
        step.append("v", -rows(start, start + n))
        step.commit()


def write(lease: Lease, n: int) -> None:
    """What a device does in n steps: rows go where the lease's steps say, and the length is raised."""
    for step in lease.steps(n):
        step.append("k", rows(lease.length, lease.length + 1))
        step.append("v", -rows(lease.length, lease.length + 1))
        lease.length += 1


def seen(of: StateStore, seq: int) -> list[bytes]:
    with of.begin([(seq, 0)]) as step:
        return [step.read(name).tobytes() for name in ("k", "v")]


ENDING: dict[str, Callable[[StateStore, int, Path], object]] = {
    "begin": lambda s, seq, _: feed(s, seq, 2),
    "begin of another": lambda s, seq, _: feed(s, s.new(), 2),
    "fork": lambda s, seq, _: s.fork(seq),
    "snapshot": lambda s, seq, _: s.snapshot(seq),
    "trim": lambda s, seq, _: s.trim(seq, 6),
    "save": lambda s, seq, folder: s.save(seq, folder / "saved.tg"),
    "another lease": lambda s, seq, _: s.lease(seq),
    "used pages": lambda s, seq, _: s.used_pages,
}


@pytest.mark.parametrize("written", [0, 1, 3, 9])
@pytest.mark.parametrize("name", ENDING)
def test_what_ends_a_lease_finds_the_sequence_as_it_is(name: str, written: int, tmp_path: Path) -> None:
    leased, plain = store(), store()
    a, b = leased.new(), plain.new()
    feed(leased, a, 7)
    feed(plain, b, 7)
    lease = leased.lease(a)
    assert lease is not None and lease.stop >= 7 + 9
    write(lease, written)
    if written:
        feed(plain, b, written)
    assert leased.length(a) == 7 + written
    for of, seq in ((leased, a), (plain, b)):
        ENDING[name](of, seq, tmp_path)
    assert leased.leased is not lease and lease.stop == lease.length == 7 + written
    assert (leased.length(a), leased.used_pages, seen(leased, a)) == (plain.length(b), plain.used_pages, seen(plain, b))


def test_looking_does_not_end_a_lease() -> None:
    of = store()
    a, b = of.new(), of.new()
    feed(of, a, 3)
    feed(of, b, 2)
    lease = of.lease(a)
    assert lease is not None
    write(lease, 2)
    assert (of.length(b), of.length(a)) == (2, 5)
    assert of.leased is lease


def test_pages_that_others_hold_are_not_written_to() -> None:
    of = store()
    a = of.new()
    feed(of, a, 3)
    b = of.fork(a)
    assert of.lease(a) is None  # its last page is shared and not full
    feed(of, a, 1)
    lease = of.lease(a)
    assert lease is not None
    write(lease, 3)
    assert seen(of, b)[0] == rows(0, 3).tobytes() and seen(of, a)[0] == rows(0, 7).tobytes()
