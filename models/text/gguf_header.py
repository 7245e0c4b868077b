"""The header of one GGUF file: a bounds-checked cursor over the memory-mapped bytes, metadata decoded at first access.

Nothing in a header is believed: each count and length is compared with what is left of the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tensorgraph.errors import FormatError, InputError

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {
    number: np.dtype(code)
    for number, code in enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1", "", "", "<u8", "<i8", "<f8"])
    if code
}

_MAX_PAIRS, _MAX_TENSORS, _MAX_STRINGS = 1 << 16, 1 << 18, 1 << 23  # far above any model; they bound time and memory
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_DIMS = 4
_PIECE_BYTES, _FEW_STRINGS = 1 << 14, 100


class MappedFile:
    """One read-only mapped file.

    Raises: InputError where there is no readable file, or once it is closed; FormatError where it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.exists():
                raise InputError(f"[gguf] wanted a GGUF file; there is no file {path}")
            if not path.is_file():
                raise InputError(f"[gguf] wanted a GGUF file; {path} is a folder or a device")
            with path.open("rb") as stream:
                self.size_bytes = stream.seek(0, 2)
                if self.size_bytes == 0:
                    raise FormatError(f"[gguf] {path}: the file is empty (byte 0)")
                self._content: mmap.mmap | None = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, OverflowError) as error:
            raise InputError(f"[gguf] {path} cannot be read: {error}") from error

    @property
    def content(self) -> mmap.mmap:
        if self._content is None:
            raise InputError(f"[gguf] {self.path} is closed")
        return self._content

    def close(self) -> None:
        """Let go of the file; arrays that were handed out keep their memory."""
        self._content = None

    def error(self, at: int, what: str) -> FormatError:
        return FormatError(f"[gguf] {self.path}: {what} (byte {at})")


