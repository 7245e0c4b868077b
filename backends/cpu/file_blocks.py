"""Blocks of weights in files, to what a row has of units.

Most of a unit's bits are bits of the block. Which ones is asked of the NumPy function that makes one of the other, so that no
type says twice where its bits are; what is more than moved bits, codes that are numbers of vectors say, a type reads by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu.codes import BLOCK, GROUPS, PLANES, ROWS, Codes
from tensorgraph.backends.cpu.ir import Int, Type, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.dtypes import DType

U8 = NDArray[np.uint8]
NONE, SEVERAL = -1, -2
_NEAR_BYTES = 1 << 13  # of units that the rows of a tile are written to one after the other
_SAMPLES = 1 << 10  # random blocks on which it is tried whether bits are moved alone


@dataclass(frozen=True)
class InFiles:
    """How a type with codes lies in files.

    Attributes:
        parts: blocks [n, block_bytes] to what a row has of units, one after another, each as `Codes.fields` says.
        reader: `(k)` -> `(block, element)` -> of the block at an address, the codes of four elements, a byte each, as i32; None
            where they are moved bits.
    """

    dtype: DType
    parts: Callable[[U8], U8]
    reader: Callable[[Kernel], Callable[[Value, int], Value]] | None = None


def write_blocks(k: Kernel, codes: Codes, files: InFiles, row: Callable[[Int], Value], n: Int, step: Int, to: Value) -> None:
    """Write n blocks of each of 16 rows, `step` bytes apart, to the units from an address on; `row(r)` is where row r begins."""
    moves = find_moves(files.parts, files.dtype.block_bytes)
    group = files.reader(k) if files.reader is not None else None
    units_bytes = files.dtype.block_size // codes.block * codes.unit_bytes
    at_once = max(1, _NEAR_BYTES // units_bytes)
    with k.loop(0, n, at_once) as some:
        some.next()
        with k.loop(0, ROWS) as rows:
            rows.next()
            start = row(rows.i)
            with k.loop(some.i, k.min(some.i + at_once, n)) as blocks:
                blocks.next()
                begin = to + blocks.i * units_bytes
                places = {size: begin + rows.i * size for size in (1, 2, 4)}
                block = start + blocks.i * step
                for at, size, value in _fields(k, codes, files.dtype.block_size, moves, group, block):
                    k.store(value, places[size] + ROWS * at, align=1)


def _fields(
    k: Kernel, codes: Codes, block_size: int, moves: Moves, group: Callable[[Value, int], Value] | None, block: Value
) -> Iterator[tuple[int, int, Value]]:
    """Of the block at an address: each place in the row's part of units, and the number of so many bytes that goes there."""
    head, of_block = codes.fields
    at = element = 0
    for _ in range(block_size // codes.block):
        for size in head:
            yield at, size, moves.load(k, block, at, size)
            at += size
        for _ in range(codes.n_blocks):
            words = _planes(codes, [group(block, element + 4 * g) for g in range(GROUPS)]) if group is not None else None
            for size in of_block:
                yield at, size, moves.load(k, block, at, size) if size < 4 or words is None else next(words)
                at += size
            element += BLOCK


def _planes(codes: Codes, groups: Sequence[Value]) -> Iterator[Value]:
    """The words of the codes of 32 elements, four a group."""
    to = 0
    for bits in PLANES[codes.bits]:
        mask = ((1 << bits) - 1) * 0x01010101
        for word in range(bits):
            found: Value | None = None
            for n, g in enumerate(range(word, GROUPS, bits)):
                moved = groups[g] if codes.bits == bits else (groups[g].shift_right(to) if to else groups[g]) & mask
                moved = moved << bits * n if n else moved
                found = moved if found is None else found | moved
            assert found is not None
            yield found
        to += bits


@dataclass(frozen=True)
class Moves:
    """What each bit of some bytes is.

    Attributes:
        block_bytes: of what they are made of.
        source: by bit, the bit of the block that it is; NONE: always the same, SEVERAL: it is more than one moved bit.
        flips: whether it is turned over, or 1 where it is always the same.
    """

    block_bytes: int
    source: NDArray[np.int64]
    flips: U8

    def load(self, k: Kernel, block: Value, at: int, size: int) -> Value:
        """The number of `size` bytes from byte `at` on, of the block at an address."""
        type, every = Type("i", 8 * size), (1 << 8 * size) - 1
        pieces: dict[tuple[int, int], int] = {}
        turned = 0
        for bit in range(8 * size):
            source = int(self.source[8 * at + bit])
            if source == SEVERAL:
                raise ValueError(f"[moves] wanted moved bits; byte {at + bit // 8} is made of more")
            turned |= int(self.flips[8 * at + bit]) << bit
            if source != NONE:  # read from where bytes stand in the same order, if all of these are in the block
                start = min(max(source // 8 - bit // 8, 0), self.block_bytes - size)
                piece = start, source - 8 * start - bit
                pieces[piece] = pieces.get(piece, 0) | 1 << bit
        found: Value | None = None
        for (start, shift), mask in pieces.items():
            value = k.load(block + start, type, align=1)
            value = value.shift_right(shift) if shift > 0 else value << -shift if shift else value
            if mask != (every >> shift if shift > 0 else every << -shift & every):
                value = value & _signed(mask, size)
            found = value if found is None else found | value
        if found is None:
            return k.const(_signed(turned, size), type)
        return found ^ _signed(turned, size) if turned else found


def _signed(bits: int, size: int) -> int:
    return bits - (1 << 8 * size) if bits >> (8 * size - 1) else bits


def find_moves(make: Callable[[U8], U8], block_bytes: int) -> Moves:
    """What `make` does with blocks [n, block_bytes], for each bit of its result [n, bytes]."""
    always = _bits(make(np.zeros((1, block_bytes), np.uint8)))[0]
    changed = _bits(make(np.packbits(np.eye(8 * block_bytes, dtype=np.uint8), axis=1, bitorder="little"))) ^ always
    count, source = changed.sum(axis=0), changed.argmax(axis=0)
    source[count == 0] = NONE
    some = hashlib.shake_128(b"any bits").digest(_SAMPLES * block_bytes)  # numpy.random takes long to import
    blocks = np.frombuffer(some, np.uint8).reshape(_SAMPLES, block_bytes)
    expected = np.where(count > 0, _bits(blocks)[:, source], 0) ^ always
    source[(count > 1) | np.any(_bits(make(blocks)) != expected, axis=0)] = SEVERAL
    return Moves(block_bytes, source, always)


def _bits(raw: U8) -> U8:
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little")
