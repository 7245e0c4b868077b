"""Element types: scalars, and block types whose layouts live in `tensorgraph.ops.formats`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Literal

import ml_dtypes
import numpy as np

from tensorgraph.errors import DTypeError

Kind = Literal["float", "int", "bool", "block"]


@dataclass(frozen=True)
class DType:
    """An element type.

    A block type stores `block_size` consecutive elements of the last axis in `block_bytes` bytes; it has no NumPy type,
    and arrays of it are held as `uint8 [..., n_blocks * block_bytes]`.
    """

    name: str
    kind: Kind
    block_bytes: int
    block_size: int = 1
    numpy: np.dtype | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return self.name

    @property
    def is_block(self) -> bool:
        return self.kind == "block"

    @property
    def is_float(self) -> bool:
        """Whether values of this type are real numbers (block types are)."""
        return self.kind in ("float", "block")

    def size_bytes(self, n_elements: int) -> int:
        """Bytes that `n_elements` consecutive elements take; whole blocks only."""
        if n_elements % self.block_size:
            raise DTypeError(f"[{self.name}] wanted a multiple of {self.block_size} elements; got {n_elements}")
        return n_elements // self.block_size * self.block_bytes


def _scalar(name: str, kind: Kind, numpy: object) -> DType:
    dtype = np.dtype(numpy)  # type: ignore[call-overload]
    return DType(name, kind, dtype.itemsize, 1, dtype)


f64 = _scalar("f64", "float", np.float64)
f32 = _scalar("f32", "float", np.float32)
f16 = _scalar("f16", "float", np.float16)
bf16 = _scalar("bf16", "float", ml_dtypes.bfloat16)
i64 = _scalar("i64", "int", np.int64)
i32 = _scalar("i32", "int", np.int32)
i16 = _scalar("i16", "int", np.int16)
i8 = _scalar("i8", "int", np.int8)
u8 = _scalar("u8", "int", np.uint8)
boolean = _scalar("bool", "bool", np.bool_)

BY_NAME: dict[str, DType] = {d.name: d for d in (f64, f32, f16, bf16, i64, i32, i16, i8, u8, boolean)}


def register_dtype(dtype: DType) -> DType:
    """Make `dtype` known by its name; block formats call this."""
    if BY_NAME.setdefault(dtype.name, dtype) != dtype:
        raise DTypeError(f"[dtype] {dtype.name} is registered already, with another layout")
    return dtype


def as_dtype(value: DType | str | np.dtype | type) -> DType:
    """The element type that a name, a NumPy type or a DType means."""
    if isinstance(value, DType):
        return value
    if isinstance(value, str):
        if value.lower() not in BY_NAME:
            importlib.import_module("tensorgraph.ops.formats")  # block types are declared there
        if value.lower() in BY_NAME:
            return BY_NAME[value.lower()]
    try:
        wanted = np.dtype(value)
    except TypeError:
        wanted = None
    for dtype in BY_NAME.values():
        if wanted is not None and dtype.numpy == wanted:
            return dtype
    raise DTypeError(f"[dtype] wanted one of {', '.join(BY_NAME)}; got {value!r}")
