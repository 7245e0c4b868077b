"""Files of state: one sequence, its rows in row order, as safetensors."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tensorgraph.dtypes import DType
from tensorgraph.errors import FormatError, InputError, StateError
from tensorgraph.state import MAX_LENGTH, StateSpec, StreamClass

_METADATA = "tensorgraph.state"
_FIELDS = {"specs": dict, "length": int, "first": dict, "crc32": dict, "extra": dict}

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class SavedState:
    """A sequence as a file holds it: of each stream the rows from `first[its class]` on."""

    length: int
    first: Mapping[StreamClass, int]
    rows: Mapping[str, NDArray[Any]]
    extra: Mapping[str, str]


def save_state(path: _Path, saved: SavedState, specs: Mapping[str, StateSpec], kv_dtype: DType) -> None:
    """Write a file whole or not at all: an interrupted save leaves an older one as it was."""
    about = {
        "specs": {name: spec.key(kv_dtype) for name, spec in specs.items()},
        "length": saved.length,
        "first": {cls.name: first for cls, first in saved.first.items()},
        "crc32": {name: _checksum(rows) for name, rows in saved.rows.items()},
        "extra": dict(saved.extra),
    }
    part = Path(f"{os.fspath(path)}.part")
    try:
        save_file(dict(saved.rows), part, {_METADATA: json.dumps(about)})
        os.replace(part, path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"[save] {os.fspath(path)} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load_state(path: _Path, specs: Mapping[str, StateSpec], kv_dtype: DType) -> SavedState:
    """Read a file of these streams.

    Raises: FormatError if it is damaged; StateError if it holds other streams.
    """
    if not os.path.isfile(path):
        raise InputError(f"[load] there is no file {os.fspath(path)}")
    try:
        with safe_open(path, framework="numpy") as file:
            about = _parse(path, file.metadata())
            _check_specs(path, about["specs"], {name: spec.key(kv_dtype) for name, spec in specs.items()})
            if set(file.keys()) != set(specs):
                raise _damaged(path, f"wanted the streams {', '.join(specs)}; got {', '.join(file.keys())}")
            rows = {name: file.get_tensor(name) for name in specs}
    except SafetensorError as error:
        raise _damaged(path, f"wanted a whole safetensors file; got one that fails with: {error}") from error
    length = about["length"]
    if not 0 <= length <= MAX_LENGTH:
        raise _damaged(path, f"wanted a length from 0 to {MAX_LENGTH}; got {length}")
    first = {}
    for cls in dict.fromkeys(spec.stream_class for spec in specs.values()):
        row, limit = about["first"].get(cls.name), cls.first_read(length)
        if not isinstance(row, int) or not 0 <= row <= limit:
            raise _damaged(path, f"wanted a first row from 0 to {limit} for streams of class {cls.name}; got {row!r}")
        first[cls] = row
    for name, spec in specs.items():
        cls, (row, dtype), given = spec.stream_class, spec.held_row(kv_dtype), rows[name]
        shape = (cls.n_rows(length) - first[cls], *row)
        if given.shape != shape or given.dtype != dtype:
            raise _damaged(path, f'wanted {dtype} {list(shape)} for "{name}"; got {given.dtype} {list(given.shape)}')
        if about["crc32"].get(name) != _checksum(given):
            raise _damaged(path, f'wanted "{name}" with CRC {about["crc32"].get(name)}; got {_checksum(given)}')
    return SavedState(length, first, rows, about["extra"])


def _parse(path: _Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        about = json.loads((metadata or {}).get(_METADATA, "null"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"wanted JSON in the metadata {_METADATA}; got {error}") from error
    if not isinstance(about, dict) or any(not isinstance(about.get(k), kind) for k, kind in _FIELDS.items()):
        raise _damaged(path, f"wanted metadata {_METADATA} with {', '.join(_FIELDS)}; got none, or other types")
    if not all(isinstance(value, str) for value in about["extra"].values()):
        raise _damaged(path, "wanted text for every extra value; got something else")
    return about


def _check_specs(path: _Path, given: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    if given != wanted:
        names = sorted(k for k in {*given, *wanted} if given.get(k) != wanted.get(k))
        listed = ", ".join(f'"{k}" {given.get(k, "missing")} (wanted {wanted.get(k, "none")})' for k in names[:4])
        raise StateError(f"[load] wanted the {len(wanted)} streams of this store; got {listed}; in {os.fspath(path)}")


def _checksum(rows: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


def _damaged(path: _Path, what: str) -> FormatError:
    return FormatError(f"[load] {what}; in {os.fspath(path)}, {os.path.getsize(path)} bytes long")
