"""Blocks of 256 whose groups have small integer scales of their own, times one f16: q2_k, q3_k, q4_k, q5_k, q6_k."""

from __future__ import annotations

import numpy as np

from tensorgraph.ops.formats.bits import read_f16, scale_groups, unpack
from tensorgraph.ops.formats.blocks import F32, U8, declare


def _affine_groups(q: U8, d: F32, dmin: F32) -> F32:
    """Scale each group and subtract its minimum; q [n, 256], d and dmin [n, groups]."""
    n, groups = d.shape
    scaled = scale_groups(q, d).reshape(n, groups, -1)
    scaled -= dmin[:, :, None]
    return scaled.reshape(q.shape)


def _six_bit_pairs(raw: U8) -> tuple[U8, U8]:
    """Eight 6-bit scales and minima from 12 bytes: 0-3 in six bits of a byte, 4-7 in a nibble and the two bits left."""
    scales, minima, nibbles = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    top_scales, top_minima = (part >> np.uint8(6) << np.uint8(4) for part in (scales, minima))
    return (
        np.concatenate([scales & np.uint8(63), nibbles & np.uint8(15) | top_scales], axis=1),
        np.concatenate([minima & np.uint8(63), nibbles >> np.uint8(4) | top_minima], axis=1),
    )


def _decode_q2_k(raw: U8) -> F32:
    d = (raw[:, :16] & np.uint8(15)) * read_f16(raw, 80)
    dmin = (raw[:, :16] >> np.uint8(4)) * read_f16(raw, 82)
    return _affine_groups(unpack(raw[:, 16:80], 2, 32), d, dmin)


def _decode_q3_k(raw: U8) -> F32:
    scales = unpack(raw[:, 96:104], 4, 8) | unpack(raw[:, 104:108], 2, 4) << np.uint8(4)
    q = unpack(raw[:, 32:96], 2, 32) | unpack(raw[:, :32], 1, 32) << np.uint8(2)
    return scale_groups(q.view(np.int8) - np.int8(4), (scales.view(np.int8) - np.int8(32)) * read_f16(raw, 108))


def _decode_q4_k(raw: U8) -> F32:
    scales, minima = _six_bit_pairs(raw[:, 4:16])
    return _affine_groups(unpack(raw[:, 16:], 4, 32), scales * read_f16(raw, 0), minima * read_f16(raw, 2))


def _decode_q5_k(raw: U8) -> F32:
    scales, minima = _six_bit_pairs(raw[:, 4:16])
    q = unpack(raw[:, 48:], 4, 32) | unpack(raw[:, 16:48], 1, 32) << np.uint8(4)
    return _affine_groups(q, scales * read_f16(raw, 0), minima * read_f16(raw, 2))


def _decode_q6_k(raw: U8) -> F32:
    q = unpack(raw[:, :128], 4, 64) | unpack(raw[:, 128:192], 2, 32) << np.uint8(4)
    return scale_groups(q.view(np.int8) - np.int8(32), raw[:, 192:208].view(np.int8) * read_f16(raw, 208))


q2_k = declare("q2_k", 256, 84, _decode_q2_k)
q3_k = declare("q3_k", 256, 110, _decode_q3_k)
q4_k = declare("q4_k", 256, 144, _decode_q4_k)
q5_k = declare("q5_k", 256, 176, _decode_q5_k)
q6_k = declare("q6_k", 256, 210, _decode_q6_k)
