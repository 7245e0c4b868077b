"""Four-bit codes that index a table of 16 values: mxfp4, nvfp4 (microscaling FP4), iq4_nl and iq4_xs."""

from __future__ import annotations

import numpy as np

from tensorgraph.ops.formats.bits import pack, read_f16, scale_groups, unpack
from tensorgraph.ops.formats.blocks import F32, U8, declare

# FP4 e2m1 times two, so that all values are whole; the scales below are halved in return.
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_FP4_MIDPOINTS = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)

_E8M0_HALF: F32 = np.ldexp(np.float32(1), np.arange(256) - 128)


def _ue4m3_half() -> F32:
    """Half the value of every unsigned e4m3 byte: bias 7, the sign bit ignored, 0x7F (not a number) read as zero."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    value = np.where(exponent > 0, normal, np.ldexp(mantissa.astype(np.float64), -9))
    return np.where(code == 0x7F, 0, value / 2).astype(np.float32)


_UE4M3_HALF = _ue4m3_half()


def _decode_mxfp4(raw: U8) -> F32:
    return scale_groups(_FP4[unpack(raw[:, 1:], 4, 16)], _E8M0_HALF[raw[:, :1]])


def _encode_mxfp4(x: F32) -> U8:
    largest = np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(largest)) + np.float32(125)
    scale = np.clip(exponent, 0, 254).astype(np.uint8)
    magnitude = np.searchsorted(_FP4_MIDPOINTS, np.abs(x) / _E8M0_HALF[scale])  # a tie goes to the smaller magnitude
    codes = magnitude + 8 * ((x < 0) & (magnitude > 0))
    return np.concatenate([scale, pack(codes.astype(np.uint8), 4, 16)], axis=1)


def _decode_nvfp4(raw: U8) -> F32:
    return scale_groups(_FP4[unpack(raw[:, 4:], 4, 8)], _UE4M3_HALF[raw[:, :4]])


def _decode_iq4_nl(raw: U8) -> F32:
    return _IQ4[unpack(raw[:, 2:], 4, 16)] * read_f16(raw, 0)


def _decode_iq4_xs(raw: U8) -> F32:
    scales = unpack(raw[:, 4:8], 4, 1) | unpack(raw[:, 2:4], 2, 1) << np.uint8(4)
    scales_f32 = (scales.view(np.int8) - np.int8(32)) * read_f16(raw, 0)
    return scale_groups(_IQ4[unpack(raw[:, 8:], 4, 16)], scales_f32)


mxfp4 = declare("mxfp4", 32, 17, _decode_mxfp4, _encode_mxfp4)
nvfp4 = declare("nvfp4", 64, 36, _decode_nvfp4)
iq4_nl = declare("iq4_nl", 32, 18, _decode_iq4_nl)
iq4_xs = declare("iq4_xs", 256, 136, _decode_iq4_xs)
