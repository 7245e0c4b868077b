"""The few ways in which block formats lay bits out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorgraph.ops.formats.blocks import F32, U8


def unpack(raw: U8, bits: int, run: int) -> U8:
    """Split bytes into fields of `bits` bits: in each run of `run` bytes, the lowest fields of all bytes come first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = raw.reshape(len(raw), raw.shape[1] // run, 1, run) >> shifts
    fields &= np.uint8((1 << bits) - 1)
    return fields.reshape(len(raw), raw.shape[1] * 8 // bits)


def pack(fields: U8, bits: int, run: int) -> U8:
    """The inverse of `unpack`; bits of a field above the lowest `bits` are dropped."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = (fields & np.uint8((1 << bits) - 1)).reshape(len(fields), -1, 8 // bits, run) << shifts
    joined: U8 = np.bitwise_or.reduce(parts, axis=2)
    return joined.reshape(len(fields), fields.shape[1] * bits // 8)


def read_f16(raw: U8, at: int) -> F32:
    """The half-precision number at byte `at` of each block, as a column."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def as_f16(column: F32) -> U8:
    """The two bytes of each number of a column, rounded to half precision."""
    return column.astype("<f2").view(np.uint8)


def scale_groups(codes: NDArray[np.uint8] | NDArray[np.int8], scales: F32) -> F32:
    """Multiply each of the equal groups of a row by its own scale; scales [n, groups]."""
    n, groups = scales.shape
    x: F32 = codes.reshape(n, groups, codes.shape[1] // groups) * scales[:, :, None]
    return x.reshape(codes.shape)


def reciprocal(d: F32) -> F32:
    """1 / d, and 0 where that is not a finite number: such a block holds zeros only, to within f16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def nearest(q: F32) -> F32:
    """The nearest whole numbers, halves away from zero."""
    whole: F32 = np.trunc(q)
    rounded: F32 = whole + np.trunc(np.float32(2) * (q - whole))  # exactly: no sum with a half is rounded
    return rounded


def in_order(x: F32) -> F32:
    """The sum of each row, one element after another, as ggml adds; a column."""
    total: F32 = np.add.accumulate(x, axis=1)[:, -1:]
    return total