class Cursor:
    """A position in a file that never leaves it; `end` is where a value that is to be decoded ends."""

    def __init__(self, file: MappedFile, at: int = 0, end: int = 0) -> None:
        self.file, self.at, self._end, self._content = file, at, end, file.content
        self._strings_left = _MAX_STRINGS

    def error(self, what: str) -> FormatError:
        return self.file.error(self.at, what)

    def take(self, size_bytes: int, what: str) -> int:
        """Step over `size_bytes` bytes and return where they begin."""
        start, left = self.at, self.file.size_bytes - self.at
        if size_bytes > left:
            raise self.error(f"{what} takes {size_bytes} bytes; {left} are left in the file")
        self.at += size_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self._content, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self._content, self.take(8, what))[0]
        return value

    def text(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        start = self.take(length, what)
        try:
            return self._content[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.file.error(start + error.start, f"{what} is not UTF-8") from None

    def skip(self, kind: int, what: str, depth: int = 0) -> None:
        """Step over a value of type `kind`; all its lengths then are known to fit."""
        if kind in _NUMBERS:
            self.take(_NUMBERS[kind].itemsize, what)
        elif kind == _STRING:
            self.take(self.u64(f"the length of {what}"), what)
        elif kind == _ARRAY:
            element, count = self._array_head(what, depth)
            if element in _NUMBERS:
                self.take(count * _NUMBERS[element].itemsize, what)
            elif element == _STRING:
                self._skip_strings(count, what)
            else:
                for _ in range(count):
                    self.skip(element, what, depth + 1)
        else:
            raise self.error(f"{what} has the unknown type {kind}")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """Decode a value of type `kind`: number, bool, str, NumPy array of numbers, or list."""
        if kind in _NUMBERS:
            return self._numbers(kind, 1, what)[0].item()
        if kind == _STRING:
            return self.text(what)
        element, count = self._array_head(what, depth)
        if element in _NUMBERS:
            return self._numbers(element, count, what)
        if element == _STRING:
            return self._strings(count, what)
        return [self.value(element, what, depth + 1) for _ in range(count)]

    def _array_head(self, what: str, depth: int) -> tuple[int, int]:
        element, count = self.u32(f"the element type of {what}"), self.u64(f"the count of {what}")
        if element not in _NUMBERS and element not in (_STRING, _ARRAY):
            raise self.error(f"{what} is an array of the unknown type {element}")
        if depth == _MAX_DEPTH:
            raise self.error(f"{what} is nested deeper than {_MAX_DEPTH} arrays")
        if element not in _NUMBERS:
            smallest = 8 if element == _STRING else 12
            if count * smallest > self.file.size_bytes - self.at or count > self._strings_left:
                raise self.error(f"{what} cannot have {count} elements in a file of {self.file.size_bytes} bytes")
            self._strings_left -= count
        return element, count

    # What follows is written for speed, without the checks of `take`: a vocabulary has 10^5 strings.

    def _skip_strings(self, count: int, what: str) -> None:
        at, passed = _pass_short_strings(self._content, self.at, count)
        content, unpack = self._content, _U64.unpack_from
        try:
            for _ in range(count - passed):
                at += 8 + unpack(content, at)[0]
        except (struct.error, OverflowError):
            at = self.file.size_bytes + 1
        if at > self.file.size_bytes:
            raise self.error(f"{what}, an array of {count} strings, runs past the end of the file")
        self.at = at

    def _strings(self, count: int, what: str) -> list[str]:
        """Decode strings that `skip` has found to lie in the file."""
        found = None
        if 9 * count <= self._end - self.at <= 263 * count:  # else some are empty or long, or other values follow
            found = _short_strings(bytearray(self._content[self.at : self._end]), count)
        return self._any_strings(count, what) if found is None else found

    def _any_strings(self, count: int, what: str) -> list[str]:
        at, content, unpack, strings = self.at, self._content, _U64.unpack_from, list[str]()
        try:
            for _ in range(count):
                end = at + 8 + unpack(content, at)[0]
                strings.append(content[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as error:
            raise self.file.error(at + 8 + error.start, f"{what}: string {len(strings)} is not UTF-8") from None
        self.at = at
        return strings

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray[Any, Any]:
        dtype = _NUMBERS[kind]
        start = self.take(count * dtype.itemsize, what)
        numbers = np.frombuffer(self._content[start : self.at], dtype)
        if kind != _BOOL:
            return numbers
        if np.any(numbers > 1):
            raise self.file.error(start, f"{what} wants bools of 0 or 1; got {numbers.max()}")
        return numbers.astype(np.bool_)


def _pass_short_strings(content: mmap.mmap, at: int, count: int) -> tuple[int, int]:
    """Step over strings, each after its length, as long as they have less than 256 bytes and no zeros; the place and how many."""
    passed = 0
    while passed < count and count > _FEW_STRINGS:
        numbers = _numbers_at_each_byte(content, at, min(len(content) - at, _PIECE_BYTES, 263 * (count - passed)))
        starts = np.flatnonzero(numbers < 256)[: count - passed]
        ends = starts + 8 + numbers[starts].astype(np.int64)
        if not len(starts) or starts[0] != 0 or np.any(starts[1:] != ends[:-1]) or at + ends[-1] > len(content):
            break
        at, passed = at + int(ends[-1]), passed + len(starts)
    return at, passed


def _numbers_at_each_byte(content: mmap.mmap | bytearray, at: int, size_bytes: int) -> np.ndarray[Any, Any]:
    """What would be read as a length at each of so many bytes."""
    return np.ndarray(max(size_bytes - 7, 0), "<u8", content, at, strides=(1,))


def _short_strings(content: bytearray, count: int) -> list[str] | None:
    """Strings, each after its length, decoded all at once; None unless each has 1 to 255 bytes of UTF-8, and none of 0."""
    if not count:
        return []
    numbers = _numbers_at_each_byte(content, 0, len(content))
    at = np.flatnonzero(numbers < 256)
    if len(at) != count or at[0] != 0 or np.any(np.diff(at, append=len(content)) != 8 + numbers[at].astype(np.int64)):
        return None
    np.frombuffer(content, np.uint8)[at] = 0
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None
    return text.split(chr(0) * 8)[1:] if text.count(chr(0)) == 8 * count else None


class Metadata(Mapping[str, Any]):
    """Metadata by key; each value is decoded when it is first asked for, and kept."""

    def __init__(self, file: MappedFile, entries: dict[str, tuple[int, int, int]]) -> None:
        """Each entry is the type of a value, and where it begins and ends."""
        self._file, self._entries, self._decoded = file, entries, dict[str, Any]()

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            kind, at, end = self._entries[key]
            self._decoded[key] = Cursor(self._file, at, end).value(kind, f"metadata {key[:80]!r}")
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def at(self, key: str) -> int:
        """Where the value of `key` begins in the file, in bytes."""
        return self._entries[key][1]

    def stored(self, key: str) -> tuple[int, bytes]:
        """The number of a value's type, and its bytes as the file holds them."""
        kind, at, end = self._entries[key]
        return kind, self._file.content[at:end]

    def integer(self, key: str) -> int:
        """The value of `key` as an integer that is not negative; FormatError if it is anything else."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._file.error(self.at(key), f"metadata {key!r} wants an integer from 0 on; got {value!r:.80}")
        return value


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header states it, at byte `at`: `dims` fastest first, `offset` from the start of the data."""

    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int
    at: int


@dataclass(frozen=True)
class Header:
    """What one file says of itself; `data_start` and `alignment` in bytes."""

    file: MappedFile
    version: int
    metadata: Metadata
    tensors: tuple[TensorEntry, ...]
    data_start: int
    alignment: int


def read_header(path: Path) -> Header:
    """Map a file and read its header.

    Raises: InputError where there is no such file, FormatError where it is not a whole GGUF header.
    """
    file = MappedFile(path)
    cursor = Cursor(file)
    magic = file.content[:4]
    if magic != b"GGUF":
        raise file.error(0, f"not a GGUF file: wanted the first bytes b'GGUF'; got {magic!r}")
    cursor.take(4, "the magic")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise file.error(4, "a big-endian file; only little-endian ones are read")
    if version not in (2, 3):
        raise file.error(4, f"wanted GGUF version 2 or 3; got {version}")
    n_tensors, n_pairs = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    if n_tensors > _MAX_TENSORS or n_pairs > _MAX_PAIRS or 24 * n_tensors + 13 * n_pairs > file.size_bytes:
        raise file.error(8, f"{n_tensors} tensors and {n_pairs} metadata pairs in a file of {file.size_bytes} bytes")
    metadata = _read_metadata(cursor, n_pairs)
    tensors = _read_tensors(cursor, n_tensors)
    alignment = _alignment(file, metadata)
    return Header(file, version, metadata, tensors, -(-cursor.at // alignment) * alignment, alignment)


def _read_metadata(cursor: Cursor, n_pairs: int) -> Metadata:
    entries: dict[str, tuple[int, int, int]] = {}
    for _ in range(n_pairs):
        start = cursor.at
        key = cursor.text("a metadata key")
        if key in entries:
            raise cursor.file.error(start, f"metadata key {key[:80]!r} occurs twice")
        kind = cursor.u32(f"the type of metadata {key[:80]!r}")
        at = cursor.at
        cursor.skip(kind, f"metadata {key[:80]!r}")
        entries[key] = (kind, at, cursor.at)
    return Metadata(cursor.file, entries)


def _read_tensors(cursor: Cursor, n_tensors: int) -> tuple[TensorEntry, ...]:
    tensors: dict[str, TensorEntry] = {}
    for _ in range(n_tensors):
        start = cursor.at
        name = cursor.text("a tensor name")
        what = f"tensor {name[:80]!r}"
        if name in tensors:
            raise cursor.file.error(start, f"{what} occurs twice")
        n_dims = cursor.u32(f"the number of dimensions of {what}")
        if n_dims > _MAX_DIMS:
            raise cursor.file.error(start, f"{what} has {n_dims} dimensions; at most {_MAX_DIMS} are allowed")
        dims = tuple(cursor.u64(f"the dimensions of {what}") for _ in range(n_dims))
        type_id, offset = cursor.u32(f"the type of {what}"), cursor.u64(f"the offset of {what}")
        tensors[name] = TensorEntry(name, dims, type_id, offset, start)
    return tuple(tensors.values())


def _alignment(file: MappedFile, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return 32
    alignment = metadata.integer(key)
    if alignment < 8 or alignment & (alignment - 1):
        raise file.error(metadata.at(key), f"{key} wants a power of two from 8 on; got {alignment}")
    return alignment
