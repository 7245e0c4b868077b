"""The texts and JSON objects of published folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorgraph.errors import FormatError, InputError


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: InputError where there is no such file; FormatError where it is something else.
    """
    return parse_object(content_of(path, "checkpoint"), path, "checkpoint")


def read_if_there(path: Path, what: str) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises: FormatError where it is something else.
    """
    return parse_object(content_of(path, what), path, what) if path.is_file() else {}


def ends_of_generation(folder: Path, n_tokens: int) -> set[int]:
    """The ids that generation_config.json says end a generation; none where there is no such file.

    Raises: FormatError where it is something else than a JSON object.
    """
    ends = read_if_there(folder / "generation_config.json", "tokenizer").get("eos_token_id", [])
    return {i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int) and 0 <= i < n_tokens}


def content_of(path: Path, what: str) -> str:
    """The text of a file.

    Raises: InputError where there is no such file.
    """
    if not path.is_file():
        raise InputError(f"[{what}] there is no file {path}")
    return path.read_text(encoding="utf-8", errors="replace")


def parse_object(content: str, path: Path, what: str) -> dict[str, Any]:
    """The JSON object that is the content of a file.

    Raises: FormatError where it is something else.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"[{what}] {path} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"[{what}] wanted a JSON object in {path}; got {type(parsed).__name__}")
    return parsed
