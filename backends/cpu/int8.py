"""Dot products of bytes: unsigned codes of weights times signed codes of activations, by what the target has.

All forms give the same whole numbers: nothing is rounded, and nothing can overflow within a block of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensorgraph.backends.cpu.ir import I8, I16, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel

_VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256"}
_PAIRS_OF_BYTES = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}
_PAIRS_OF_WORDS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}
_NEEDED = {16: "avx512", 8: "avx2", 4: ""}
Parts = Sequence[Value]


class ByteDot(Protocol):
    """How the sum over a block is made, four bytes of each lane at a time: `end(add(add(start, ...), ...), offset)`.

    `weights` are what `of_codes` makes of u8 codes, and `row` what `of_four` makes of four bytes (i32, the same in each lane),
    so that each is made once for all that it is multiplied by.
    """

    in_turn: bool
    """Whether activations take registers: then sums of several rows are made in a loop, which keeps them from filling all."""
    n_sums: int
    """Registers that a sum takes until it ends."""

    def of_codes(self, codes: Value) -> Parts: ...
    def of_four(self, four: Value) -> Parts: ...
    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        """`sums` of no parts are none yet."""
        ...

    def end(self, sums: Parts, offset: Value) -> Value:
        """The sum and an offset, as i32."""
        ...


def byte_dot(k: Kernel, bits: int, lanes: int) -> ByteDot:
    """The fastest form for codes of so many bits (4 or 8) and i32 sums of so many lanes."""
    has = k.target.has
    if ("vnni" in has and lanes == 16) or ("avxvnni" in has and lanes == 8):
        return _Fours(k, lanes)
    if ("avx512" in has and lanes == 16) or ("avx2" in has and lanes == 8):
        return _Pairs(k, bits, lanes)
    return _Words(k, lanes)


class _Fours:
    """One instruction for four bytes, which reads those of activations from memory."""

    in_turn, n_sums = False, 1

    def __init__(self, k: Kernel, lanes: int) -> None:
        self.k, self.lanes = k, lanes

    def of_codes(self, codes: Value) -> Parts:
        return (codes,)

    def of_four(self, four: Value) -> Parts:
        return (four.bits_as(I8.x(4 * self.lanes)),)

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        total = sums[0] if sums else self.k.zero(I32.x(self.lanes))
        return (self.k.call(_VNNI[self.lanes], total.type, total, weights[0], row[0]),)

    def end(self, sums: Parts, offset: Value) -> Value:
        return sums[0] + offset


class _Pairs:
    """Pairs of bytes to i16, halves of codes so that these hold a block: 32 / 2 * 15 * 127 < 2^15."""

    in_turn = True

    def __init__(self, k: Kernel, bits: int, lanes: int) -> None:
        self.k, self.bits, self.lanes, self.n_sums = k, bits, lanes, bits // 4

    def of_codes(self, codes: Value) -> Parts:
        if self.bits == 4:
            return (codes,)
        words = codes.bits_as(I16.x(2 * self.lanes))
        return codes & 15, (words.shift_right(4) & 0x0F0F).bits_as(codes.type)

    def of_four(self, four: Value) -> Parts:
        return (four.bits_as(I8.x(4 * self.lanes)),)

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        new = [self.k.call(_PAIRS_OF_BYTES[self.lanes], I16.x(2 * self.lanes), w, row[0]) for w in weights]
        return [a + b for a, b in zip(sums, new, strict=True)] if sums else new

    def end(self, sums: Parts, offset: Value) -> Value:
        for i, pairs in enumerate(sums):
            ones = self.k.const(16**i, pairs.type)
            offset = offset + self.k.call(_PAIRS_OF_WORDS[self.lanes], I32.x(self.lanes), pairs, ones)
        return offset


class _Words:
    """Bytes 0 and 2, and 1 and 3, as i16."""

    in_turn, n_sums = True, 2

    def __init__(self, k: Kernel, lanes: int) -> None:
        self.k, self.lanes = k, lanes

    def of_codes(self, codes: Value) -> Parts:
        words = codes.bits_as(I16.x(2 * self.lanes))
        return words & 0xFF, words.shift_right(8)

    def of_four(self, four: Value) -> Parts:
        words = four.bits_as(I16.x(2 * self.lanes))
        return (words << 8) >> 8, words >> 8

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        totals = [self._dot(w, x) for w, x in zip(weights, row, strict=True)]
        return [total + new for total, new in zip(sums, totals, strict=True)] if sums else totals

    def _dot(self, a: Value, b: Value) -> Value:
        wide = I32.x(self.lanes)
        target = self.k.target
        if target.family == "x86_64" and _NEEDED.get(self.lanes, "none") in (*target.has, ""):
            return self.k.call(_PAIRS_OF_WORDS[self.lanes], wide, a, b)
        both = (a * b).bits_as(wide)  # 255 * 127 < 2^15
        return (both << 16 >> 16) + (both >> 16)

    def end(self, sums: Parts, offset: Value) -> Value:
        for total in sums:
            offset = offset + total
        return offset
