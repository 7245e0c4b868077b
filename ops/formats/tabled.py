"""Four-bit codes that index a table of 16 values: mxfp4, nvfp4 (microscaling FP4), iq4_nl and iq4_xs."""

from __future__ import annotations

import numpy as np

from tensorgraph.ops.formats.bits import (
    as_f16,
    extreme,
    in_order,
    pack,
    quotient,
    read_f16,
    reciprocal,
    scale_groups,
    unpack,
    whole,
)
from tensorgraph.ops.formats.blocks import F32, U8, Parts, Scale, declare
from tensorgraph.ops.formats.searches import TINY, table_scale

# FP4 e2m1 times two, so that all values are whole; the scales below are halved in return.
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
FP4_MIDPOINTS = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)
IQ4: F32 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
IQ4_MIDPOINTS: F32 = (IQ4[1:] + IQ4[:-1]) / np.float32(2)

_E8M0_HALF: F32 = np.ldexp(np.float32(1), np.arange(256) - 128)


def _ue4m3_half() -> F32:
    """Half the value of every unsigned e4m3 byte: bias 7, the sign bit ignored, 0x7F (not a number) read as zero."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    value = np.where(exponent > 0, normal, np.ldexp(mantissa.astype(np.float64), -9))
    return np.where(code == 0x7F, 0, value / 2).astype(np.float32)


_UE4M3_HALF = _ue4m3_half()


def _mxfp4(raw: U8) -> Parts:
    return Parts(unpack(raw[:, 1:], 4, 16))


def _decode_mxfp4(raw: U8) -> F32:
    return scale_groups(FP4[_mxfp4(raw).codes], _E8M0_HALF[raw[:, :1]])


def _fp4_codes(x: F32, half: F32) -> U8:
    """The nearest of FP4 times half a scale, which may be zero; of two the smaller magnitude, and no -0."""
    parts = np.abs(x).reshape(*half.shape, x.shape[1] // half.shape[1]) / np.where(half > 0, half, np.inf)[:, :, None]
    magnitude = np.searchsorted(FP4_MIDPOINTS, parts.reshape(x.shape))
    return (magnitude + 8 * ((x < 0) & (magnitude > 0))).astype(np.uint8)


def _encode_mxfp4(x: F32) -> U8:
    exponent = np.abs(x).max(axis=1, keepdims=True).view(np.int32) >> 23
    scale = np.clip(exponent - 2, 0, 254).astype(np.uint8)  # the largest number's own exponent, less that of FP4's largest
    return np.concatenate([scale, pack(_fp4_codes(x, _E8M0_HALF[scale]), 4, 16)], axis=1)


def _decode_nvfp4(raw: U8) -> F32:
    return scale_groups(FP4[unpack(raw[:, 4:], 4, 8)], _UE4M3_HALF[raw[:, :4]])


def _encode_nvfp4(x: F32) -> U8:
    wanted = np.abs(x).reshape(len(x), 4, 16).max(axis=2) / np.float32(6)
    scale = (wanted.view(np.int32) + (1 << 19) >> 20) - (120 << 3)  # the exponent and three bits, halves up
    scale = np.where(scale < 15 << 3, scale, 126)  # ggml knows one scale from 256 on, 448
    few = np.minimum(np.floor(wanted * np.float32(512) + np.float32(0.5)), np.float32(7))  # subnormal
    scale = np.where(wanted < np.float32(2**-6), few, scale).astype(np.uint8)
    return np.concatenate([scale, pack(_fp4_codes(x, _UE4M3_HALF[scale]), 4, 8)], axis=1)


def _iq4_nl(raw: U8) -> Parts:
    return Parts(unpack(raw[:, 2:], 4, 16))


def _decode_iq4_nl(raw: U8) -> F32:
    return IQ4[_iq4_nl(raw).codes] * read_f16(raw, 0)


def _encode_iq4_nl(x: F32) -> U8:
    """Codes for the scale that makes the value of largest magnitude exact; then the scale that suits these codes best."""
    most, weights = extreme(x), x * x
    codes = np.searchsorted(IQ4_MIDPOINTS, x * reciprocal(most / IQ4[0]), side="right")
    values = IQ4[codes]
    scale = quotient(in_order(weights * values * x), in_order(weights * values * values))
    scale = np.where(np.abs(most) < TINY, np.float32(0), scale)
    return np.concatenate([as_f16(scale), pack(codes.astype(np.uint8), 4, 16)], axis=1)


def _iq4_xs(raw: U8) -> Parts:
    scales = unpack(raw[:, 4:8], 4, 1) | unpack(raw[:, 2:4], 2, 1) << np.uint8(4)
    return Parts(unpack(raw[:, 8:], 4, 16), scales.view(np.int8) - np.int8(32))


def _decode_iq4_xs(raw: U8) -> F32:
    parts = _iq4_xs(raw)
    return scale_groups(IQ4[parts.codes], parts.factors * read_f16(raw, 0))


def _encode_iq4_xs(x: F32) -> U8:
    scales = table_scale(x.reshape(-1, 32), IQ4, IQ4_MIDPOINTS).reshape(len(x), 8)
    d = extreme(scales) / np.float32(-32)
    signed = whole(scales * quotient(1, d), -32, 31)
    codes = np.searchsorted(IQ4_MIDPOINTS, x.reshape(len(x), 8, 32) * quotient(1, d * signed)[:, :, None], side="right")
    stored = (signed + 32).astype(np.uint8)
    packed = pack(codes.reshape(x.shape).astype(np.uint8), 4, 16)
    return np.concatenate([as_f16(d), pack(stored >> np.uint8(4), 2, 1), pack(stored, 4, 1), packed], axis=1)


mxfp4 = declare("mxfp4", 32, 17, _decode_mxfp4, _encode_mxfp4, _mxfp4, scales=(Scale(0, "e8m0"),))
nvfp4 = declare("nvfp4", 64, 36, _decode_nvfp4, _encode_nvfp4, scales=tuple(Scale(i, "ue4m3") for i in range(4)))
iq4_nl = declare("iq4_nl", 32, 18, _decode_iq4_nl, _encode_iq4_nl, _iq4_nl)
iq4_xs = declare("iq4_xs", 256, 136, _decode_iq4_xs, _encode_iq4_xs, _iq4_xs)
