"""f16 and bf16, which kernels hold as their bits, to f32 and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorgraph.backends.cpu.ir import F32, I16, I32, Type, Value

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.arithmetic import Arithmetic


def half_to_f32(k: Arithmetic, bits: Value) -> Value:
    """Of f16 held as i16."""
    if k.target.has & {"f16c", "neon", "avx512"}:
        return k.convert(bits.bits_as(Type("f", 16, bits.lanes)), F32)
    wide = k.convert(bits, I32, signed=False)
    sign, rest = (wide & 0x8000) << 16, wide & 0x7FFF
    shifted = (rest << 13).bits_as(F32.x(bits.lanes)) * 2.0**112  # normal and subnormal numbers alike
    special = (rest | 0x38000) << 13  # infinite or NaN
    magnitude = k.select(rest.ge(0x7C00), special, shifted.bits_as(wide.type))
    return (magnitude | sign).bits_as(F32.x(bits.lanes))


def f32_to_half(k: Arithmetic, x: Value) -> Value:
    """f16 as i16, to nearest, ties to even."""
    if k.target.has & {"f16c", "neon", "avx512"}:
        return k.convert(x, Type("f", 16)).bits_as(I16.x(x.lanes))
    bits = x.bits_as(I32.x(x.lanes))
    sign, rest = (bits & -0x80000000).shift_right(16), bits & 0x7FFFFFFF
    odd = rest.shift_right(13) & 1
    normal = (rest + odd + (0xFFF - (112 << 23))).shift_right(13)
    # a subnormal result: the sum with 0.5 rounds at the right bit
    small = (rest.bits_as(x.type) + 0.5).bits_as(bits.type) - 0x3F000000
    special = k.select(rest.gt(0x7F800000), rest.shift_right(13) | 0x7E00, k.const(0x7C00, bits.type))
    found = k.select(rest.lt(113 << 23), small, normal)
    found = k.select(rest.ge(0x477FF000), special, found) & 0x7FFF
    return k.convert(found | sign, I16)


def bf16_to_f32(k: Arithmetic, bits: Value) -> Value:
    """Of bf16 held as i16."""
    return (k.convert(bits, I32, signed=False) << 16).bits_as(F32.x(bits.lanes))


def f32_to_bf16(k: Arithmetic, x: Value) -> Value:
    """bf16 as i16, to nearest, ties to even."""
    bits = x.bits_as(I32.x(x.lanes))
    rounded = bits + (bits.shift_right(16) & 1) + 0x7FFF
    kept = k.select(x.is_nan(), bits | 0x400000, rounded)
    return k.convert(kept.shift_right(16), I16)
