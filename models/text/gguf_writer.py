"""Writing GGUF files of version 3: the header at once, then each tensor's bytes as they come."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from tensorgraph.dtypes import DType
from tensorgraph.errors import FormatError
from tensorgraph.models.text.gguf import GGML_TYPES

ALIGNMENT = 32
_TYPE_IDS = {dtype.name: number for number, dtype in GGML_TYPES.items()}
_LONGEST_NAME, _MOST_DIMS = 63, 4  # what ggml holds
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11, "f8": 12}


@dataclass(frozen=True)
class StoredValue:
    """A value of metadata as a file holds it: the number of its type, and its bytes."""

    kind: int
    content: bytes


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be stored; `shape` in NumPy order."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.dtype.size_bytes(self.shape[-1])


def header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    """All that lies before the first tensor's bytes.

    Args:
        metadata: numbers, bools, texts, and lists or arrays of them. A whole number is stored as u32, one below 0 and each of
            a list as i32, other numbers as f32; NumPy's numbers and arrays, and stored values, as they are.

    Raises: FormatError: a file cannot hold a value or a tensor.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, stored = _value(key, value)
        parts += [_text(key), struct.pack("<I", kind), stored]
    offset = 0
    for tensor in tensors:
        if len(tensor.name.encode()) > _LONGEST_NAME or not 1 <= len(tensor.shape) <= _MOST_DIMS:
            wanted = f"[gguf] wanted a name of at most {_LONGEST_NAME} bytes and 1 to {_MOST_DIMS} axes"
            raise FormatError(f"{wanted}; got {tensor.name!r} of {list(tensor.shape)}")
        if tensor.dtype.name not in _TYPE_IDS:
            raise FormatError(f"[gguf] {tensor.name}: files hold no tensors of {tensor.dtype}")
        dims = tensor.shape[::-1]
        parts += [_text(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _TYPE_IDS[tensor.dtype.name], offset)]
        offset += tensor.size_bytes + _padding(tensor.size_bytes)
    whole = b"".join(parts)
    return whole + bytes(_padding(len(whole)))


def size_bytes(head: bytes, tensors: Iterable[NewTensor]) -> int:
    """What a file takes whose header is `head`."""
    return len(head) + sum(t.size_bytes + _padding(t.size_bytes) for t in tensors)


def write(
    stream: BinaryIO, head: bytes, tensors: Iterable[NewTensor], content: Callable[[NewTensor], Iterable[memoryview]]
) -> None:
    """Write a file whose header is `head`; `content` gives a tensor's bytes in pieces."""
    stream.write(head)
    for tensor in tensors:
        written = 0
        for piece in content(tensor):
            written += stream.write(piece)
        if written != tensor.size_bytes:
            raise FormatError(f"[gguf] {tensor.name} has {tensor.size_bytes} bytes; got {written}")
        stream.write(bytes(_padding(written)))


def _padding(n_bytes: int) -> int:
    return -n_bytes % ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Any) -> tuple[int, bytes]:
    """A value's type in the file, and its bytes."""
    if isinstance(value, StoredValue):
        return value.kind, value.content
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, np.ndarray | list | tuple):
        return _ARRAY, _elements(key, value)
    number = _numbers(key, value)
    return _BOOL if number.dtype == np.bool_ else _NUMBERS[number.dtype.str[1:]], number.tobytes()


def _elements(key: str, values: Any) -> bytes:
    """An array: the type of its elements, their number, and they."""
    if not len(values):
        raise FormatError(f"[gguf] {key}: wanted an array of at least one element")
    if isinstance(values[0], str):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_text, values))
    numbers = _numbers(key, values)
    kind = _BOOL if numbers.dtype == np.bool_ else _NUMBERS[numbers.dtype.str[1:]]
    return struct.pack("<IQ", kind, len(values)) + numbers.tobytes()


def _numbers(key: str, value: Any) -> np.ndarray[Any, Any]:
    """One number or several, in the type that they are stored in."""
    found = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic) and found.dtype.str[1:] in _NUMBERS or found.dtype == np.bool_:
        return found
    if found.dtype.kind == "f":
        return found.astype("<f4")
    narrow = np.int32 if found.ndim or found.dtype.kind not in "iu" or found < 0 else np.uint32
    if found.dtype.kind not in "iu" or not np.array_equal(found.astype(narrow), found):
        raise FormatError(f"[gguf] {key}: wanted numbers of 32 bits, bools or texts; got {value!r:.80}")
    return found.astype(narrow)
