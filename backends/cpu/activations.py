"""Rows of activations as products read them: quantised by 32, or plain f32.

A quantised row is K / 32 blocks of 48 bytes: 32 codes (i8), their scale `d` (f32), `d * sum` (f32), the sums of the first and
the last 16 codes (i16 each), and `d` times the first of these (f32). `x ~ d * code`, with d = max |x| / 127 and codes rounded
to nearest, ties to even. A row that is not finite gives results that are not. Of kind int16 a block has the same codes once more
behind it, as i16. Of kind words it is these and then the scale alone, 68 bytes; of kind fixed, too, with d = max |x| / 8191.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from tensorgraph.backends.cpu.int8 import SCALE, SCALE_OF_WORDS, WIDE, as_pair
from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel

Kind = Literal["int8", "int16", "words", "fixed", "f32"]
BLOCK = 32
_BLOCK_BYTES = {"int8": 48, "int16": 112, "words": 68, "fixed": 68, "f32": 128}
SCALED_SUM, HALF_SUMS, SCALED_LOW = 36, 40, 44  # bytes into a block
FIXED_MOST = 8191  # 32 products of two such codes are below 2^31
ROUND, _ROUND_BITS = 1.5 * 2.0**23, 0x4B400000  # added to a number below 2^22 it leaves the nearest whole one in the low bits
_TINY = 2.0**-128  # what has an infinite inverse: such blocks are taken as zeros
_AT_ONCE = 4  # blocks
Load = Callable[[Value, int], Value]
"""`load(i, lanes)`: elements i to i + lanes - 1 as f32; a scalar where lanes is 1."""


@dataclass(frozen=True)
class Rows:
    """Adjacent rows of activations, `count` of them known while emitting."""

    kind: Kind
    address: Value
    row_bytes: Int
    count: int = 1

    @property
    def is_integer(self) -> bool:
        return self.kind != "f32"

    @property
    def block_bytes(self) -> int:
        return _BLOCK_BYTES[self.kind]

    def from_row(self, n: Int, count: int) -> Rows:
        return Rows(self.kind, self.address + self.address.fn.i64(n) * self.row_bytes, self.row_bytes, count)


def block_bytes(kind: Kind) -> int:
    """Bytes of 32 elements of a row."""
    return _BLOCK_BYTES[kind]


def row_bytes(kind: Kind, width: int) -> int:
    """Bytes of a row of `width` elements."""
    return width * 4 if kind == "f32" else width // BLOCK * _BLOCK_BYTES[kind]


def write_row(k: Kernel, kind: Kind, load: Load, width: int, to: Value) -> None:
    """A row of `width` elements in the form of `kind`."""
    if kind == "f32":
        copy_row(k, load, width, to)
    else:
        quantise_row(k, kind, load, width, to)


def copy_row(k: Kernel, load: Load, width: int, to: Value) -> None:
    """A row of `width` elements as f32; the last ones are loaded one by one."""
    whole = width // k.lanes * k.lanes
    for start, stop, lanes in ((0, whole, k.lanes), (whole, width, 1)):
        if start < stop:
            with k.loop(start, stop, lanes) as loop:
                loop.next()
                k.store(load(loop.i, lanes), to + loop.i * 4)


def quantise_row(k: Kernel, kind: Kind, load: Load, width: int, to: Value) -> None:
    """A row of `width` elements, a multiple of 32, as codes."""
    n_blocks = width // BLOCK
    whole = n_blocks // _AT_ONCE * _AT_ONCE

    def blocks(first: Value, count: int) -> None:
        each = [[load(first * BLOCK + i, k.lanes) for i in range(n * BLOCK, n * BLOCK + BLOCK, k.lanes)] for n in range(count)]
        quantise_blocks(k, kind, each, to + first * _BLOCK_BYTES[kind])

    if whole:
        with k.loop(0, whole, _AT_ONCE) as loop:
            loop.next()
            blocks(loop.i, _AT_ONCE)
    if whole < n_blocks:
        blocks(k.i64(whole), n_blocks - whole)


def quantise_blocks(k: Kernel, kind: Kind, blocks: Sequence[Sequence[Value]], to: Value, apart: int = 0) -> None:
    """Up to 4 blocks of 32 elements, each in vectors of as many lanes, to an address, so many bytes apart: 0 for side by side."""
    apart = apart or _BLOCK_BYTES[kind]
    given = [*blocks, *[blocks[-1]] * (_AT_ONCE - len(blocks))]
    whole, alone = I32.x(given[0][0].lanes), kind in ("words", "fixed")
    magnitudes = [[p.bits_as(whole) & 0x7FFFFFFF for p in parts] for parts in given]
    amax = _fold_each(k, magnitudes, lambda a, b: k.select(b.gt(a), b, a)).bits_as(F32.x(_AT_ONCE))  # in order, NaN last
    d, inverse = scale_of(k, amax, FIXED_MOST if kind == "fixed" else 127)
    rounded = []  # codes in the low bits, `ROUND` in the high ones
    for n, parts in enumerate(given):
        by = inverse.shuffle([n] * whole.lanes)
        rounded.append([(p * by + ROUND).bits_as(whole) for p in parts])
        if n < len(blocks) and not alone:
            joined = [k.convert(codes, I8).bits_as(I32.x(whole.lanes // 4)) for codes in rounded[-1]]
            while len(joined) > 1:
                joined = [k.join(a, b) for a, b in zip(joined[::2], joined[1::2], strict=True)]
            k.store(joined[0], to + n * apart)
        if n < len(blocks) and kind != "int8":
            for i, codes in enumerate(rounded[-1]):
                k.store(k.convert(codes, I16), to + (n * apart + (0 if alone else WIDE) + 2 * whole.lanes * i))
    if alone:
        for n in range(len(blocks)):
            k.store(d[n], to + (n * apart + SCALE_OF_WORDS))
        return
    n = BLOCK // 2 // whole.lanes  # vectors of half a block
    start = BLOCK // 2 * _ROUND_BITS % (1 << 32)
    low, high = (_fold_each(k, half, lambda a, b: a + b) - start for half in ([r[:n] for r in rounded], [r[n:] for r in rounded]))
    scaled, scaled_low = ((d * k.convert(n, F32)).bits_as(low.type) for n in (low + high, low))
    columns = [d.bits_as(low.type), scaled, as_pair(low, high), scaled_low]
    for n, tail in enumerate(_transposed(columns)[: len(blocks)]):
        k.store(tail, to + (n * apart + SCALE))


def scale_of(k: Kernel, amax: Value, most: int) -> tuple[Value, Value]:
    """What codes up to `most` are multiplied by, and its inverse, 0 where it would be infinite."""
    d = amax / float(most)
    return d, k.select(d.le(_TINY), k.zero(d.type), 1.0 / d)


def _fold_each(k: Kernel, blocks: Sequence[Sequence[Value]], combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes of each of 4 lists of vectors combined, in any order: 4 lanes."""
    a, b, c, d = (reduce(combine, parts) for parts in blocks)
    lanes = range(a.lanes)
    low, high = ([4 * (i // 4) + i % 4 // 2 + start + a.lanes * (i % 2) for i in lanes] for start in (0, 2))
    ab, cd = (combine(x.shuffle(low, y), x.shuffle(high, y)) for x, y in ((a, b), (c, d)))  # a b a b
    first, second = ([4 * (i // 4) + i % 2 + start + a.lanes * (i % 4 // 2) for i in lanes] for start in (0, 2))
    all_four = combine(ab.shuffle(first, cd), ab.shuffle(second, cd))  # a b c d
    while all_four.lanes > 4:
        half = all_four.lanes // 2
        all_four = combine(all_four.shuffle(range(half)), all_four.shuffle(range(half, 2 * half)))
    return all_four


def _transposed(rows: Sequence[Value]) -> list[Value]:
    """4 x 4."""
    a, b, c, d = rows
    low, high = [0, 4, 1, 5], [2, 6, 3, 7]
    first, second = [0, 1, 4, 5], [2, 3, 6, 7]
    found = []
    for half in (low, high):
        ab, cd = a.shuffle(half, b), c.shuffle(half, d)
        found += [ab.shuffle(first, cd), ab.shuffle(second, cd)]
    return found
