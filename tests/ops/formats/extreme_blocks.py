"""Blocks whose codes, factors and scales are the largest and smallest that their type has, or no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorgraph.ops.formats import block_format

Array = np.ndarray[Any, Any]

FACTORS = {
    "q2_k": (0, 16),
    "q3_k": (96, 108),
    "q4_k": (4, 16),
    "q5_k": (4, 16),
    "q6_k": (192, 208),
    "iq4_xs": (2, 8),
    "iq1_s": (34, 50),
    "iq1_m": (48, 56),
    "iq2_xs": (66, 74),
    "iq2_s": (74, 82),
    "iq3_xxs": (66, 98),
    "iq3_s": (106, 110),
}
"""Which bytes of a block hold factors of its scale, of types that have some."""
PATTERNS = (0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0)
UNITS = {"f16_nibbles": 8.0, "e8m0": 128, "ue4m3": 0x40}
"""Scales by which all values are whole: eighths times 8, halves times 2."""


def with_scales(name: str, raw: Array, *values: Array | float) -> Array:
    """Blocks with other scales, one for each field or one for all: a number as f16, else a byte."""
    raw, fields = raw.copy(), block_format(name).scales
    for field, given in zip(fields, values * len(fields) if len(values) == 1 else values, strict=True):
        if field.kind in ("e8m0", "ue4m3"):
            raw[..., field.at] = given
            continue
        bits = np.broadcast_to(np.asarray(given, np.float16), raw.shape[:-1]).copy().view(np.uint16)
        for i in range(4 if field.kind == "f16_nibbles" else 0):
            at = field.at + 2 * i + 1
            raw[..., at] = raw[..., at] & 15 | (bits >> 4 * i & 15) << 4
        if field.kind == "f16":
            raw[..., field.at : field.at + 2] = bits[..., None].view(np.uint8)
    return raw


def extreme_codes(name: str, height: int, width: int) -> Array:
    """Codes and factors at their ends, each with each, in the first rows, any in the others; all values whole.

    Shapes: -> [height, blocks, block_bytes].
    """
    form = block_format(name)
    raw = _random(name, height, width, seed=4)
    n = len(PATTERNS)
    ends = np.stack(np.broadcast_arrays(np.array(PATTERNS)[:, None], np.array(PATTERNS)), -1).reshape(n * n, 2)[:height]
    raw[: n * n] = ends[:, 0, None, None]
    first, stop = FACTORS.get(name, (0, 0))
    raw[: n * n, :, first:stop] = ends[:, 1, None, None]
    return with_scales(name, raw, UNITS.get(form.scales[0].kind, 8.0 if name[:3] in ("iq1", "iq2", "iq3") else 1.0))


_F16 = (0.0, -0.0, 2.0**-24, -(2.0**-15), 65504.0, -65504.0, np.inf, -np.inf, np.nan, 1.0)
_BYTES = {"e8m0": (0, 1, 2, 3, 100, 127, 128, 230), "ue4m3": (0, 1, 7, 8, 0x3F, 0x7E, 0x7F, 0x80, 0xFF)}


def special_scales(name: str, height: int, width: int) -> Array:
    """Any codes, and in each row the next of the scales that a type can hold: zeros, subnormal and infinite ones and none; the
    minima are those of other rows.

    Shapes: -> [height, blocks, block_bytes].
    """
    fields = block_format(name).scales
    some = np.array(_BYTES.get(fields[0].kind, _F16))
    columns = [some[np.arange(height) * (n + 1) % len(some)][:, None] for n in range(len(fields))]
    return with_scales(name, _random(name, height, width, seed=8), *columns)


def _random(name: str, height: int, width: int, seed: int) -> Array:
    dtype = block_format(name).dtype
    return np.random.default_rng(seed).integers(0, 256, (height, width // dtype.block_size, dtype.block_bytes), np.uint8)
