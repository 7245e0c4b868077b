"""Tables at the end of a run: what some tests went through, beside whether they passed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pytest

PROPERTY = "row of a table"
EXECUTED = "CUDA kernels run on the host"
COMPILED = "CUDA kernels compiled by NVRTC"


def note(request: pytest.FixtureRequest, table: str, of: str, **numbers: int) -> None:
    """A row of a table: of what, and its numbers; those of one name are added, but for those that begin with `most_`."""
    request.node.user_properties.append((PROPERTY, (table, of, numbers)))


def lines(reports: Iterable[pytest.TestReport]) -> Iterator[str]:
    """The tables of the tests that ran."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    failed: set[tuple[str, str]] = set()
    for report in reports:
        for _, (table, of, numbers) in (p for p in report.user_properties if p[0] == PROPERTY):
            row = found.setdefault(table, {}).setdefault(of, {})
            for key, n in numbers.items():
                row[key] = max(row.get(key, 0), n) if key.startswith("most_") else row.get(key, 0) + n
            if report.failed:
                failed.add((table, of))
    for table, rows in sorted(found.items()):
        yield f"{table}:"
        width = max(map(len, rows))
        for of, numbers in sorted(rows.items()):
            yield f"  {of:<{width}}  {_said(numbers)}{'  FAILED' if (table, of) in failed else ''}"
        keys = dict.fromkeys(key for row in rows.values() for key in row if not key.startswith("most_"))
        totals = {key: sum(row.get(key, 0) for row in rows.values()) for key in keys}
        yield f"  all: {_said(totals)}; {sum(each == table for each, _ in failed)} of {len(rows)} rows failed"


def _said(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {key.replace('_', ' ')}" for key, n in numbers.items())
