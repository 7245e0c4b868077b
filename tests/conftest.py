"""Hypothesis profiles, Ctrl-C, which of the tests marked `deep` run, files that need packages that are not there, and tables."""

from __future__ import annotations

import os
import re
import signal
import time
import zlib

import pytest
from hypothesis import settings

from tensorgraph.models.text.packaged import is_installed
from tests import tables

OPTIONAL = {"models/test_gemma3_270m.py": "gemma3-270m"}
"""Files with tests of models whose packages `make test-deep` installs, and `make test` does not."""

collect_ignore = [file for file, model in OPTIONAL.items() if not is_installed(model)]

settings.register_profile("tensorgraph", deadline=None, database=None)
settings.register_profile("ci", settings.get_profile("tensorgraph"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "tensorgraph")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; programs that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deep-shard",
        metavar="K/N",
        help="also run part K (0 to N-1) of N of the tests marked deep; N alone: the part of today; without it, none",
    )
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt as they are now; review the diff")


def shard(text: str, day_of_year: int) -> tuple[int, int]:
    """`K/N`, or `N` with K taken from the day, as (K, N).

    Raises: pytest.UsageError where it is neither.
    """
    found = re.fullmatch(r"(?:(\d+)/)?(\d+)", text)
    if found is None or int(found[2]) == 0 or int(found[1] or 0) >= int(found[2]):
        raise pytest.UsageError(f"--deep-shard wants K/N with 0 <= K < N, or N; got {text!r}")
    count = int(found[2])
    return (day_of_year % count if found[1] is None else int(found[1])), count


def in_shard(node_id: str, part: int, count: int) -> bool:
    """Whether a test belongs to part `part`: its name decides, so that other tests coming or going move none."""
    return zlib.crc32(node_id.encode()) % count == part


def pytest_configure(config: pytest.Config) -> None:
    wanted: str | None = config.option.deep_shard
    if wanted is not None:  # resolved once, before workers start: all see the same day
        part, count = shard(wanted, time.localtime().tm_yday)
        config.option.deep_shard = f"{part}/{count}"


def pytest_report_header(config: pytest.Config) -> str:
    wanted: str | None = config.option.deep_shard
    return f"deep tests: {'none' if wanted is None else f'part {wanted}'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for file in collect_ignore:
        terminalreporter.write_line(f"tests/{file} did not run: {OPTIONAL[file]} is not installed; make test-deep installs it")
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    for line in tables.lines(report for report in reports if report.when == "call"):
        terminalreporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted: str | None = config.option.deep_shard
    part, count = (0, 0) if wanted is None else shard(wanted, 0)
    chosen: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        deep = item.get_closest_marker("deep") is not None
        runs = not deep or (count > 0 and in_shard(item.nodeid, part, count))
        (chosen if runs else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen
