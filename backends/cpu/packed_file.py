"""Constants in their layout on disk: one file for each model file, which later starts map instead of packing again.

What is mapped is shared by all processes, and the system can drop and read it again. A file is written whole under another name,
then renamed. Its header is checked, not what follows: that is as safe on disk as the model itself. It holds for the model file
that it was made of, by path, size, time of change and header, and for layouts that lay a block of random bits out as it did.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu.code_cache import is_private
from tensorgraph.backends.cpu.constants import ALIGNMENT, LARGE_PAGE
from tensorgraph.backends.cpu.weights import interleaved
from tensorgraph.dtypes import BY_NAME, DType

MAGIC = b"tensorgraph packed 1\n"
SUFFIX = ".packed"
LIMIT_BYTES = 64 << 30
"""Of all files in a folder: those that were not used for the longest time are removed to make room for a new one."""
_HEAD = len(MAGIC) + 8 + hashlib.sha256().digest_size  # then the length of the header, and its digest
_MOST_HEADER = 1 << 26
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither follow a link nor wait for a pipe


@dataclass(frozen=True)
class Source:
    """What a model file is known by.

    Attributes:
        changed_ns: when it was last changed.
        head: a digest of what lies before its tensors.
    """

    path: str
    size_bytes: int
    changed_ns: int
    head: str


class Entry(NamedTuple):
    """A constant: where the array lies in the model file that it was made of, its type and shape, and where its units lie."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    at: int
    size_bytes: int


Key = tuple[int, str, tuple[int, ...]]


class PackedFile:
    """What is packed of one mapped model file.

    Nothing here may fail a run: a file that is not as it should be is left out with a warning, and written anew.

    Args:
        content: the model file; `head_bytes` of it lie before its tensors.
        folder: where packed files lie; made where it is missing.

    Raises: OSError: the model file is not there any more.
    """

    def __init__(self, path: Path, content: mmap.mmap, head_bytes: int, folder: Path) -> None:
        self.content = content
        status = os.stat(path)
        head = hashlib.sha256(memoryview(content)[:head_bytes]).hexdigest()
        self.source = Source(os.path.realpath(path), len(content), status.st_mtime_ns, head)
        name = hashlib.sha256(self.source.path.encode()).hexdigest()[:16]
        self.path = folder / f"{Path(self.source.path).stem[:100]}-{name}{SUFFIX}"
        self._begin = np.frombuffer(content, np.uint8).ctypes.data
        self._held: dict[Key, NDArray[np.uint8]] = {}
        self._new = False
        self._usable = is_private(folder, "packed cache")
        if not (self._usable or folder.is_dir()):
            warnings.warn(f"[packed cache] the folder {folder} cannot be made; it is not used", RuntimeWarning, stacklevel=3)
        if self._usable and os.path.lexists(self.path):
            self._open()

    def find(self, array: NDArray[Any], dtype: DType, size_bytes: int) -> NDArray[np.uint8] | None:
        """The units of an array that lies in the model file, None where they are not there."""
        found = self._held.get(self._key(array, dtype)) if array.flags.c_contiguous else None
        return found if found is not None and len(found) == size_bytes else None

    def add(self, array: NDArray[Any], dtype: DType, units: NDArray[np.uint8]) -> None:
        """Have the units of such an array written by `save`."""
        if array.flags.c_contiguous:
            self._held[self._key(array, dtype)] = units
            self._new = True

    def save(self) -> None:
        """Write all units, unless they are on disk already; they must not be written to any more."""
        if not (self._new and self._usable):
            return
        try:
            if os.stat(self.source.path).st_mtime_ns == self.source.changed_ns:
                self._write()
        except OSError as error:
            warnings.warn(f"[packed cache] {self.path} cannot be written: {error.strerror}", RuntimeWarning, stacklevel=2)
        self._new = False

    def _key(self, array: NDArray[Any], dtype: DType) -> Key:
        return int(array.ctypes.data) - self._begin, dtype.name, array.shape

    # Reading.

    def _open(self) -> None:
        try:
            descriptor = os.open(self.path, _READ)
        except OSError as error:
            return self._refuse(str(error.strerror))
        try:
            why = self._map(descriptor)
            if why:
                self._refuse(why)
            elif os.utime in os.supports_fd:
                with suppress(OSError):
                    os.utime(descriptor)
        except OSError as error:
            self._refuse(str(error.strerror))
        finally:
            os.close(descriptor)

    def _map(self, descriptor: int) -> str:
        """Take what the file holds; else why not."""
        status = os.fstat(descriptor)
        ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        if not stat.S_ISREG(status.st_mode) or not ours or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"wanted a file that this user alone can write; got {stat.filemode(status.st_mode)}, owner {status.st_uid}"
        header = _read_header(descriptor, status.st_size)
        if header is None:
            return "it is damaged"
        if header["source"] != asdict(self.source) or header["layouts"] != _layouts(header["layouts"]):
            return "it was made of another model file, or for other layouts"
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)  # where it is still to be read
        content = np.frombuffer(mapped, np.uint8)
        for offset, dtype, shape, at, size_bytes in header["entries"]:
            self._held[offset, dtype, tuple(shape)] = content[at : at + size_bytes]
        return ""

    def _refuse(self, why: str) -> None:
        self._held.clear()
        warnings.warn(f"[packed cache] {self.path} is not used, and written anew: {why}", RuntimeWarning, stacklevel=5)

    # Writing.

    def _write(self) -> None:
        entries, at = [], 0
        for (offset, dtype, shape), units in self._held.items():
            entries.append(Entry(offset, dtype, shape, at, len(units)))
            at += -(-len(units) // ALIGNMENT) * ALIGNMENT
        begin = mmap.PAGESIZE
        while True:
            listed = [entry._replace(at=entry.at + begin) for entry in entries]
            header = self._header(listed, begin + at + ALIGNMENT)
            if len(header) <= begin:
                break
            begin = -(-len(header) // mmap.PAGESIZE) * mmap.PAGESIZE
        _make_room(self.path, begin + at + ALIGNMENT)
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".")
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for rest in _joined((header, bytes(begin - len(header)), *self._padded(), bytes(ALIGNMENT))):
                    while rest:
                        rest = rest[file.write(rest) :]
                os.fsync(descriptor)  # or a crash might leave a file of the right size, and of zeros
            os.replace(temporary, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _padded(self) -> Iterator[memoryview | bytes]:
        for units in self._held.values():
            yield units.data
            yield bytes(-len(units) % ALIGNMENT)

    def _header(self, entries: list[Entry], size_bytes: int) -> bytes:
        said = {"source": asdict(self.source), "layouts": _layouts({e.dtype for e in entries}), "size_bytes": size_bytes}
        text = json.dumps(said | {"entries": entries}).encode()
        return MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text


def _joined(pieces: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    """The same bytes in chunks of a large page: as which some systems then keep and map what was written so."""
    chunk, filled = memoryview(bytearray(LARGE_PAGE)), 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            n = min(len(rest), LARGE_PAGE - filled)
            chunk[filled : filled + n], rest = rest[:n], rest[n:]
            filled += n
            if filled == LARGE_PAGE:
                yield chunk
                filled = 0
    yield chunk[:filled]


def _read_header(descriptor: int, size_bytes: int) -> dict[str, Any] | None:
    """A file's header, None where it is not whole: what was written is as it should be."""
    start = os.read(descriptor, _HEAD)
    length = int.from_bytes(start[len(MAGIC) : len(MAGIC) + 8], "little")
    if len(start) < _HEAD or not start.startswith(MAGIC) or length > min(size_bytes, _MOST_HEADER):
        return None
    text = os.read(descriptor, length)
    if hashlib.sha256(text).digest() != start[-hashlib.sha256().digest_size :]:
        return None
    found: dict[str, Any] = json.loads(text)
    return found if found["size_bytes"] == size_bytes else None


def _layouts(names: Mapping[str, Any] | set[str]) -> dict[str, str]:
    """By type, a digest of how it is laid out."""
    return {name: _layout(BY_NAME[name]) for name in sorted(names) if name in BY_NAME}


def _layout(dtype: DType) -> str:
    form = interleaved(dtype)
    digest = hashlib.sha256(f"{form.block} {form.unit_bytes} {form.file_block} {form.file_block_bytes} {form.codes}".encode())
    if form.parts is not None:
        sample = hashlib.shake_128(b"any bits").digest(2 * form.file_block_bytes)
        digest.update(form.parts(np.frombuffer(sample, np.uint8).reshape(2, -1)).tobytes())
    return digest.hexdigest()


def _make_room(path: Path, size_bytes: int) -> None:
    """Remove the files that were not used for the longest time, until another has room."""
    others = [(status.st_mtime, status.st_size, other) for other in path.parent.glob(f"*{SUFFIX}") if (status := other.lstat())]
    held_bytes = sum(n for _, n, other in others if other != path)
    for _, n, other in sorted(others):
        if held_bytes + size_bytes > LIMIT_BYTES and other != path:
            with suppress(OSError):
                other.unlink()
                held_bytes -= n
