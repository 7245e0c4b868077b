"""Dot products of bytes: unsigned codes of weights times signed codes of activations, by what the target has."""

from __future__ import annotations

from tensorgraph.backends.cpu.ir import I8, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel

_VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256"}


def dot_four(k: Kernel, total: Value, codes: Value, four: Value) -> Value:
    """total (i32) plus, in each lane, its four unsigned bytes of `codes` times the four signed bytes of `four` (i32)."""
    lanes = total.lanes
    if "vnni" in k.target.has or ("avxvnni" in k.target.has and lanes == 8):
        return k.call(_VNNI[lanes], total.type, total, codes, four.bits_as(I8.x(4 * lanes)))
    words = codes.bits_as(I32.x(lanes))
    for i in range(4):
        a = (words.shift_right(8 * i) if i else words) & 0xFF
        b = (four << (24 - 8 * i) if i < 3 else four) >> 24
        total = total + a * b
    return total
