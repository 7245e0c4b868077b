"""Random blocks whose values have a wanted deviation: their codes are random bytes, and only their scales are chosen."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tensorgraph.dtypes import DType
from tensorgraph.ops.formats.bits import as_f16
from tensorgraph.ops.formats.blocks import F32, U8, BlockFormat, block_format, decode_rows

_SAMPLE = 1 << 18  # elements by which a scale is found


def random_blocks(dtype: DType | str, n: int, deviation: float, rng: np.random.Generator) -> U8:
    """Blocks of values of about this standard deviation and a mean near 0.

    Scales differ from block to block by up to an octave, and in sign where the type's scales have one.

    Shapes: -> [n, block_bytes].
    Raises: DTypeError.
    """
    form = block_format(dtype)
    return _drawn(form, n, _middle_scale(form.dtype.name, float(deviation)), rng)


@lru_cache(maxsize=1024)
def _middle_scale(name: str, deviation: float) -> float:
    """The scale in the middle of those by which values have this deviation, found by measuring samples."""
    form, scale = block_format(name), 1.0
    n = _SAMPLE // form.dtype.block_size
    for _ in range(4):  # once would do if scales were not rounded
        sample = decode_rows(_drawn(form, n, scale, np.random.Generator(np.random.SFC64(0))), name)
        scale *= deviation / float(np.sqrt(np.mean(np.square(sample, dtype=np.float64))))
    return scale


def _drawn(form: BlockFormat, n: int, scale: float, rng: np.random.Generator) -> U8:
    size_bytes = n * form.dtype.block_bytes
    raw = rng.integers(0, 1 << 64, -(-size_bytes // 8), np.uint64).view(np.uint8)[:size_bytes].reshape(n, form.dtype.block_bytes)
    drawn = rng.random((n, 1), np.float32) * np.float32(2) - np.float32(1)
    scales: F32 = np.copysign(np.exp2(np.abs(drawn) - np.float32(0.5)) * np.float32(scale), drawn)
    for field in form.scales:
        _PUT[field.kind](raw, field.at, scales * np.float32(field.times))
    return raw


def _put_f16(raw: U8, at: int, column: F32) -> None:
    raw[:, at : at + 2] = as_f16(column)


def _put_f16_nibbles(raw: U8, at: int, column: F32) -> None:
    bits = column.astype("<f2").view("<u2")
    for i in range(4):
        raw[:, at + 2 * i + 1] = raw[:, at + 2 * i + 1] & np.uint8(15) | (bits[:, 0] >> (4 * i) << 4).astype(np.uint8)


def _put_e8m0(raw: U8, at: int, column: F32) -> None:
    """Powers of two, by their exponent plus 127: the nearest on a logarithmic scale, the sign ignored."""
    raw[:, at] = np.clip(np.rint(np.log2(np.abs(column[:, 0]))) + 127, 0, 254)


def _put_ue4m3(raw: U8, at: int, column: F32) -> None:
    """Four bits of exponent, bias 7, and three of mantissa: the nearest, the sign ignored."""
    size = np.minimum(np.abs(column[:, 0]), np.float32(448))
    exponent = np.maximum(np.frexp(size)[1] - 1, -6)
    raw[:, at] = np.minimum((exponent + 6) * 8 + np.rint(np.ldexp(size, 3 - exponent)), 126)


_PUT = {"f16": _put_f16, "f16_nibbles": _put_f16_nibbles, "e8m0": _put_e8m0, "ue4m3": _put_ue4m3}
