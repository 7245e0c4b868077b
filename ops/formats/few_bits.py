"""Signs and ternary digits with one f16 scale: q1_0, q2_0, tq1_0 (five digits a byte) and tq2_0."""

from __future__ import annotations

import numpy as np

from tensorgraph.ops.formats.bits import as_f16, in_order, nearest, pack, read_f16, reciprocal, unpack
from tensorgraph.ops.formats.blocks import F32, U8, Parts, Scale, declare

_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def _digits(raw: U8, count: int) -> U8:
    """`count` base-3 digits of each byte, most significant first; a byte holds them as a fraction of 256."""
    shifted = raw[:, None, :] * _POWERS_OF_3[:count]  # modulo 256: the digits already read fall off the top
    return (shifted.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).astype(np.uint8).reshape(len(raw), -1)


def _bytes_of(digits: U8, run: int) -> U8:
    """Five digits a byte, or fewer with zeros behind them: the inverse of `_digits`."""
    parts = digits.reshape(len(digits), -1, run).astype(np.uint16)
    whole = np.zeros((len(digits), run), np.uint16)
    for i in range(parts.shape[1]):
        whole += parts[:, i] * np.uint16(81 // 3**i)
    return ((whole * 256 + 242) // 243).astype(np.uint8)


def _ternary(x: F32) -> tuple[U8, F32]:
    """0, 1, 2 for the nearest of -1, 0, 1 times the largest magnitude, and that."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    return (nearest(x * reciprocal(largest)) + np.float32(1)).astype(np.uint8), largest


def _q1_0(raw: U8) -> Parts:
    return Parts(unpack(raw[:, 2:], 1, 1))


def _decode_q1_0(raw: U8) -> F32:
    return (_q1_0(raw).codes.view(np.int8) * np.int8(2) - np.int8(1)) * read_f16(raw, 0)


def _encode_q1_0(x: F32) -> U8:
    return np.concatenate([as_f16(in_order(np.abs(x)) / np.float32(128)), pack((x >= 0).astype(np.uint8), 1, 1)], axis=1)


def _q2_0(raw: U8) -> Parts:
    return Parts(unpack(raw[:, 2:], 2, 1))


def _decode_q2_0(raw: U8) -> F32:
    return (_q2_0(raw).codes.view(np.int8) - np.int8(1)) * read_f16(raw, 0)


def _encode_q2_0(x: F32) -> U8:
    codes, scale = _ternary(x)
    return np.concatenate([as_f16(scale), pack(codes, 2, 1)], axis=1)


def _tq1_0(raw: U8) -> Parts:
    return Parts(np.concatenate([_digits(raw[:, :32], 5), _digits(raw[:, 32:48], 5), _digits(raw[:, 48:52], 4)], axis=1))


def _decode_tq1_0(raw: U8) -> F32:
    return (_tq1_0(raw).codes.view(np.int8) - np.int8(1)) * read_f16(raw, 52)


def _encode_tq1_0(x: F32) -> U8:
    codes, scale = _ternary(x)
    parts = (_bytes_of(codes[:, :160], 32), _bytes_of(codes[:, 160:240], 16), _bytes_of(codes[:, 240:], 4))
    return np.concatenate([*parts, as_f16(scale)], axis=1)


def _tq2_0(raw: U8) -> Parts:
    return Parts(unpack(raw[:, :64], 2, 32))


def _decode_tq2_0(raw: U8) -> F32:
    return (_tq2_0(raw).codes.view(np.int8) - np.int8(1)) * read_f16(raw, 64)


def _encode_tq2_0(x: F32) -> U8:
    codes, scale = _ternary(x)
    return np.concatenate([pack(codes, 2, 32), as_f16(scale)], axis=1)


q1_0 = declare("q1_0", 128, 18, _decode_q1_0, _encode_q1_0, _q1_0)
q2_0 = declare("q2_0", 64, 18, _decode_q2_0, _encode_q2_0, _q2_0)
tq1_0 = declare("tq1_0", 256, 54, _decode_tq1_0, _encode_tq1_0, _tq1_0, scales=(Scale(52),))
tq2_0 = declare("tq2_0", 256, 66, _decode_tq2_0, _encode_tq2_0, _tq2_0, scales=(Scale(64),))
