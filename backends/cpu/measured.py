"""What was measured of this machine once: numbers by name, kept in the user's cache folder for later processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tensorgraph.backends.cpu.code_cache import default_folder
from tensorgraph.backends.cpu.target import Target


def kept(name: str, target: Target, fields: Sequence[str], most: int) -> Mapping[str, int] | None:
    """The numbers of a target, from 0 to `most`, that were kept under a name; None where there are none, or not such."""
    place = _place(name, target)
    try:
        found = json.loads(place.read_bytes()) if place is not None else {}
        numbers = {field: int(found[field]) for field in fields}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return numbers if all(0 <= n <= most for n in numbers.values()) else None


def keep(name: str, target: Target, values: Mapping[str, int]) -> None:
    """Keep numbers in place of those that were there; without a folder to write to nothing is kept."""
    place = _place(name, target)
    if place is None:
        return
    with suppress(OSError):
        written = place.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(dict(values)))
        written.replace(place)


def all_kept(target: Target) -> str:
    """All numbers of a target, as a text that differs where any of them does."""
    place = _place("*", target)
    if place is None:
        return ""
    found = []
    for path in sorted(place.parent.glob(place.name)):
        with suppress(OSError):
            found.append(f"{path.name}:{path.read_bytes().hex()}")
    return "|".join(found)


def _place(name: str, target: Target) -> Path | None:
    folder = default_folder("measured")
    return folder / f"{name}-{hashlib.sha256(target.key.encode()).hexdigest()[:16]}.json" if folder is not None else None
