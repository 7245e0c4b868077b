"""Dot products of bytes: unsigned codes of weights times signed codes of activations, by what the target has.

All forms give the same whole numbers: nothing is rounded, and nothing can overflow within a block of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensorgraph.backends.cpu.ir import I8, I16, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.target import Target

_VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256"}
_PAIRS_OF_BYTES = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}
_PAIRS_OF_WORDS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}
_NEEDED = {16: "avx512", 8: "avx2", 4: ""}
_MOST_WORD = 32767
_MOST_PAIR = 2 * 127  # two codes of activations
GROUPS = 8
SCALE, WIDE = 32, 48  # bytes into a block of activations: its scale; its codes as i16
SCALE_OF_WORDS = 64  # where the latter come first
Parts = Sequence[Value]


class ByteDot(Protocol):
    """How sums over a block are made, four bytes of each lane at a time: `close(add(add((), ...), ...), factor, total)`.

    `weights` are what `of_codes` makes of u8 codes, and `row` what `of_row` loads of a row, the same in each lane, so that each
    is made once for all that it is multiplied by.
    """

    run: int
    """How many groups may be added before a sum is closed."""
    n_sums: int
    """Registers that a sum takes until it is closed."""
    n_parts: int
    """Vectors that `of_codes` makes."""
    bytes_kept: bool
    """Whether these are of i8; else of i32."""

    centred: bool
    """Whether `of_codes` takes the centre off."""
    scale_at: int
    """Bytes into a block of activations."""

    def of_codes(self, codes: Value) -> Parts: ...
    def of_row(self, block: Value, group: int) -> Parts:
        """Group `group` of the block of activations at an address."""
        ...

    def of_factor(self, factor: Value) -> Value:
        """A factor of a sum, i32, as `close` takes it: so many bytes as well."""
        ...

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        """`sums` of no parts are none yet."""
        ...

    def close(self, sums: Parts, factor: Value | None, total: Value | None) -> Value:
        """`total + sum * factor`, i32."""
        ...


def byte_dot(k: Kernel, most: int, lanes: int) -> ByteDot:
    """The fastest form for codes up to `most` and i32 sums of so many lanes."""
    if _has_fours(k.target, lanes):
        return _Fours(k, lanes)
    return _Pairs(k, most, lanes) if _has_pairs(k.target, lanes) else _Words(k, lanes)


def wide_dot(k: Kernel, centre: int, lanes: int, alone: bool) -> ByteDot:
    """The form that reads activations as i16, which stand `alone` or behind others."""
    return _Wide(k, centre, lanes, alone)


def wants_wide(target: Target, most: int) -> bool:
    """Whether `wide_dot` is the fastest form for codes up to `most` that are decoded once for many rows."""
    lanes, fits = target.vector_bytes // 4, most * _MOST_PAIR <= _MOST_WORD
    return _has_pairs(target, lanes) and not _has_fours(target, lanes) and not fits


def _has_fours(target: Target, lanes: int) -> bool:
    return ("vnni" in target.has and lanes == 16) or ("avxvnni" in target.has and lanes == 8)


def _has_pairs(target: Target, lanes: int) -> bool:
    return ("avx512" in target.has and lanes == 16) or ("avx2" in target.has and lanes == 8)


def has_words(target: Target, lanes: int) -> bool:
    """Whether there is an instruction for so many pairs of i16."""
    return target.family == "x86_64" and _NEEDED.get(lanes, "none") in (*target.has, "")


def word_dot(k: Kernel, a: Value, b: Value) -> Value:
    """Of i32 lanes that are pairs of i16: the sum of both products, i32."""
    lanes = a.lanes
    words = I16.x(2 * lanes)
    if has_words(k.target, lanes):
        return k.call(_PAIRS_OF_WORDS[lanes], a.type, a.bits_as(words), b.bits_as(words))
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16)


def as_pair(low: Value, high: Value) -> Value:
    """Two i32 that fit into i16 as one i32."""
    return (low & 0xFFFF) | (high << 16)


def _four(k: Kernel, at: Value, lanes: int) -> Value:
    """Four bytes, the same in each lane."""
    return k.splat(k.load(at, I32), lanes)


class _Fours:
    """One instruction for four bytes, which reads those of activations from memory."""

    run, n_sums, n_parts, bytes_kept, centred, scale_at = GROUPS, 1, 1, True, False, SCALE

    def __init__(self, k: Kernel, lanes: int) -> None:
        self.k, self.lanes = k, lanes

    def of_codes(self, codes: Value) -> Parts:
        return (codes,)

    def of_row(self, block: Value, group: int) -> Parts:
        return (_four(self.k, block + 4 * group, self.lanes).bits_as(I8.x(4 * self.lanes)),)

    def of_factor(self, factor: Value) -> Value:
        return factor

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        total = sums[0] if sums else self.k.zero(I32.x(self.lanes))
        return (self.k.call(_VNNI[self.lanes], total.type, total, weights[0], row[0]),)

    def close(self, sums: Parts, factor: Value | None, total: Value | None) -> Value:
        found = sums[0] * factor if factor is not None else sums[0]
        return found if total is None else total + found


class _Pairs:
    """Pairs of bytes to i16; codes of 8 bits in halves, whose sums of a pair would not fit."""

    bytes_kept, centred, scale_at = True, False, SCALE

    def __init__(self, k: Kernel, most: int, lanes: int) -> None:
        self.k, self.lanes = k, lanes
        self.n_parts = self.n_sums = 1 if most * _MOST_PAIR <= _MOST_WORD else 2
        fits = _MOST_WORD // (_MOST_PAIR * (most if self.n_sums == 1 else 15))
        self.run = next(n for n in (8, 4, 2, 1) if n <= fits)

    def of_codes(self, codes: Value) -> Parts:
        if self.n_sums == 1:
            return (codes,)
        words = codes.bits_as(I16.x(2 * self.lanes))
        return codes & 15, (words.shift_right(4) & 0x0F0F).bits_as(codes.type)

    def of_row(self, block: Value, group: int) -> Parts:
        return (_four(self.k, block + 4 * group, self.lanes).bits_as(I8.x(4 * self.lanes)),)

    def of_factor(self, factor: Value) -> Value:
        return as_pair(factor, factor)

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        new = [self.k.call(_PAIRS_OF_BYTES[self.lanes], I16.x(2 * self.lanes), w, row[0]) for w in weights]
        return [a + b for a, b in zip(sums, new, strict=True)] if sums else new

    def close(self, sums: Parts, factor: Value | None, total: Value | None) -> Value:
        for i, pairs in enumerate(sums):
            by = self.k.const(16**i, pairs.type)
            if factor is not None:
                by = factor.bits_as(pairs.type) << (4 * i) if i else factor.bits_as(pairs.type)
            new = self.k.call(_PAIRS_OF_WORDS[self.lanes], I32.x(self.lanes), pairs, by)
            total = new if total is None else total + new
        assert total is not None
        return total


class _Words:
    """Bytes 0 and 2, and 1 and 3, as i16."""

    run, n_sums, n_parts, bytes_kept, centred, scale_at = GROUPS, 2, 2, False, False, SCALE

    def __init__(self, k: Kernel, lanes: int) -> None:
        self.k, self.lanes = k, lanes

    def of_codes(self, codes: Value) -> Parts:
        words = codes.bits_as(I16.x(2 * self.lanes))
        return [half.bits_as(I32.x(self.lanes)) for half in (words & 0xFF, words.shift_right(8))]

    def of_row(self, block: Value, group: int) -> Parts:
        words = _four(self.k, block + 4 * group, self.lanes).bits_as(I16.x(2 * self.lanes))
        return [half.bits_as(I32.x(self.lanes)) for half in ((words << 8) >> 8, words >> 8)]

    def of_factor(self, factor: Value) -> Value:
        return factor

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        totals = [word_dot(self.k, w, x) for w, x in zip(weights, row, strict=True)]
        return [total + new for total, new in zip(sums, totals, strict=True)] if sums else totals

    def close(self, sums: Parts, factor: Value | None, total: Value | None) -> Value:
        found = sums[0] + sums[1]
        if factor is not None:
            found = found * factor
        return found if total is None else total + found


class _Wide:
    """Pairs of i16, of codes less their centre: nothing is left to widen or to add at the end of a block."""

    run, n_sums, n_parts, bytes_kept, centred = GROUPS, 1, 2, False, True

    def __init__(self, k: Kernel, centre: int, lanes: int, alone: bool) -> None:
        self.k, self.centre, self.lanes = k, centre, lanes
        self._begin, self.scale_at = (0, SCALE_OF_WORDS) if alone else (WIDE, SCALE)

    def of_codes(self, codes: Value) -> Parts:
        words, pairs = codes.bits_as(I32.x(self.lanes)), I16.x(2 * self.lanes)
        halves = ((words & 0xFF) | ((words & 0xFF00) << 8)), ((words.shift_right(16) & 0xFF) | (words.shift_right(24) << 16))
        return [(half.bits_as(pairs) - self.centre).bits_as(words.type) for half in halves]

    def of_row(self, block: Value, group: int) -> Parts:
        return [_four(self.k, block + (self._begin + 8 * group + 4 * i), self.lanes) for i in range(2)]

    def of_factor(self, factor: Value) -> Value:
        return factor

    def add(self, sums: Parts, weights: Parts, row: Parts) -> Parts:
        total = sums[0] if sums else None
        for w, x in zip(weights, row, strict=True):
            new = word_dot(self.k, w, x)
            total = new if total is None else total + new
        assert total is not None
        return (total,)

    def close(self, sums: Parts, factor: Value | None, total: Value | None) -> Value:
        found = sums[0] if factor is None else sums[0] * factor
        return found if total is None else total + found
