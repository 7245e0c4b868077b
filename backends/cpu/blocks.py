"""Blocks of 32 codes of some rows of weights, times blocks of activations in int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tensorgraph.backends.cpu.activations import HALF_SUMS, SCALED_LOW, SCALED_SUM
from tensorgraph.backends.cpu.codes import GROUPS, ROWS, Codes
from tensorgraph.backends.cpu.int8 import ByteDot, Parts, as_pair, word_dot
from tensorgraph.backends.cpu.ir import F32, I8, I32, Type, Value
from tensorgraph.backends.cpu.kernel import Kernel

Heads = tuple[Value, Value | None]
COLUMN = 4 * ROWS
"""Bytes of four for each row."""


@dataclass(frozen=True)
class Block:
    """A block of as many rows as a vector has lanes.

    Attributes:
        group: of a number, the codes of a group as the dot product takes them.
        factors: of sums over as many groups each, as `ByteDot.of_factor` gives them; none: one sum, taken as it is.
        offset: pairs of i16 that the row's two half sums are multiplied by: what centred codes with factors are short of.
        scale: f32.
        least: f32, of the row's scaled sum.
        minima: f32, of the scaled sum of its first half: by how much the first minimum of two is more than the last, `least`.
    """

    group: Callable[[int], Parts]
    factors: Sequence[Value]
    offset: Value | None
    scale: Value
    least: Value | None
    minima: Value | None


def read_block(k: Kernel, codes: Codes, dot: ByteDot, heads: Heads, at: Value, part: int, lanes: int) -> Block:
    """From a unit: its heads, and the block's address."""
    scale, least = heads
    factors, of_minima = codes.factors_at(k, at, part, lanes)
    offset = minima = None
    if len(factors) == 1:
        scale = scale * k.convert(factors[0], F32)
        if of_minima:
            assert least is not None
            least = -(least * k.convert(of_minima[0], F32))
        factors = []
    elif factors:
        if codes.centre and not dot.centred:
            offset = as_pair(factors[0] * -codes.centre, factors[1] * -codes.centre)
        if of_minima:
            assert least is not None
            low, high = (k.convert(m, F32) for m in of_minima)
            least, minima = -(least * high), least * (high - low)
    prepared = [dot.of_factor(f) for f in factors]
    return Block(lambda g: dot.of_codes(codes.group(k, at, part, lanes, g)), prepared, offset, scale, least, minima)


def stored_bytes(codes: Codes, dot: ByteDot) -> int:
    """Of a block of 16 rows as `store_block` writes it."""
    of_two = 2 + (codes.centre > 0 and not dot.centred) + codes.has_min if codes.n_factors == 2 else 0
    return COLUMN * (GROUPS * dot.n_parts + 1 + codes.has_min + of_two)


def store_block(k: Kernel, codes: Codes, block: Block, to: Value, part: int, lanes: int) -> None:
    """Write a block as products take it: columns of 4 bytes of 16 rows."""
    columns = [column for g in range(GROUPS) for column in block.group(g)] + [block.scale]
    columns += [column for column in (block.least, *block.factors) if column is not None]
    columns += [column for column in (block.offset, block.minima) if column is not None]
    for n, column in enumerate(columns):
        k.store(column, to + (COLUMN * n + 4 * lanes * part))


def load_block(k: Kernel, codes: Codes, dot: ByteDot, at: Value, part: int, lanes: int) -> Block:
    """Read what `store_block` wrote."""
    two, n = codes.n_factors == 2, GROUPS * dot.n_parts
    whole = I32.x(lanes)
    numbers = iter(range(n, n + 8))

    def column(n: int, type: Type) -> Value:
        return k.load(at + (COLUMN * n + 4 * lanes * part), type)

    def group(g: int) -> Parts:
        kind = I8.x(4 * lanes) if dot.bytes_kept else whole
        return [column(g * dot.n_parts + i, kind) for i in range(dot.n_parts)]

    scale = column(next(numbers), F32.x(lanes))
    least = column(next(numbers), F32.x(lanes)) if codes.has_min else None
    factors = [column(next(numbers), whole) for _ in range(2 * two)]
    offset = column(next(numbers), whole) if two and codes.centre and not dot.centred else None
    minima = column(next(numbers), F32.x(lanes)) if two and codes.has_min else None
    return Block(group, factors, offset, scale, least, minima)


def _pair(number: int) -> int:
    """Twice the same i16 in an i32."""
    return ((number & 0xFFFF) | (number << 16)) & 0xFFFFFFFF


def multiply_blocks(
    k: Kernel, codes: Codes, dot: ByteDot, blocks: Sequence[Block], rows: Sequence[Value]
) -> Iterator[tuple[int, int, Callable[[Value], Value]]]:
    """Each block times the block at each address: its number and the address's, and what adds the product to f32 sums.

    Codes of activations are loaded once for all of the blocks.
    """
    lanes = blocks[0].scale.lanes
    pairs = [(b, t) for b in range(len(blocks)) for t in range(len(rows))]
    sums: dict[tuple[int, int], Parts] = dict.fromkeys(pairs, ())
    totals: dict[tuple[int, int], Value | None] = dict.fromkeys(pairs)
    at_once = min(dot.run, GROUPS // max(1, len(blocks[0].factors)))
    for n, g in enumerate(codes.order() if at_once == GROUPS else range(GROUPS), 1):
        weights = [block.group(g) for block in blocks]
        for t, row in enumerate(rows):
            of_row = dot.of_row(row, g)
            for b, of_block in enumerate(weights):
                sums[b, t] = dot.add(sums[b, t], of_block, of_row)
        if n % at_once == 0:
            for b, t in pairs:
                factors = blocks[b].factors
                factor = factors[g * len(factors) // GROUPS] if factors else None
                totals[b, t], sums[b, t] = dot.close(sums[b, t], factor, totals[b, t]), ()

    for t, row in enumerate(rows):
        tail = _Tail(k, codes, dot, row, lanes)
        for b, block in enumerate(blocks):
            total = totals[b, t]
            assert total is not None
            yield b, t, partial(tail.add, block, total)


class _Tail:
    """What stands behind the codes of a block of activations, loaded once for all that it is multiplied by."""

    def __init__(self, k: Kernel, codes: Codes, dot: ByteDot, row: Value, lanes: int) -> None:
        self.k, two = k, codes.n_factors == 2
        short = codes.centre > 0 and not dot.centred
        self.scale = k.splat(k.load(row + dot.scale_at, F32), lanes)
        self.halves = self.offset = self.scaled_sum = self.scaled_low = None
        if short:
            self.halves = k.splat(k.load(row + HALF_SUMS, I32), lanes)
            if short and not two:
                self.offset = word_dot(k, k.const(_pair(-codes.centre), self.halves.type), self.halves)
        if codes.has_min:
            self.scaled_sum = k.splat(k.load(row + SCALED_SUM, F32), lanes)
            self.scaled_low = k.splat(k.load(row + SCALED_LOW, F32), lanes) if two else None

    def add(self, block: Block, total: Value, old: Value) -> Value:
        """`old` and the product of a block, whose codes' is `total`."""
        k = self.k
        if self.offset is not None:
            total = total + self.offset
        elif block.offset is not None and self.halves is not None:
            total = total + word_dot(k, block.offset, self.halves)
        new = k.fma(k.convert(total, F32), block.scale * self.scale, old)
        if block.least is not None and self.scaled_sum is not None:
            new = k.fma(block.least, self.scaled_sum, new)
        if block.minima is not None and self.scaled_low is not None:
            new = k.fma(block.minima, self.scaled_low, new)
        return new
