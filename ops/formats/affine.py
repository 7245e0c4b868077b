"""Blocks of 32 with one f16 scale: q4_0, q5_0 and q8_0 are centred, q4_1 and q5_1 start at an f16 minimum."""

from __future__ import annotations

import numpy as np

from tensorgraph.ops.formats.bits import as_f16, extreme, nearest, pack, read_f16, reciprocal, unpack
from tensorgraph.ops.formats.blocks import F32, U8, BlockFormat, Parts, Scale, declare


def _declare_affine(name: str, bits: int, has_min: bool) -> BlockFormat:
    """Scale, minimum if any, for 5 bits the 32 high bits, then 16 bytes of low nibbles."""
    centre, top = 1 << (bits - 1), (1 << bits) - 1
    block_bytes = 2 + 2 * has_min + 4 * (bits == 5) + 16

    def parts(raw: U8) -> Parts:
        codes = unpack(raw[:, -16:], 4, 16)
        if bits == 5:
            codes |= unpack(raw[:, -20:-16], 1, 1) << np.uint8(4)
        return Parts(codes)

    def decode(raw: U8) -> F32:
        q = parts(raw).codes
        if has_min:
            return q * read_f16(raw, 0) + read_f16(raw, 2)
        return (q.view(np.int8) - np.int8(centre)) * read_f16(raw, 0)

    def encode(x: F32) -> U8:
        if has_min:
            start = x.min(axis=1, keepdims=True)
            d = (x.max(axis=1, keepdims=True) - start) / np.float32(top)
            q = (x - start) * reciprocal(d) + np.float32(0.5)
            head = [as_f16(d), as_f16(start)]
        else:
            d = extreme(x) / np.float32(-centre)  # the value of largest magnitude becomes code 0, exactly -centre
            q = x * reciprocal(d) + np.float32(centre + 0.5)
            head = [as_f16(d)]
        codes = np.minimum(q, np.float32(top)).astype(np.uint8)
        high = [pack(codes >> np.uint8(4), 1, 1)] if bits == 5 else []
        return np.concatenate([*head, *high, pack(codes, 4, 16)], axis=1)

    scales = (Scale(0), Scale(2, times=-top / 2)) if has_min else (Scale(0),)
    return declare(name, 32, block_bytes, decode, encode, parts, scales)


def _q8_0(raw: U8) -> Parts:
    return Parts(raw[:, 2:] ^ np.uint8(128))


def _decode_q8_0(raw: U8) -> F32:
    return raw[:, 2:].view(np.int8) * read_f16(raw, 0)


def _encode_q8_0(x: F32) -> U8:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return np.concatenate([as_f16(d), nearest(x * reciprocal(d)).astype(np.int8).view(np.uint8)], axis=1)


q4_0 = _declare_affine("q4_0", 4, has_min=False)
q4_1 = _declare_affine("q4_1", 4, has_min=True)
q5_0 = _declare_affine("q5_0", 5, has_min=False)
q5_1 = _declare_affine("q5_1", 5, has_min=True)
q8_0 = declare("q8_0", 32, 34, _decode_q8_0, _encode_q8_0, _q8_0, in_streams=True)
