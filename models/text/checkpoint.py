"""Folders as published on model hubs: config.json, safetensors files in one or several parts, tokenizer files."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tensorgraph.dtypes import DType, bf16, f16, f32, f64, i8, i16, i32, i64, u8
from tensorgraph.errors import FormatError, InputError, UnknownNameError
from tensorgraph.models.names import Made
from tensorgraph.models.text.json_file import read_object

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TYPES = {
    **{"F64": f64, "F32": f32, "F16": f16, "BF16": bf16, "I64": i64, "I32": i32, "I16": i16, "I8": i8, "U8": u8},
    "F8_E8M0": u8,  # exponents, which weights are made of
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a part: its file, its shape, its type by safetensors' name, and where it starts, in bytes."""

    file: Path
    shape: tuple[int, ...]
    kind: str
    offset: int


@dataclass(frozen=True)
class WeightInfo:
    """A weight that is made of stored tensors."""

    shape: tuple[int, ...]
    dtype: DType


class Checkpoint:
    """An open folder; its parts are memory-mapped.

    Attributes:
        folder: where it lies.
        config: what config.json says.
        stored: its tensors, by the names they were published under.
        tensors: its weights, by the names of model files; none until `name` is called.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
        self.folder, self.config, self.stored = folder, config, stored
        self.tensors: Mapping[str, WeightInfo] = {}
        self._made: dict[str, Made] = {}
        self._files: dict[Path, mmap.mmap] | None = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a folder; the index, where there is one, says which parts there are.

        Raises: InputError where a file is missing; FormatError where one is damaged or does not fit the others.
        """
        folder = Path(folder)
        config = read_object(folder / CONFIG)
        if not (folder / INDEX).is_file():
            return cls(folder, config, MappingProxyType(_contents(folder / WHOLE)))
        listed = read_object(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(part, str) for part in listed.values()):
            raise FormatError(f"[checkpoint] wanted a weight_map of file names in {folder / INDEX}; got {listed!r:.60}")
        parts = {name: _beside(folder, part) for name, part in listed.items()}
        held = {part: _contents(part) for part in sorted({*parts.values()})}
        for name, part in parts.items():
            if name not in held[part]:
                raise FormatError(f"[checkpoint] {part} has no tensor {name!r}, which {folder / INDEX} says it has")
        return cls(folder, config, MappingProxyType({name: held[part][name] for name, part in parts.items()}))

    @property
    def unused(self) -> list[str]:
        """Tensors that no weight is made of."""
        return sorted(self.stored.keys() - {name for made in self._made.values() for name in made.of})

    def name(self, made: Mapping[str, Made]) -> None:
        """Give weights the names of model files; those of which a tensor is missing are not there.

        Raises: FormatError where tensors of a weight do not fit together, or are of a type that is not read.
        """
        self._made = {}
        for name, first in made.items():
            how: Made | None = first
            while how is not None and not self.stored.keys() >= set(how.of):
                how = how.otherwise
            if how is not None:
                self._made[name] = how
        self.tensors = MappingProxyType({name: self._info(name, how) for name, how in self._made.items()})

    def data(self, name: str) -> np.ndarray[Any, Any]:
        """A weight, made of the tensors that it is stored as.

        Raises: UnknownNameError; InputError once the folder is closed.
        """
        if name not in self._made:
            raise UnknownNameError(f"[checkpoint] {self.folder} has no weight {name!r}")
        made, info = self._made[name], self.tensors[name]
        value = made.make([self._read(source) for source in made.of])
        last = info.shape[-1:] if not info.dtype.is_block else (info.dtype.size_bytes(info.shape[-1]),)
        if value.shape != (*info.shape[:-1], *last):
            given = list(self.stored[made.of[0]].shape)
            raise FormatError(f"[checkpoint] {self.folder}: {name} cannot be made of {made.of[0]}, ..., {given}")
        return np.ascontiguousarray(value, info.dtype.numpy)

    def close(self) -> None:
        """Let go of the files; arrays that were handed out stay valid."""
        self._files = None

    def _info(self, name: str, made: Made) -> WeightInfo:
        tensors = [self.stored[source] for source in made.of]
        if len({(t.shape, t.kind) for t in tensors}) > made.kinds:
            raise FormatError(f"[checkpoint] {self.folder}: {made.of[0]}, ... differ in shape or type; {name} is made of them")
        for source, tensor in zip(made.of, tensors, strict=True):
            if tensor.kind not in _TYPES:
                raise FormatError(f"[checkpoint] {tensor.file}: {source} is of type {tensor.kind}, which is not read")
        dtype = made.dtype or _TYPES[tensors[0].kind]
        try:
            shape = made.shape([t.shape for t in tensors])
        except (IndexError, ValueError):
            given = ", ".join(str(list(shape)) for shape in dict.fromkeys(t.shape for t in tensors))
            raise FormatError(f"[checkpoint] {self.folder}: {name} cannot be made of {made.of[0]}, ..., {given}") from None
        return WeightInfo(shape, f32 if len(shape) == 1 and dtype.is_float else dtype)

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        if self._files is None:
            raise InputError(f"[checkpoint] {self.folder} is closed")
        tensor = self.stored[name]
        if tensor.file not in self._files:
            with tensor.file.open("rb") as stream:
                self._files[tensor.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(tensor.shape, _TYPES[tensor.kind].numpy, self._files[tensor.file], tensor.offset)


def _contents(part: Path) -> dict[str, StoredTensor]:
    """What a part holds. The library checks all of its header; it gives no places, which are read here."""
    if not part.is_file():
        raise InputError(f"[checkpoint] there is no file {part}")
    try:
        with safe_open(part, framework="numpy"), part.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"[checkpoint] {part} is no whole safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(part, tuple(t["shape"]), t["dtype"], 8 + length + t["data_offsets"][0]) for name, t in header.items()
    }


def _beside(folder: Path, part: str) -> Path:
    """A part lies in the folder itself: an index of somebody else's may name anything."""
    if part != os.path.basename(part) or part in ("", ".", ".."):
        raise FormatError(f"[checkpoint] wanted names of files beside {folder / INDEX} in it; got {part!r}")
    return folder / part
