"""Rows of activations as products read them: quantised to int8 by 32, or plain f32.

A quantised row is K / 32 blocks of 48 bytes: 32 codes (i8), their scale `d` (f32), `d * sum` (f32), then `-8 * sum` and
`-128 * sum` (i32), which is what a product starts from where weights are centred at 8 or 128. `x ~ d * code`, with
d = max |x| / 127 and codes rounded to nearest, ties to even. A row that is not finite gives results that are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tensorgraph.backends.cpu.ir import F32, I8, I32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel

Kind = Literal["int8", "f32"]
BLOCK = 32
BLOCK_BYTES = 48
SCALE, SCALED_SUM = 32, 36  # bytes into a block
START = {8: 40, 128: 44}  # by centre
_ROUND = 1.5 * 2.0**23  # added to a number below 2^22 it leaves the nearest whole one in the low bits
Load = Callable[[Value, int], Value]
"""`load(i, lanes)`: elements i to i + lanes - 1 as f32; a scalar where lanes is 1."""


@dataclass(frozen=True)
class Rows:
    """Adjacent rows of activations, `count` of them known while emitting."""

    kind: Kind
    address: Value
    row_bytes: int
    count: int = 1

    def from_row(self, n: Int, count: int) -> Rows:
        return Rows(self.kind, self.address + self.address.fn.i64(n) * self.row_bytes, self.row_bytes, count)


def row_bytes(kind: Kind, width: int) -> int:
    """Bytes of a row of `width` elements."""
    return width // BLOCK * BLOCK_BYTES if kind == "int8" else width * 4


def write_row(k: Kernel, kind: Kind, load: Load, width: int, to: Value) -> None:
    """A row of `width` elements in the form of `kind`."""
    if kind == "int8":
        quantise_row(k, load, width, to)
    else:
        copy_row(k, load, width, to)


def copy_row(k: Kernel, load: Load, width: int, to: Value) -> None:
    """A row of `width` elements as f32; the last ones are loaded one by one."""
    whole = width // k.lanes * k.lanes
    for start, stop, lanes in ((0, whole, k.lanes), (whole, width, 1)):
        if start < stop:
            with k.loop(start, stop, lanes) as loop:
                loop.next()
                k.store(load(loop.i, lanes), to + loop.i * 4)


def quantise_row(k: Kernel, load: Load, width: int, to: Value) -> None:
    """A row of `width` elements, a multiple of 32, as int8."""
    lanes = k.lanes
    with k.loop(0, width // BLOCK) as loop:
        loop.next()
        parts = [load(loop.i * BLOCK + i, lanes) for i in range(0, BLOCK, lanes)]
        quantise_block(k, parts, to + loop.i * BLOCK_BYTES)


def quantise_block(k: Kernel, parts: list[Value], to: Value) -> None:
    """32 elements in vectors of as many lanes each, to a block at an address."""
    magnitudes = [p.bits_as(I32.x(p.lanes)) & 0x7FFFFFFF for p in parts]
    most = magnitudes[0]
    for other in magnitudes[1:]:  # as integers they are ordered alike, NaN last
        most = k.select(other.gt(most), other, most)
    amax = k.fold(most, lambda a, b: k.select(b.gt(a), b, a)).bits_as(F32)
    d = amax / 127.0
    inverse = k.select(d.eq(0.0), k.const(0.0, F32), 1.0 / d)
    total = None
    for i, part in enumerate(parts):
        codes = (part * inverse + _ROUND).bits_as(I32.x(part.lanes)) - 0x4B400000
        k.store(k.convert(codes, I8), to + i * part.lanes)
        total = codes if total is None else total + codes
    assert total is not None
    n = k.sum(total)
    k.store(d, to + SCALE)
    k.store(d * k.convert(n, F32), to + SCALED_SUM)
    for centre, at in START.items():
        k.store(n * -centre, to + at)
