"""docs/porting-from-ggml.md: its Python runs, and the calls that it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "porting-from-ggml.md").read_text()
ROWS = re.findall(r"^\| `ggml_\w+.*?\| (.*) \|$", TEXT, re.MULTILINE)


def test_the_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "porting-from-ggml.md", "exec"), names)
    assert names["y"].shape == (1, 64)


@pytest.mark.parametrize("row", ROWS)
def test_the_ops_of_the_table_exist(row: str) -> None:
    calls = [call for code in re.findall(r"`([^`]*)`", row) for call in re.findall(r"\b([a-z_]+)\(", code)]
    assert all(registry.ops.get(call) for call in calls)


def test_the_table_is_found() -> None:
    assert len(ROWS) >= 24
