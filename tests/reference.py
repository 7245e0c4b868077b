"""Reference data for the tests: `tests/data` holds it packed, `reference_path` gives a file as it was."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import lzma
import os
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parent / "data"
CACHE = DATA.parents[1] / ".cache" / "reference"
Arrays = dict[str, np.ndarray[Any, Any]]


@cache
def manifest() -> dict[str, dict[str, Any]]:
    """Every packed file: its name, size and SHA-256 when unpacked, and the file that holds it."""
    entries: dict[str, dict[str, Any]] = json.loads((DATA / "manifest.json").read_text())
    return entries


@cache
def cache_folder() -> Path:
    digest = hashlib.sha256((DATA / "manifest.json").read_bytes()).hexdigest()
    return CACHE / digest[:16]  # another manifest, another folder: nothing stale is ever read


def reference_path(relative: str) -> Path:
    """Path of a reference file, unpacked on first use into `.cache/reference` of this checkout.

    Raises: FileNotFoundError for a name that `tests/data` does not hold; ValueError where its bytes are damaged.
    """
    plain = DATA / relative
    if plain.is_file():
        return plain
    entry = manifest().get(relative)
    if entry is None:
        raise FileNotFoundError(f"tests/data has no {relative!r}; see tests/data/manifest.json for what there is")
    target = cache_folder() / relative
    if not target.exists():
        content = unpack(DATA / entry["packed"])
        found = hashlib.sha256(content).hexdigest()
        if found != entry["sha256"]:
            raise ValueError(f"{entry['packed']} unpacks to SHA-256 {found}; the manifest wants {entry['sha256']}")
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(part, target)  # whole or not at all, also with several processes at it
    return target


def unpack(packed: Path) -> bytes:
    """Content of a packed file: what was compressed, or what its recipe makes."""
    content = packed.read_bytes()
    raw = bz2.decompress(content) if packed.suffix == ".bz2" else lzma.decompress(content)
    if packed.suffixes[-2] != ".recipe":
        return raw
    with np.load(io.BytesIO(raw)) as stored:
        arrays = dict(stored)
    return _with_merges(arrays) if "splits" in arrays else _in_rows(arrays) if "starts" in arrays else _requantised(arrays)


def _requantised(recipe: Arrays) -> bytes:
    """A GGUF file whose tensors are those of another one in other types: the header, then each tensor converted.

    The types and conversions are the `gguf` package's; the manifest's SHA-256 says that the bytes are the peer's.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    source = np.memmap(reference_path(str(recipe["source"])), np.uint8, "r")
    content = np.zeros(int(recipe["size"]), np.uint8)
    content[: recipe["head"].size] = recipe["head"]
    for offset, kind, start, rows, columns in recipe["tensors"].tolist():
        values = source[start : start + 4 * rows * columns]
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.I32):
            weights = values.view("<f4").reshape(rows, columns)
            values = quantize(weights, GGMLQuantizationType(kind)).reshape(-1).view(np.uint8)
        content[offset : offset + values.size] = values
    return content.tobytes()


def _in_rows(recipe: Arrays) -> bytes:
    """A safetensors file whose rows are rows, or columns, of the tensors of a GGUF file in F32; others are kept as they are.

    Of each row: where it starts in that file, how far it is to the next element, how many there are (all in elements of 4
    bytes; starts from 0 on), or -1 and the number of bytes that are kept; and the bytes of an element, 2 (BF16) or 4.
    """
    source = np.memmap(reference_path(str(recipe["source"])), np.uint8, "r")
    floats = source[: len(source) // 4 * 4].view("<u4")
    parts, kept, at = [recipe["head"].tobytes()], recipe["kept"].tobytes(), 0
    for start, step, count, size in zip(*(recipe[name].tolist() for name in ("starts", "steps", "counts", "sizes")), strict=True):
        if start < 0:
            parts.append(kept[at : at + count])
            at += count
            continue
        row = floats[start : start + step * (count - 1) + 1 : step]
        parts.append((row if size == 4 else (row >> 16).astype("<u2")).tobytes())
    return b"".join(parts)


def _with_merges(recipe: Arrays) -> bytes:
    """A vocabulary whose list of merges was taken out: merge i spells token ids[i], cut after splits[i] bytes."""
    head, tail = recipe["head"].tobytes(), recipe["tail"].tobytes()
    tokens = strings(head, int(recipe["tokens_at"]), int(recipe["n_tokens"]))
    merges = []
    for token, split in zip(np.cumsum(recipe["steps"]).tolist(), recipe["splits"].tolist(), strict=True):
        text = tokens[token][:split] + b" " + tokens[token][split:]
        merges.append(struct.pack("<Q", len(text)) + text)
    return head + b"".join(merges) + tail


def strings(content: bytes, start: int, count: int) -> list[bytes]:
    """`count` GGUF strings (a 64-bit length, then the bytes) from offset `start`."""
    found = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", content, start)
        found.append(content[start + 8 : start + 8 + length])
        start += 8 + length
    return found
