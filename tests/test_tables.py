"""Tables at the end of a run: rows of one name are added, those of failed tests marked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests import tables


def test_rows_of_tests_that_passed_and_failed() -> None:
    def report(of: str, failed: bool = False, **numbers: int) -> Any:
        return SimpleNamespace(user_properties=[("other", 1), (tables.PROPERTY, ("kernels", of, numbers))], failed=failed)

    rows = [report("rope", cases=3, most_registers=40), report("add", failed=True, cases=2)]
    rows.append(report("rope", cases=4, most_registers=9))
    assert list(tables.lines(rows)) == [
        "kernels:",
        "  add   2 cases  FAILED",
        "  rope  7 cases, 40 most registers",
        "  all: 9 cases; 1 of 2 rows failed",
    ]
    assert list(tables.lines([])) == []
