"""Block formats: what one is, and decoding and encoding by any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph import registry
from tensorgraph.dtypes import DType, register_dtype
from tensorgraph.errors import DTypeError, ShapeError

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

FORMATS: dict[str, BlockFormat] = {}

_CHUNK = 1 << 17  # elements handled at once, so that all intermediates stay in the cache


@dataclass(frozen=True)
class BlockFormat:
    """One block type: `decode` is exact; `encode` rounds as ggml does, and is None where nothing here encodes the type.

    Shapes: raw [n, block_bytes] <-> x [n, block_size], both contiguous.
    """

    dtype: DType
    decode: Callable[[U8], F32]
    encode: Callable[[F32], U8] | None = None


def declare(
    name: str,
    block_size: int,
    block_bytes: int,
    decode: Callable[[U8], F32],
    encode: Callable[[F32], U8] | None = None,
    *,
    in_streams: bool = False,
) -> BlockFormat:
    """Register a block type under `name`, both as an element type and as a format; `in_streams`: rows of state may be of it."""
    dtype = register_dtype(DType(name, "block", block_bytes, block_size))
    registry.decoders.add(name, partial(decode_rows, dtype=dtype))
    if in_streams:
        registry.encoders.add(name, partial(encode_rows, dtype=dtype))
    return FORMATS.setdefault(name, BlockFormat(dtype, decode, encode))


def block_format(dtype: DType | str) -> BlockFormat:
    """The format of a block type.

    Raises: DTypeError for element types that have none.
    """
    name = dtype.name if isinstance(dtype, DType) else dtype.lower()
    if name not in FORMATS:
        raise DTypeError(f"[format] wanted a block type, one of {', '.join(FORMATS)}; got {name}")
    return FORMATS[name]


def decode_rows(raw: U8, dtype: DType | str) -> F32:
    """The exact values of whole blocks.

    Shapes: raw [..., row_bytes] -> [..., n], with n = row_bytes / block_bytes * block_size.
    Raises: DTypeError, ShapeError.
    """
    form = block_format(dtype)
    if raw.dtype != np.uint8:
        raise DTypeError(f"[decode {form.dtype}] wanted uint8; got {raw.dtype}")
    return _by_blocks("decode", form, raw, np.float32, form.decode)


def encode_rows(x: NDArray[np.floating], dtype: DType | str) -> U8:
    """Round finite values to a block type, each block by itself, as ggml does.

    Shapes: x [..., n] -> [..., row_bytes].
    Raises: DTypeError where nothing here encodes the type, ShapeError.
    """
    form = block_format(dtype)
    if form.encode is None:
        able = ", ".join(name for name, each in FORMATS.items() if each.encode)
        raise DTypeError(f"[encode] {form.dtype} can only be decoded; types that can be encoded: {able}")
    encode_blocks = form.encode
    return _by_blocks("encode", form, x, np.uint8, lambda blocks: encode_blocks(blocks.astype(np.float32)))


def _by_blocks(what: str, form: BlockFormat, given: NDArray[Any], dtype: type, convert: Callable[[Any], Any]) -> NDArray[Any]:
    sizes = form.dtype.block_bytes, form.dtype.block_size
    before, after = sizes if what == "decode" else sizes[::-1]
    if given.ndim == 0 or given.shape[-1] % before:
        unit = "bytes" if what == "decode" else "elements"
        raise ShapeError(f"[{what} {form.dtype}] wanted rows of a multiple of {before} {unit}; got {given.shape}")
    blocks = given.reshape(given.size // before, before)
    result: NDArray[Any] = np.empty((len(blocks), after), dtype)
    step = _CHUNK // form.dtype.block_size
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite or undefined scale gives such values, as in ggml
        for start in range(0, len(blocks), step):
            result[start : start + step] = convert(blocks[start : start + step])
    return result.reshape(*given.shape[:-1], given.shape[-1] // before * after)
