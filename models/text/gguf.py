"""GGUF files, versions 2 and 3: memory-mapped, lazy, in one file or split, safe to open whatever they hold."""

from __future__ import annotations

import difflib
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from tensorgraph.dtypes import DType, bf16, f16, f32, f64, i8, i16, i32, i64
from tensorgraph.errors import FormatError, UnknownNameError
from tensorgraph.models.text.gguf_header import Header, MappedFile, Metadata, TensorEntry, read_header

_BLOCK_TYPES: dict[int, tuple[str, int, int]] = {  # id in the file: name, elements and bytes of a block
    2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 36), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292), 16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 29: ("iq1_m", 256, 56),
    34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18), 42: ("q2_0", 64, 18),
}  # fmt: skip
_SCALAR_TYPES = {0: f32, 1: f16, 24: i8, 25: i16, 26: i32, 27: i64, 28: f64, 30: bf16}

#: Every element type that a file may hold, by ggml's number; not all of the block types can be decoded.
GGML_TYPES: Mapping[int, DType] = MappingProxyType(
    _SCALAR_TYPES | {number: DType(name, "block", n_bytes, n) for number, (name, n, n_bytes) in _BLOCK_TYPES.items()}
)
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor; `shape` in NumPy order, `offset` in bytes from the start of file number `file_index`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    file_index: int


class GGUF:
    """An open model file, or all the parts of a split one.

    `metadata`, the first part's, decodes a value at first access: int, float, bool, str, NumPy array of numbers, list.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, headers: list[Header]) -> None:
        self._files = [header.file for header in headers]
        self._data_starts = [header.data_start for header in headers]
        self.paths = tuple(file.path for file in self._files)
        self.version = headers[0].version
        self.metadata = headers[0].metadata
        tensors: dict[str, TensorInfo] = {}
        for index, header in enumerate(headers):
            for entry, info in _tensor_infos(header, index):
                if info.name in tensors:
                    raise header.file.error(entry.at, f"tensor {info.name[:80]!r} is in an earlier part as well")
                tensors[info.name] = info
        self.tensors = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | Path) -> GGUF:
        """Open a file; of a split model, any part opens all of them.

        Raises: InputError where there is no such file; FormatError with the offset in bytes where it is damaged.
        """
        header = read_header(Path(path))
        headers = _all_parts(header) if _parts(header) > 1 else [header]
        gguf = cls(headers)
        wanted = "split.tensors.count"
        if len(headers) > 1 and wanted in headers[0].metadata:
            n_tensors = headers[0].metadata.integer(wanted)
            if n_tensors != len(gguf.tensors):
                at = headers[0].metadata.at(wanted)
                raise headers[0].file.error(at, f"{wanted} is {n_tensors}; the parts have {len(gguf.tensors)} tensors")
        return gguf

    @property
    def architecture(self) -> str:
        """The architecture's name, as in `general.architecture`."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise FormatError(f"[gguf] {self.paths[0]}: wanted a name in general.architecture; got {name!r}")
        return name

    @property
    def mapped(self) -> list[tuple[Path, mmap.mmap, int]]:
        """The path of each file, its content, and how many bytes lie before its tensors."""
        return [(file.path, file.content, start) for file, start in zip(self._files, self._data_starts, strict=True)]

    def data(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor's bytes as they lie in the file, read-only and not copied.

        Shapes: `shape` of the tensor; of block types uint8 [..., row_bytes].
        Raises: UnknownNameError; InputError once the file is closed.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, 5)
            raise UnknownNameError(f"[gguf] {self.paths[0]} has no tensor {name!r}; near: {', '.join(near) or 'none'}")
        info = self.tensors[name]
        shape, numpy = info.shape, info.dtype.numpy
        if numpy is None:
            shape, numpy = (*shape[:-1], info.dtype.size_bytes(shape[-1])), np.dtype(np.uint8)
        return np.ndarray(shape, numpy, self._files[info.file_index].content, info.offset)

    def close(self) -> None:
        """Let go of the files; arrays that were handed out stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> GGUF:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _tensor_infos(header: Header, file_index: int) -> list[tuple[TensorEntry, TensorInfo]]:
    """Types, shapes and places of a file's tensors, after checks that they lie in it and apart from each other."""
    infos = [(entry, _tensor_info(header, entry, file_index)) for entry in header.tensors]
    taken = header.data_start
    for entry, info in sorted(infos, key=lambda pair: pair[1].offset):
        if info.offset < taken:
            raise header.file.error(entry.at, f"tensor {info.name[:80]!r} overlaps the one stored before it")
        taken = info.offset + info.size_bytes
    return infos


def _tensor_info(header: Header, entry: TensorEntry, file_index: int) -> TensorInfo:
    file: MappedFile = header.file
    what = f"tensor {entry.name[:80]!r}"
    dtype = GGML_TYPES.get(entry.type_id)
    if dtype is None:
        raise file.error(entry.at, f"{what} has the unknown ggml type {entry.type_id}")
    if 0 in entry.dims:
        raise file.error(entry.at, f"{what} has no elements: dimensions {list(entry.dims)}")
    if (entry.dims[0] if entry.dims else 1) % dtype.block_size:
        raise file.error(
            entry.at, f"{what} of type {dtype} wants rows of a multiple of {dtype.block_size}; got {list(entry.dims)}"
        )
    size_bytes = dtype.size_bytes(math.prod(entry.dims))
    offset = header.data_start + entry.offset
    if entry.offset % header.alignment:
        raise file.error(entry.at, f"{what} has offset {entry.offset}, not a multiple of {header.alignment}")
    if offset + size_bytes > file.size_bytes:
        raise file.error(entry.at, f"{what} ends at byte {offset + size_bytes} of a file of {file.size_bytes}")
    return TensorInfo(entry.name, dtype, entry.dims[::-1], offset, size_bytes, file_index)


def _parts(header: Header) -> int:
    return header.metadata.integer("split.count") if "split.count" in header.metadata else 1


def _all_parts(given: Header) -> list[Header]:
    """The headers of all parts, found by their names beside the one given."""
    path, n_parts = given.file.path, _parts(given)
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != n_parts:
        at = given.metadata.at("split.count")
        raise given.file.error(at, f"one of {n_parts} parts wants a name like x-00001-of-{n_parts:05}.gguf")
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{n_parts:05}.gguf") for number in range(1, n_parts + 1)]
    for part in paths:
        if not part.exists():
            raise FormatError(f"[gguf] {path} is one of {n_parts} parts; {part} is missing")
    headers = [given if part == path else read_header(part) for part in paths]
    for number, header in enumerate(headers):
        metadata: Metadata = header.metadata
        found = metadata.integer("split.no") if "split.no" in metadata else None
        if (found, _parts(header)) != (number, n_parts):
            raise FormatError(
                f"[gguf] {header.file.path} wants split.no {number} and split.count {n_parts}; "
                f"got {found} and {_parts(header)}"
            )
    return headers
