"""One-line mistakes planted into the source, in memory: the tests notice every one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.layout import ROOT
from tests.models.mistakes import GROUPS
from tests.models.planting import planted


@pytest.mark.parametrize("group", GROUPS)
def test_every_mistake_is_noticed(group: str) -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.models.planting", group]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    sound = [line for line in lines if not line["about"]]
    assert [line for line in sound if line["is"] != "passes"] == []
    found = [line for line in lines if line["about"]]
    assert [line for line in found if line["is"] != "fails"] == []
    assert [line["about"] for line in found] == [mistake.about for mistake in GROUPS[group]]


def test_the_list() -> None:
    """Sixty at least, each a change of its own; and a mistake that is no longer in the source is told."""
    mistakes = [mistake for group in GROUPS.values() for mistake in group]
    assert len(mistakes) >= 60
    assert len({mistake.about for mistake in mistakes}) == len({planted(mistake) for mistake in mistakes}) == len(mistakes)
    with pytest.raises(ValueError, match="0 times"):
        planted(mistakes[0]._replace(old="this stands nowhere"))
