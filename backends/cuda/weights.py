"""Weights on the device in their own bits: layout "planes" of a block type whose elements have codes.

Of a constant [..., M, K] with R rows there is one plane after another, each from a multiple of 256 bytes on and row after row: a
plane of b bits of codes for each of `codes.PLANES` (R x K * b / 8 bytes), factors (R x K / 32 times those of a block), heads
(R x K / block times a scale, and a minimum if any), and a byte for each row, its *exponent* e: all its elements are below 2^e.
Within a block of 32 elements words stand as `Codes` says; a block of 4 bits is 16 bytes. `weights.cuh` reads this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu.codes import BLOCK, PLANES, ROWS, Codes
from tensorgraph.backends.cpu.weights import interleaved, same_tiles
from tensorgraph.backends.cpu.weights import pack as interleave
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.device import CpuDevice

__all__ = ["LAYOUT", "Planes", "codes_of", "elements", "pack", "planes_of", "reads_planes", "traits", "unpack"]

LAYOUT = "planes"
ALIGNMENT = 256
_CHUNK = 1 << 22  # elements packed at once
_LOWEST, _HIGHEST = -112, 127  # exponents that are told apart: 2^(14 - e) is a number of f32
U8 = NDArray[np.uint8]
Write = Callable[[int, U8], None]
"""`write(offset, bytes)`: into the memory of a constant."""


def codes_of(dtype: DType) -> Codes | None:
    """What elements of a type are made of; None of types that have no planes."""
    return interleaved(dtype).codes if dtype.is_block else None


def reads_planes(value: Node | None) -> tuple[str, ...]:
    """The layouts beside dense in which products and rows by number read a value: "planes" of a constant that may have it."""
    held = value is not None and same_tiles(value) is not None and codes_of(value.dtype) is not None
    return (LAYOUT,) if held else ()


@dataclass(frozen=True)
class Planes:
    """Where the planes of a constant lie.

    Attributes:
        rows: over all leading axes.
        width: elements of a row.
    """

    codes: Codes
    rows: int
    width: int

    @cached_property
    def row_bytes(self) -> tuple[int, ...]:
        """Of each plane: those of codes, factors, heads, exponents."""
        head, of_block = self.codes.fields
        factors = len(of_block) - self.codes.bits
        bits = (self.width // 8 * b for b in PLANES[self.codes.bits])
        return (*bits, self.width // BLOCK * factors, self.width // self.codes.block * sum(head), 1)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each plane begins, and where the last one ends."""
        found = [0]
        for each in self.row_bytes:
            found.append(found[-1] + -(-self.rows * each // ALIGNMENT) * ALIGNMENT)
        return tuple(found)

    @property
    def size_bytes(self) -> int:
        return self.offsets[-1]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The first and the last but one of rows that are taken at once."""
        step = max(ROWS, _CHUNK // max(self.width, 1) // ROWS * ROWS)
        for first in range(0, self.rows if self.width else 0, step):
            yield first, min(first + step, self.rows)


def planes_of(shape: Sequence[int], dtype: DType) -> Planes:
    """Of a constant [..., M, K]."""
    codes = codes_of(dtype)
    assert codes is not None
    return Planes(codes, prod(shape[:-1]), shape[-1])


def elements(array: NDArray[Any], dtype: DType) -> tuple[int, ...]:
    """The shape of a constant that comes as `uint8 [..., row_bytes]`."""
    return (*array.shape[:-1], array.shape[-1] // dtype.block_bytes * dtype.block_size)


def pack(array: NDArray[Any], dtype: DType, write: Write) -> None:
    """Put a constant's planes, from `uint8 [..., row_bytes]` as it is in files.

    Codes are made by the processor's own kernels (layout r16), some rows at a time; here they are only put in another order.

    Raises: InputError: the array is not of that type.
    """
    planes, raw = planes_of(elements(array, dtype), dtype), array.reshape(prod(array.shape[:-1]), array.shape[-1])
    codes, device = planes.codes, _processor()
    for first, stop in planes.chunks():
        held = interleave(raw[first:stop], dtype, "r16", device)
        device.settle()
        units = held.data.reshape(-1, planes.width // codes.block, codes.unit_bytes)
        heads, *parts = _in_rows(codes, units, stop - first)
        of_rows = _exponents(codes, heads.reshape(-1, sum(codes.fields[0])), stop - first)
        for n, part in enumerate((*parts, heads, of_rows)):
            if part.size:
                write(planes.offsets[n] + first * planes.row_bytes[n], part)


@cache
def _processor() -> CpuDevice:
    from tensorgraph.backends.cpu.device import CpuDevice

    return CpuDevice()


def _in_rows(codes: Codes, units: U8, n_rows: int) -> Iterator[U8]:
    """Of units [tiles, units, bytes], each of 16 rows: heads, planes of codes and factors as they lie row after row."""

    def rows(part: U8, sizes: Sequence[int]) -> U8:
        """Fields of so many bytes, each of 16 rows one after another."""
        *lead, _ = part.shape
        fields = part.reshape(*lead, len(sizes), ROWS * sizes[0]).view(f"<u{sizes[0]}")
        last = fields.ndim - 1
        turned = fields.transpose(0, last, *range(1, last)).reshape(len(fields) * ROWS, -1)[:n_rows]
        return np.ascontiguousarray(turned).reshape(-1).view(np.uint8)

    head, of_block = codes.fields
    blocks = units[:, :, codes.head_bytes :].reshape(*units.shape[:2], codes.n_blocks, codes.block_bytes)
    n_factors = len(of_block) - codes.bits
    yield rows(units[:, :, : codes.head_bytes], head)
    start = ROWS * n_factors
    for bits in PLANES[codes.bits]:
        yield rows(blocks[..., start : start + ROWS * 4 * bits], (4,) * bits)
        start += ROWS * 4 * bits
    yield rows(blocks[..., : ROWS * n_factors], (1,) * n_factors) if n_factors else np.empty(0, np.uint8)


def _exponents(codes: Codes, heads: U8, n_rows: int) -> U8:
    """Of each row, e: its elements are below 2^e; of those that are no numbers nothing is said."""
    scale, least = _heads(codes, heads)
    most = max(codes.most - codes.centre, codes.centre)
    factor = {"": 1, "u8": 255, "i8": 128, "nibbles": 15}[codes.factors]
    bound = np.abs(scale) * (most * factor) + np.abs(least) * factor
    largest = np.where(np.isfinite(bound), bound, 0).reshape(n_rows, -1).max(axis=1)
    found: U8 = np.clip(np.frexp(largest)[1], _LOWEST, _HIGHEST).astype(np.int8).view(np.uint8)
    return found


def _heads(codes: Codes, heads: U8) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales and minima [n], from [n, bytes]."""
    size = codes.fields[0][0]
    if codes.head == "e8m0":
        found = np.ldexp(1.0, heads[:, ::size].astype(np.int32) - 128)
    else:
        found = np.ascontiguousarray(heads).view("<f2").astype(np.float64)
    return found[:, 0] * codes.unit, found[:, 1] if codes.has_min else np.zeros(len(heads))


def unpack(memory: U8, dtype: DType, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The elements of a constant whose planes are given: those that the type's decoder gives."""
    planes, found = planes_of(shape, dtype), np.empty((prod(shape[:-1]), shape[-1]), np.float32)
    for first, stop in planes.chunks():
        parts = [memory[at + first * n : at + stop * n] for at, n in zip(planes.offsets, planes.row_bytes, strict=False)]
        *bits, factors, heads, _ = parts
        found[first:stop] = _decode(planes.codes, bits, factors, heads).reshape(stop - first, -1)
    return found.reshape(shape)


def _decode(codes: Codes, bits: list[U8], factors: U8, heads: U8) -> NDArray[np.float32]:
    code, to = np.zeros(len(bits[0]) * 8 // PLANES[codes.bits][0], np.uint8).reshape(-1, BLOCK // 4, 4), 0
    for n, plane in zip(PLANES[codes.bits], bits, strict=True):
        words = plane.reshape(-1, n, 4)
        for g in range(BLOCK // 4):
            code[:, g] |= (words[:, g % n] >> np.uint8(n * (g // n)) & np.uint8((1 << n) - 1)) << np.uint8(to)
        to += n
    value = code if not codes.table else np.array(codes.table, np.uint8)[np.minimum(code, len(codes.table) - 1)]
    exact = value.reshape(-1, BLOCK).astype(np.float64) - codes.centre
    scale, least = (np.repeat(each, codes.n_blocks)[:, None] for each in _heads(codes, heads.reshape(-1, sum(codes.fields[0]))))
    with np.errstate(invalid="ignore"):
        if codes.factors:
            whole = factors.reshape(len(exact), -1)
            if codes.factors == "nibbles":
                whole = np.concatenate([whole & np.uint8(15), whole >> np.uint8(4)], axis=1)
            n = codes.n_factors
            own = whole[:, :n].view(np.int8) if codes.factors == "i8" else whole[:, :n]
            exact *= np.repeat(own, codes.per_factor, axis=1)
            if codes.has_min:
                least = -least * np.repeat(whole[:, n:], codes.per_factor, axis=1)
        found: NDArray[np.float32] = (exact * scale + (least if codes.has_min else 0.0)).astype(np.float32)
    return found


def traits(dtype: DType) -> str:
    """A type as `weights.cuh` is told of it: a struct of C++ under `traits_name`."""
    codes = codes_of(dtype)
    assert codes is not None
    head, of_block = codes.fields
    low, high = (*PLANES[codes.bits], 0)[:2]
    table = bytes(codes.table) + bytes(16 - len(codes.table))
    numbers = {
        "low_bits": low,
        "high_bits": high,
        "centre": codes.centre,
        "n_table": len(codes.table),
        "n_blocks": codes.n_blocks,
        "per_factor": codes.per_factor,
        "factor_bytes": len(of_block) - codes.bits,
        "head_bytes": sum(head),
    }
    flags = {
        "has_min": codes.has_min,
        "nibbles": codes.factors == "nibbles",
        "signed_factors": codes.factors == "i8",
        "e8m0": codes.head == "e8m0",
        "has_unit": codes.unit != 1,
    }
    words = ", ".join(f"table{i} = {int.from_bytes(table[4 * i : 4 * i + 4], 'little')}u" for i in range(4))
    return (
        f"struct {traits_name(dtype)} {{\n"
        f"    static constexpr int {', '.join(f'{name} = {value}' for name, value in numbers.items())};\n"
        f"    static constexpr bool {', '.join(f'{name} = {str(value).lower()}' for name, value in flags.items())};\n"
        f"    static constexpr float unit = {float(codes.unit)}f;\n"
        f"    static constexpr unsigned {words};\n}};\n"
    )


def traits_name(dtype: DType) -> str:
    return dtype.name.upper()
