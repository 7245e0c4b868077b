"""Weights of f16 and bf16 as whole numbers of 14 bits, by 32 of a row: products of many rows add pairs of these faster than f32.

A block's largest magnitude is 8191 steps, so that a number moves by 1 / 16382 of that at most (decision 0023: what it costs, and
what others' rounding of activations to f16 does).
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorgraph.backends.cpu.activations import BLOCK, FIXED_MOST, ROUND, scale_of
from tensorgraph.backends.cpu.blocks import Block
from tensorgraph.backends.cpu.codes import ROWS, Codes
from tensorgraph.backends.cpu.int8 import Parts
from tensorgraph.backends.cpu.ir import I16, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import read_value
from tensorgraph.backends.cpu.weights import Panel

FIXED = Codes(8)
"""What such blocks are beside their codes: nothing but a scale."""
_LINE = 64
_AHEAD = 8 << 10


def fixed_blocks(k: Kernel, panel: Panel, start: Value, lanes: int) -> Iterator[Block]:
    """The block of 16 rows from element `start` of the width on: of each part of the rows."""
    dtype, unit, item = panel.form.dtype, panel.unit(start), 2
    assert dtype is not None and panel.form.unit_bytes == ROWS * item
    for line in range(0, BLOCK * ROWS * item, _LINE):
        k.prefetch(unit + (_AHEAD + line))
    largest = None  # bits of magnitudes are in their order
    for e in range(BLOCK):
        magnitude = k.load(unit + e * (ROWS * item), I16.x(ROWS)) & 0x7FFF
        largest = magnitude if largest is None else k.max(largest, magnitude)
    assert largest is not None
    for part in range(ROWS // lanes):
        amax = read_value(k, largest.shuffle(range(part * lanes, (part + 1) * lanes)), dtype)
        scale, inverse = scale_of(k, amax, FIXED_MOST)

        def code(e: int, part: int = part, inverse: Value = inverse) -> Value:
            value = read_value(k, k.load(unit + (e * ROWS + part * lanes) * item, I16.x(lanes)), dtype)
            return (value * inverse + ROUND).bits_as(I32.x(lanes))

        def group(g: int) -> Parts:
            return [_joined(code(e), code(e + 1)) for e in (4 * g, 4 * g + 2)]

        yield Block(group, (), None, scale, None, None)


def _joined(low: Value, high: Value) -> Value:
    """The lower halves of two vectors of i32 as pairs of i16."""
    n = low.lanes
    pairs = I16.x(2 * n)
    order = [i if i % 2 == 0 else 2 * n + i for i in range(2 * n)]
    return low.bits_as(pairs).shuffle(order, (high << 16).bits_as(pairs)).bits_as(low.type)
