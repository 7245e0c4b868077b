"""Block formats: what one is, and decoding and encoding by any of them. `tensorgraph.ops.formats` declares them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dtypes import DType, register_dtype
from tensorgraph.errors import DTypeError, ShapeError

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

FORMATS: dict[str, BlockFormat] = {}


@dataclass(frozen=True)
class BlockFormat:
    """One block type: `decode` is exact; `encode` rounds as ggml does, and is None where nothing here encodes the type.

    Shapes: raw [n, block_bytes] <-> x [n, block_size], both contiguous.
    """

    dtype: DType
    decode: Callable[[U8], F32]
    encode: Callable[[F32], U8] | None = None


def declare(
    name: str, block_size: int, block_bytes: int, decode: Callable[[U8], F32], encode: Callable[[F32], U8] | None = None
) -> BlockFormat:
    """Register a block type under `name`, both as an element type and as a format."""
    dtype = register_dtype(DType(name, "block", block_bytes, block_size))
    return FORMATS.setdefault(name, BlockFormat(dtype, decode, encode))


_CHUNK = 1 << 17  # elements handled at once, so that all intermediates stay in the cache


def block_format(dtype: DType | str) -> BlockFormat:
    """The format of a block type.

    Raises: DTypeError for element types that have none.
    """
    name = dtype.name if isinstance(dtype, DType) else dtype.lower()
    if name not in FORMATS:
        importlib.import_module("tensorgraph.ops.formats")
    if name not in FORMATS:
        raise DTypeError(f"[format] wanted a block type, one of {', '.join(FORMATS)}; got {name}")
    return FORMATS[name]


def decode(raw: U8, dtype: DType | str) -> F32:
    """The exact values of whole blocks.

    Shapes: raw [..., row_bytes] -> [..., n], with n = row_bytes / block_bytes * block_size.
    Raises: DTypeError, ShapeError.
    """
    form = block_format(dtype)
    block_bytes, block_size = form.dtype.block_bytes, form.dtype.block_size
    if raw.dtype != np.uint8:
        raise DTypeError(f"[decode {form.dtype}] wanted uint8; got {raw.dtype}")
    if raw.ndim == 0 or raw.shape[-1] % block_bytes:
        raise ShapeError(f"[decode {form.dtype}] wanted rows of a multiple of {block_bytes} bytes; got {raw.shape}")
    blocks = raw.reshape(raw.size // block_bytes, block_bytes)
    x = np.empty((len(blocks), block_size), np.float32)
    step = _CHUNK // block_size
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite or undefined scale gives such values, as in ggml
        for start in range(0, len(blocks), step):
            x[start : start + step] = form.decode(blocks[start : start + step])
    return x.reshape(*raw.shape[:-1], raw.shape[-1] // block_bytes * block_size)


def encode(x: NDArray[np.floating], dtype: DType | str) -> U8:
    """Round finite values to a block type, each block by itself, as ggml does.

    Shapes: x [..., n] -> [..., row_bytes].
    Raises: DTypeError where nothing here encodes the type, ShapeError.
    """
    form = block_format(dtype)
    block_bytes, block_size = form.dtype.block_bytes, form.dtype.block_size
    if form.encode is None:
        able = ", ".join(name for name, each in FORMATS.items() if each.encode)
        raise DTypeError(f"[encode] {form.dtype} can only be decoded; types that can be encoded: {able}")
    if x.ndim == 0 or x.shape[-1] % block_size:
        raise ShapeError(f"[encode {form.dtype}] wanted rows of a multiple of {block_size} elements; got {x.shape}")
    blocks = x.reshape(x.size // block_size, block_size)
    raw = np.empty((len(blocks), block_bytes), np.uint8)
    step = _CHUNK // block_size
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            raw[start : start + step] = form.encode(blocks[start : start + step].astype(np.float32))
    return raw.reshape(*x.shape[:-1], x.shape[-1] // block_size * block_bytes)
