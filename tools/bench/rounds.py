"""Rounds: ours and the peer's by turns, and the machine's roofs in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

from tensorgraph.tools.bench.cases import Case, Kind, median
from tensorgraph.tools.bench.roofs import Roofs

T = TypeVar("T")


class Round(NamedTuple):
    """Seconds of one round, and whether the side's threads slept afterwards."""

    seconds: float
    quiet: bool


class Side(Protocol):
    """One of the two that are measured."""

    def begin(self, ids: Sequence[int]) -> None: ...

    def warm_up(self, kind: Kind, ids: Sequence[int]) -> str: ...

    def run(self, kind: Kind, ids: Sequence[int]) -> Round: ...


@dataclass
class Figures:
    """Every round of a case.

    Attributes:
        ours_s, peer_s: seconds by round; the peer's end early where it was lost.
        roofs: by round, what the machine could do with so many threads.
        peer_setting: what the peer's warm-up decided.
        ours_quiet, peer_quiet: whether that side's threads slept after each of its rounds.
    """

    case: Case
    ours_s: list[float] = field(default_factory=list)
    peer_s: list[float] = field(default_factory=list)
    roofs: list[Mapping[int, Roofs]] = field(default_factory=list)
    peer_setting: str = ""
    ours_quiet: bool = True
    peer_quiet: bool = True

    @property
    def ours_rates(self) -> list[float]:
        """Tokens a second."""
        return [self.case.tokens / s for s in self.ours_s]

    @property
    def peer_rates(self) -> list[float]:
        """Tokens a second."""
        return [self.case.tokens / s for s in self.peer_s]

    @property
    def ratio(self) -> float | None:
        """Our rate over the peer's: the median over rounds; None where the peer did none."""
        return median([p / o for o, p in zip(self.ours_s, self.peer_s, strict=False)]) if self.peer_s else None

    def roof_fraction(self, token_bytes: float, threads: int) -> float:
        """Bytes a second that were read over what the machine read in the same round: the median over rounds."""
        reached = [token_bytes * rate for rate in self.ours_rates]
        return median([r / (roofs[threads].stream_gbs * 1e9) for r, roofs in zip(reached, self.roofs, strict=True)])


def _begin(side: Side, ids: Sequence[int]) -> None:
    side.begin(ids)


class Contest:
    """Two sides that take turns; the peer may be lost on the way.

    Args:
        lost: what the peer raises when it can do no more; it is told to `lose`, and ours goes on alone.
    """

    def __init__(
        self, ours: Side, peer: Side | None, *, lost: type[Exception] = Exception, lose: Callable[[Exception], None] = print
    ) -> None:
        self.ours, self.peer, self._lost, self._lose = ours, peer, lost, lose

    def run_cases(
        self,
        cases: Sequence[Case],
        ids: Sequence[int],
        rounds: int,
        *,
        roofs: Callable[[], Mapping[int, Roofs]],
        say: Callable[[str], None],
    ) -> list[Figures]:
        """Measure cases, those of one depth together: warm up, then in each round the roofs and every case on both sides.

        A case's tokens are `ids[depth : depth + tokens]` on both sides; which side goes first changes with the round. `say` is
        told what comes next.
        """
        found = []
        for depth, group in groupby(cases, key=lambda case: case.depth):
            figures = [Figures(case) for case in group]
            say(f"filling to depth {depth}")
            self.ours.begin(ids[:depth])
            self._ask_peer(partial(_begin, ids=ids[:depth]))
            for f in figures:
                say(f"{f.case}, warm-up")
                self._warm_up(f, ids[depth : f.case.end])
            for i in range(rounds):
                say(f"round {i + 1} of {rounds}, roofs")
                now = roofs()
                for f in figures:
                    say(f"round {i + 1} of {rounds}, {f.case}")
                    f.roofs.append(now)
                    self._round(f, ids[depth : f.case.end], peer_first=i % 2 == 1)
            found += figures
        return found

    def _warm_up(self, figures: Figures, ids: Sequence[int]) -> None:
        self.ours.warm_up(figures.case.kind, ids)
        figures.peer_setting = self._ask_peer(lambda peer: peer.warm_up(figures.case.kind, ids)) or ""

    def _round(self, figures: Figures, ids: Sequence[int], *, peer_first: bool) -> None:
        kind = figures.case.kind
        theirs = self._ask_peer(lambda peer: peer.run(kind, ids)) if peer_first else None
        ours = self.ours.run(kind, ids)
        if not peer_first:
            theirs = self._ask_peer(lambda peer: peer.run(kind, ids))
        figures.ours_s.append(ours.seconds)
        figures.ours_quiet &= ours.quiet
        if theirs is not None:
            figures.peer_s.append(theirs.seconds)
            figures.peer_quiet &= theirs.quiet

    def _ask_peer(self, what: Callable[[Side], T]) -> T | None:
        if self.peer is None:
            return None
        try:
            return what(self.peer)
        except self._lost as error:
            self.peer = None
            self._lose(error)
            return None
