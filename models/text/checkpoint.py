"""Folders as published on model hubs: config.json, safetensors files in one or several parts, tokenizer files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tensorgraph.dtypes import DType, as_dtype, bf16, f16, f32, f64
from tensorgraph.errors import FormatError, InputError, UnknownNameError
from tensorgraph.models.names import Made
from tensorgraph.models.text.json_file import read_object

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TYPES = {"F64": f64, "F32": f32, "F16": f16, "BF16": bf16} | {f"{k}{n}": as_dtype(f"{k.lower()}{n}") for k, n in
          (("I", 64), ("I", 32), ("I", 16), ("I", 8), ("U", 8))}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a part: its file, its shape, and its type by safetensors' name."""

    file: Path
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class WeightInfo:
    """A weight that is made of stored tensors."""

    shape: tuple[int, ...]
    dtype: DType


class Checkpoint:
    """An open folder. Tensors are read, and copied, when they are asked for.

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
        self._files: dict[Path, Any] = {}
        self._open = True

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a folder; the index, where there is one, says which parts there are.

        Raises: InputError where a file is missing; FormatError where one is damaged or does not fit the others.
        """
        folder = Path(folder)
        config = read_object(folder / CONFIG)
        if (folder / INDEX).is_file():
            listed = read_object(folder / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(part, str) for part in listed.values()):
                raise FormatError(f"[checkpoint] wanted a weight_map of file names in {folder / INDEX}; got {listed!r:.60}")
            parts = {name: _beside(folder, part) for name, part in listed.items()}
        else:
            parts = dict.fromkeys(_names(folder / WHOLE), folder / WHOLE)
        checkpoint = cls(folder, config, {})
        checkpoint.stored = MappingProxyType({name: checkpoint._stored(name, part) for name, part in parts.items()})
        return checkpoint

    @property
    def unused(self) -> list[str]:
        """Tensors that no weight is made of."""
        return sorted(self.stored.keys() - {name for made in self._made.values() for name in made.of})

    def name(self, made: Mapping[str, Made]) -> None:
        """Give weights the names of model files; those of which a tensor is missing are not there.

        Raises: FormatError where tensors of a weight do not fit together, or are of a type that is not read.
        """
        self._made = {name: how for name, how in made.items() if all(source in self.stored for source in how.of)}
        self.tensors = MappingProxyType({name: self._info(name, how) for name, how in self._made.items()})

    def data(self, name: str) -> np.ndarray[Any, Any]:
        """A weight, made of the tensors that it is stored as.

        Raises: UnknownNameError; InputError once the folder is closed.
        """
        if name not in self._made:
            raise UnknownNameError(f"[checkpoint] {self.folder} has no weight {name!r}")
        made, info = self._made[name], self.tensors[name]
        value = made.make([self._read(source) for source in made.of])
        return np.ascontiguousarray(value, info.dtype.numpy)

    def close(self) -> None:
        """Let go of the files; arrays that were handed out stay valid."""
        self._files.clear()
        self._open = False

    def _info(self, name: str, made: Made) -> WeightInfo:
        tensors = [self.stored[source] for source in made.of]
        if len({(t.shape, t.kind) for t in tensors}) > 1:
            raise FormatError(f"[checkpoint] {self.folder}: {made.of[0]}, ... differ in shape or type; {name} is made of them")
        if tensors[0].kind not in _TYPES:
            raise FormatError(f"[checkpoint] {tensors[0].file}: {made.of[0]} is of type {tensors[0].kind}, which is not read")
        shape, dtype = made.shape([t.shape for t in tensors]), made.dtype or _TYPES[tensors[0].kind]
        return WeightInfo(shape, f32 if len(shape) == 1 and dtype.is_float else dtype)

    def _stored(self, name: str, part: Path) -> StoredTensor:
        try:
            found = self._file(part).get_slice(name)
            return StoredTensor(part, tuple(found.get_shape()), str(found.get_dtype()))
        except SafetensorError as error:
            raise FormatError(f"[checkpoint] {part}: the tensor {name!r} that is listed is not there: {error}") from None

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        if not self._open:
            raise InputError(f"[checkpoint] {self.folder} is closed")
        array: np.ndarray[Any, Any] = self._file(self.stored[name].file).get_tensor(name)
        return array

    def _file(self, part: Path) -> Any:
        if part not in self._files:
            self._files[part] = _opened(part)
        return self._files[part]


def _opened(part: Path) -> Any:
    if not part.is_file():
        raise InputError(f"[checkpoint] there is no file {part}")
    try:
        return safe_open(part, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"[checkpoint] {part} is no whole safetensors file: {error}") from None


def _names(part: Path) -> list[str]:
    return list(_opened(part).keys())


def _beside(folder: Path, part: str) -> Path:
    """A part lies in the folder itself: an index of somebody else's may name anything."""
    if part != os.path.basename(part) or part in ("", ".", ".."):
        raise FormatError(f"[checkpoint] wanted names of files beside {folder / INDEX} in it; got {part!r}")
    return folder / part
