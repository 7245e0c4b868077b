"""Cases and rounds of `tensorgraph bench`, and what is made of their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tensorgraph.tools.bench.cases import Case, cases, deviation, median
from tensorgraph.tools.bench.roofs import Roofs
from tensorgraph.tools.bench.rounds import Contest, Figures, Round

MEASURED = {1: Roofs(10.0, 100.0, 400.0), 2: Roofs(20.0, 200.0, None)}


def test_cases_are_all_combinations_by_depth() -> None:
    assert [str(c) for c in cases([512, 0], [128], [0, 1024, 0])] == ["pp512", "tg128", "pp512 @ d1024", "tg128 @ d1024"]
    assert cases([0], [0], [5]) == [] and Case("tg", 3, 5).end == 8


def test_medians_and_deviations() -> None:
    assert (median([3.0, 1.0, 10.0]), deviation([3.0, 1.0, 10.0])) == (3.0, 2.0)
    assert (median([1.0, 2.0]), deviation([1.0, 2.0]), deviation([4.0])) == (1.5, 0.5, 0.0)


def test_figures_are_medians_over_rounds() -> None:
    """The ratio and the fraction are of each round, then the median: not ratios of medians."""
    now = [{2: Roofs(gbs, 1.0, None)} for gbs in (1.0, 4.0, 1.0)]
    f = Figures(Case("tg", 8), ours_s=[1.0, 2.0, 4.0], peer_s=[4.0, 2.0, 2.0], roofs=now)
    assert f.ours_rates == [8.0, 4.0, 2.0] and f.peer_rates == [2.0, 4.0, 4.0]
    assert f.ratio == 1.0  # of 4, 1, 0.5
    assert f.roof_fraction(1e8, 2) == pytest.approx(0.2)  # of 0.8, 0.1, 0.2
    assert Figures(Case("tg", 8), ours_s=[1.0]).ratio is None


class Recorder:
    """A side that writes down what it is asked; `fails_at` is the number of the request that it cannot do."""

    def __init__(self, name: str, log: list[Any], seconds: float, fails_at: int = 99) -> None:
        self.name, self.log, self.seconds, self.left = name, log, seconds, fails_at

    def _note(self, *what: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise LookupError(f"{self.name} is gone")
        self.log.append((self.name, *what))

    def begin(self, ids: Sequence[int]) -> None:
        self._note("begin", list(ids))

    def warm_up(self, kind: str, ids: Sequence[int]) -> str:
        self._note("warm_up", kind, list(ids))
        return f"{self.name}'s way"

    def run(self, kind: str, ids: Sequence[int]) -> Round:
        self._note("run", kind, list(ids))
        return Round(self.seconds, self.name == "ours")


def contest(log: list[Any], fails_at: int = 99) -> tuple[list[Figures], list[Exception]]:
    lost: list[Exception] = []

    def measured() -> Mapping[int, Roofs]:
        log.append("roofs")
        return MEASURED

    both = Contest(Recorder("ours", log, 0.5), Recorder("peer", log, 2.0, fails_at), lost=LookupError, lose=lost.append)
    wanted = [Case("pp", 2), Case("tg", 1), Case("pp", 2, 3)]
    return both.run_cases(wanted, range(10, 20), 2, roofs=measured, say=lambda text: None), lost


def test_rounds_alternate() -> None:
    log: list[Any] = []
    figures, lost = contest(log)
    assert log[:6] == [
        ("ours", "begin", []), ("peer", "begin", []),
        ("ours", "warm_up", "pp", [10, 11]), ("peer", "warm_up", "pp", [10, 11]),
        ("ours", "warm_up", "tg", [10]), ("peer", "warm_up", "tg", [10]),
    ]  # fmt: skip
    first = [(side, "run", *what) for what in (("pp", [10, 11]), ("tg", [10])) for side in ("ours", "peer")]
    second = [first[1], first[0], first[3], first[2]]
    assert log[6:16] == ["roofs", *first, "roofs", *second]
    deep = [("ours", "run", "pp", [13, 14]), ("peer", "run", "pp", [13, 14])]
    assert log[16:18] == [("ours", "begin", [10, 11, 12]), ("peer", "begin", [10, 11, 12])]
    assert log[20:] == ["roofs", *deep, "roofs", *reversed(deep)]
    assert not lost
    for f in figures:
        assert (f.ours_s, f.peer_s, f.ratio, f.peer_setting) == ([0.5, 0.5], [2.0, 2.0], 4.0, "peer's way")
        assert f.roofs == [MEASURED, MEASURED] and f.ours_quiet and not f.peer_quiet


@pytest.mark.parametrize("fails_at", [0, 2, 3, 4, 5, 8])
def test_without_its_peer_ours_goes_on(fails_at: int) -> None:
    figures, lost = contest([], fails_at)
    assert [str(error) for error in lost] == ["peer is gone"]
    assert all(len(f.ours_s) == 2 for f in figures)
    assert sum(len(f.peer_s) for f in figures) == {0: 0, 2: 0, 3: 0, 4: 1, 5: 2, 8: 4}[fails_at]


def test_an_error_of_ours_is_an_error() -> None:
    with pytest.raises(LookupError, match="ours is gone"):
        Contest(Recorder("ours", [], 1.0, 0), None, lost=LookupError).run_cases(
            [Case("pp", 1)], [1], 1, roofs=lambda: MEASURED, say=lambda text: None
        )
