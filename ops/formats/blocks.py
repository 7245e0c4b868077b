"""Block formats: what one is, and decoding and encoding by any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

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
class Parts:
    """Whole numbers that blocks are made of.

    Shapes: codes [n, block_size]: of each element, numbered as the type's table or from its least value on; factors [n, groups],
    which multiply the block's scale for 16 or 32 elements, and minima [n, groups], its minimum; empty where there are none.
    """

    codes: U8
    factors: NDArray[np.uint8] | NDArray[np.int8] = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    minima: U8 = field(default_factory=lambda: np.zeros((0, 0), np.uint8))


@dataclass(frozen=True)
class Scale:
    """A field of each block that its values are proportional to, together with the block's other such fields.

    Attributes:
        at: its first byte.
        kind: how it holds a number; `f16_nibbles`: in the highest four bits of each of four 16-bit words.
        times: what it holds where the first field holds 1, such as the middle code of a minimum that is subtracted.
    """

    at: int
    kind: Literal["f16", "e8m0", "ue4m3", "f16_nibbles"] = "f16"
    times: float = 1.0


@dataclass(frozen=True)
class BlockFormat:
    """One block type: `decode` is exact; `encode` rounds, and is None where nothing here encodes the type; `parts`
    are what decode computes with, None where nothing else needs them.

    Attributes:
        scales: the fields that make a block's values large or small, which all other bytes do not.

    Shapes: raw [n, block_bytes] <-> x [n, block_size], both contiguous.
    """

    dtype: DType
    decode: Callable[[U8], F32]
    encode: Callable[[F32], U8] | None = None
    parts: Callable[[U8], Parts] | None = None
    scales: tuple[Scale, ...] = (Scale(0),)


def declare(
    name: str,
    block_size: int,
    block_bytes: int,
    decode: Callable[[U8], F32],
    encode: Callable[[F32], U8] | None = None,
    parts: Callable[[U8], Parts] | None = None,
    scales: tuple[Scale, ...] = (Scale(0),),
    *,
    in_streams: bool = False,
) -> BlockFormat:
    """Register a block type under `name`, both as an element type and as a format; `in_streams`: rows of state may be of it."""
    dtype = register_dtype(DType(name, "block", block_bytes, block_size))
    registry.decoders.add(name, partial(decode_rows, dtype=dtype))
    if in_streams:
        registry.encoders.add(name, partial(encode_rows, dtype=dtype))
    return FORMATS.setdefault(name, BlockFormat(dtype, decode, encode, parts, scales))


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
    """Round finite values to a block type, each block by itself, as ggml does; to iq1, iq2 and iq3 with a search of our own.

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
