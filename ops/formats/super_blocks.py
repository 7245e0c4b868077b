"""Blocks of 256 whose groups have small integer scales of their own, times one f16: q2_k, q3_k, q4_k, q5_k, q6_k."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorgraph.ops.formats.bits import as_f16, extreme, in_order, pack, quotient, read_f16, scale_groups, unpack, whole
from tensorgraph.ops.formats.blocks import F32, U8, Parts, Scale, declare
from tensorgraph.ops.formats.searches import affine_scale, centred_scale, descended_scale


def _affine_groups(parts: Parts, d: F32, dmin: F32) -> F32:
    """Scale each group and subtract its minimum; d and dmin [n, 1]."""
    n, groups = parts.factors.shape
    scaled = scale_groups(parts.codes, parts.factors * d).reshape(n, groups, -1)
    scaled -= (parts.minima * dmin)[:, :, None]
    return scaled.reshape(parts.codes.shape)


def _centred_groups(parts: Parts, centre: int, d: F32) -> F32:
    """Scale each group of codes less their centre; d [n, 1]."""
    return scale_groups(parts.codes.view(np.int8) - np.int8(centre), parts.factors * d)


def _six_bit_pairs(raw: U8) -> tuple[U8, U8]:
    """Eight 6-bit scales and minima from 12 bytes: 0-3 in six bits of a byte, 4-7 in a nibble and the two bits left."""
    scales, minima, nibbles = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    top_scales, top_minima = (part >> np.uint8(6) << np.uint8(4) for part in (scales, minima))
    return (
        np.concatenate([scales & np.uint8(63), nibbles & np.uint8(15) | top_scales], axis=1),
        np.concatenate([minima & np.uint8(63), nibbles >> np.uint8(4) | top_minima], axis=1),
    )


def _as_six_bit_pairs(scales: U8, minima: U8) -> U8:
    """The inverse of `_six_bit_pairs`."""
    low, high = slice(0, 4), slice(4, 8)
    first, second = (part[:, low] | part[:, high] >> np.uint8(4) << np.uint8(6) for part in (scales, minima))
    nibbles = scales[:, high] & np.uint8(15) | minima[:, high] << np.uint8(4)
    return np.concatenate([first, second, nibbles], axis=1)


def _affine_codes(x: F32, weights: F32, bits: int, scale_bits: int, first: float, steps: int) -> tuple[list[U8], U8, U8]:
    """Codes of groups of a scale and a minimum, weights [n * groups, size]: the f16 of scales and of minima, the codes of both as
    [n, groups] each, and the codes [n, 256]."""
    groups = x.reshape(weights.shape)
    found = affine_scale(groups, weights, (1 << bits) - 1, first, steps, absolute=bits == 2)
    top = (1 << scale_bits) - 1
    heads, stored, scaled = [], [], []
    for each in found:
        each = each.reshape(len(x), -1)
        most = each.max(axis=1, keepdims=True)
        heads.append(as_f16(most / np.float32(top)))
        stored.append(whole(quotient(top, most) * each, 0, top).astype(np.uint8))
        scaled.append((read_f16(heads[-1], 0) * stored[-1]).reshape(-1, 1))
    codes = whole(quotient(groups + scaled[1], scaled[0]), 0, (1 << bits) - 1)
    return heads, np.concatenate(stored, axis=1), codes.reshape(x.shape).astype(np.uint8)


def _centred_codes(x: F32, scales: F32, bits: int, scale_bits: int) -> tuple[U8, NDArray[np.int8], U8]:
    """Codes of 16 groups of a scale, scales [n * 16, 1]: the f16 of all, the scales' codes [n, 16], and the codes [n, 256]."""
    scales, half, most = scales.reshape(len(x), 16), 1 << (bits - 1), 1 << (scale_bits - 1)
    inverse = quotient(-most, extreme(scales))
    head = as_f16(quotient(1, inverse))
    stored = whole(inverse * scales, -most, most - 1)
    codes = whole(quotient(x.reshape(-1, 16), (read_f16(head, 0) * stored).reshape(-1, 1)), -half, half - 1) + np.float32(half)
    return head, stored.astype(np.int8), codes.reshape(x.shape).astype(np.uint8)


def _q2_k(raw: U8) -> Parts:
    return Parts(unpack(raw[:, 16:80], 2, 32), raw[:, :16] & np.uint8(15), raw[:, :16] >> np.uint8(4))


def _decode_q2_k(raw: U8) -> F32:
    return _affine_groups(_q2_k(raw), read_f16(raw, 80), read_f16(raw, 82))


