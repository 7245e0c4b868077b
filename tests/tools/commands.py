"""Running the command line inside the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from tensorgraph.tools.cli import application
from tests.reference import reference_path


def tg(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """`tensorgraph ARGUMENTS`, its two outputs apart."""
    return CliRunner().invoke(application(), [str(a) for a in arguments], input=stdin)


def ok(*arguments: object, stdin: str | bytes | None = None) -> str:
    """What a command that must succeed printed."""
    result = tg(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(*arguments: object, stdin: str | bytes | None = None) -> dict[str, Any]:
    """The one JSON object that a command prints with `--json`, and nothing else."""
    found: dict[str, Any] = json.loads(ok(arguments[0], "--json", *arguments[1:], stdin=stdin))
    return found


def refused(*arguments: object, stdin: str | bytes | None = None) -> str:
    """The one line by which a command refuses its input."""
    result = tg(*arguments, stdin=stdin)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("tensorgraph: ") and "Traceback" not in line
    return line


def gguf(architecture: str) -> Path:
    return reference_path(f"{architecture}/{architecture}-f32.gguf")


def arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path) as stored:
        return dict(stored)
