"""Where threads of a team must wait for one another: accesses to memory of which one writes and another thread may meet it.

Memory is told apart by its *root*, the operand or scratch that an address was made of. Two accesses with one key are of the same
threads: lane i of both touches the same place. Any other two to one root, of which one writes, need a wait between them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum


class Root(Enum):
    """Roots that are no operand's."""

    FAR = "far"  # what an address in memory points to
    ANY = "any"  # may be any of all


State = dict[Hashable, tuple[set[str], set[str]]]  # by root, the keys of reads and writes since the last wait


class Hazards:
    """What a team has done since it last waited, at the place where the next line is written."""

    def __init__(self) -> None:
        self._roots: dict[str, Hashable] = {}
        self._open: State = {}
        self._loops: list[dict[Hashable, set[str]]] = []  # of each loop around: what is done to roots in it

    def root(self, ref: str) -> Hashable:
        return self._roots.get(ref, Root.ANY)

    def give(self, ref: str, root: Hashable) -> None:
        self._roots[ref] = root

    def same(self, ref: str, of: str) -> None:
        """An address within what another one points to."""
        if of in self._roots:
            self._roots[ref] = self._roots[of]

    def read(self, ref: str, key: str) -> bool:
        """Note it; whether the team must wait before it."""
        root = self.root(ref)
        waits = any(writes - {key} for r, (_, writes) in self._met(root))
        self._note(root, 0, key, waits)
        return waits

    def write(self, ref: str, key: str) -> bool:
        """As `read`."""
        root = self.root(ref)
        waits = any((reads | writes) - {key} for r, (reads, writes) in self._met(root))
        self._note(root, 1, key, waits)
        return waits

    def _met(self, root: Hashable) -> list[tuple[Hashable, tuple[set[str], set[str]]]]:
        return [(r, s) for r, s in self._open.items() if Root.ANY in (r, root) or r == root]

    def _note(self, root: Hashable, which: int, key: str, waits: bool) -> None:
        if waits:
            self._open.clear()
        self._open.setdefault(root, (set(), set()))[which].add(key)
        if self._loops:
            self._loops[-1].setdefault(root, set()).add("rw"[which])

    @contextmanager
    def loop(self, sync: Callable[[], None]) -> Iterator[None]:
        """Around a loop, whose last line within is written before this ends; `sync` writes a wait."""
        if any(writes for _, writes in self._open.values()):
            sync()
            self._open.clear()
        before = _copied(self._open)
        self._loops.append({})
        yield
        done = self._loops.pop()
        _join(self._open, before)
        if self._loops:
            for root, what in done.items():
                self._loops[-1].setdefault(root, set()).update(what)

    def ends(self) -> bool:
        """Whether the team must wait at the end of a turn of the innermost loop: the next reads what this one wrote, or writes
        what it read."""
        done = self._loops[-1]
        waits = any(done.get(root) == {"r", "w"} or root is Root.ANY for root, (r, w) in self._open.items() if r or w)
        if waits:
            self._open.clear()
        return waits

    @contextmanager
    def branches(self) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """What is done in one of several branches, or in none where there is but one."""
        before, after = _copied(self._open), _copied(self._open)

        @contextmanager
        def branch() -> Iterator[None]:
            self._open = _copied(before)
            yield
            _join(after, self._open)

        yield branch
        self._open = after


def _copied(state: State) -> State:
    return {root: (set(reads), set(writes)) for root, (reads, writes) in state.items()}


def _join(state: State, other: State) -> None:
    for root, (reads, writes) in other.items():
        mine = state.setdefault(root, (set(), set()))
        mine[0].update(reads)
        mine[1].update(writes)