def _encode_q2_k(x: F32) -> U8:
    heads, stored, codes = _affine_codes(x, np.abs(x).reshape(-1, 16), 2, 4, -0.5, 15)
    return np.concatenate([stored[:, :16] | stored[:, 16:] << np.uint8(4), pack(codes, 2, 32), *heads], axis=1)


def _q3_k(raw: U8) -> Parts:
    scales = unpack(raw[:, 96:104], 4, 8) | unpack(raw[:, 104:108], 2, 4) << np.uint8(4)
    codes = unpack(raw[:, 32:96], 2, 32) | unpack(raw[:, :32], 1, 32) << np.uint8(2)
    return Parts(codes, scales.view(np.int8) - np.int8(32))


def _decode_q3_k(raw: U8) -> F32:
    return _centred_groups(_q3_k(raw), 4, read_f16(raw, 108))


def _encode_q3_k(x: F32) -> U8:
    head, scales, codes = _centred_codes(x, descended_scale(x.reshape(-1, 16), 4), 3, 6)
    stored = (scales + np.int8(32)).view(np.uint8)
    packed = [pack(stored, 4, 8), pack(stored >> np.uint8(4), 2, 4)]
    return np.concatenate([pack(codes >> np.uint8(2), 1, 32), pack(codes, 2, 32), *packed, head], axis=1)


def _by_size(x: F32) -> F32:
    """How much the elements of groups of 32 count: their root mean square and their own magnitude."""
    groups = x.reshape(-1, 32)
    weights: F32 = np.sqrt(in_order(groups * groups) / np.float32(32)) + np.abs(groups)
    return weights


def _q4_k(raw: U8) -> Parts:
    return Parts(unpack(raw[:, 16:], 4, 32), *_six_bit_pairs(raw[:, 4:16]))


def _decode_q4_k(raw: U8) -> F32:
    return _affine_groups(_q4_k(raw), read_f16(raw, 0), read_f16(raw, 2))


def _encode_q4_k(x: F32) -> U8:
    heads, stored, codes = _affine_codes(x, _by_size(x), 4, 6, -1.0, 20)
    return np.concatenate([*heads, _as_six_bit_pairs(stored[:, :8], stored[:, 8:]), pack(codes, 4, 32)], axis=1)


def _q5_k(raw: U8) -> Parts:
    codes = unpack(raw[:, 48:], 4, 32) | unpack(raw[:, 16:48], 1, 32) << np.uint8(4)
    return Parts(codes, *_six_bit_pairs(raw[:, 4:16]))


def _decode_q5_k(raw: U8) -> F32:
    return _affine_groups(_q5_k(raw), read_f16(raw, 0), read_f16(raw, 2))


def _encode_q5_k(x: F32) -> U8:
    heads, stored, codes = _affine_codes(x, _by_size(x), 5, 6, -0.5, 15)
    high = pack(codes >> np.uint8(4), 1, 32)
    return np.concatenate([*heads, _as_six_bit_pairs(stored[:, :8], stored[:, 8:]), high, pack(codes, 4, 32)], axis=1)


def _q6_k(raw: U8) -> Parts:
    codes = unpack(raw[:, :128], 4, 64) | unpack(raw[:, 128:192], 2, 32) << np.uint8(4)
    return Parts(codes, raw[:, 192:208].view(np.int8))


def _decode_q6_k(raw: U8) -> F32:
    return _centred_groups(_q6_k(raw), 32, read_f16(raw, 208))


def _encode_q6_k(x: F32) -> U8:
    head, scales, codes = _centred_codes(x, centred_scale(x.reshape(-1, 16), 32), 6, 8)
    return np.concatenate([pack(codes, 4, 64), pack(codes >> np.uint8(4), 2, 32), scales.view(np.uint8), head], axis=1)


q2_k = declare("q2_k", 256, 84, _decode_q2_k, _encode_q2_k, _q2_k, scales=(Scale(80), Scale(82, times=1.5)))
q3_k = declare("q3_k", 256, 110, _decode_q3_k, _encode_q3_k, _q3_k, scales=(Scale(108),))
q4_k = declare("q4_k", 256, 144, _decode_q4_k, _encode_q4_k, _q4_k, scales=(Scale(0), Scale(2, times=7.5)))
q5_k = declare("q5_k", 256, 176, _decode_q5_k, _encode_q5_k, _q5_k, scales=(Scale(0), Scale(2, times=15.5)))
q6_k = declare("q6_k", 256, 210, _decode_q6_k, _encode_q6_k, _q6_k, scales=(Scale(208),))
