"""The JSON files of published folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorgraph.errors import FormatError, InputError


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: InputError where there is no such file; FormatError where it is something else.
    """
    if not path.is_file():
        raise InputError(f"[checkpoint] there is no file {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"[checkpoint] {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"[checkpoint] wanted a JSON object in {path}; got {type(found).__name__}")
    return found
