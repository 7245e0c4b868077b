"""Weights as kernels read them fast: 16 rows side by side, so that a lane of a vector is a row of the matrix.

A constant [..., M, K] in layout "r16" is `[..., ceil(M / 16), K / block]` units one after another; a unit is `block` consecutive
elements of each of 16 rows, as its type's `Interleaved` says. Rows behind the last are copies of it. Types that have no form of
their own are decoded and held as f32. `find_panel` gives the units of one tile of 16 rows to products; `load_r16_row` reads
elements of a single row (for `get_rows`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensorgraph import registry
from tensorgraph.backends.cpu.constants import Held, aligned
from tensorgraph.backends.cpu.ir import Int, Value
from tensorgraph.backends.cpu.kernel import HEADER, MESSAGES, Kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.program import OperandKey
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import InputError
from tensorgraph.graph import Node

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.device import CpuDevice

LAYOUTS: tuple[str, ...] = ("r16",)
"""In the order in which they are preferred."""
ROWS = 16
_DECODED_BYTES = 1 << 22  # f32 of a type without a form, at once
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Codes:
    """Whole numbers that elements are, but for a scale and a minimum of each block of 32: `(code - centre) * scale + minimum`.

    Attributes:
        bits: of a code, 4 or 8.
        centre: 0, 8 or 128.
        groups: `(k, unit, part, lanes)` -> 8 byte vectors of `4 * lanes`: of each row in part, elements 4 g to 4 g + 3, as u8.
        scale, minimum: `(k, unit, part, lanes)` -> f32 of the rows in part; no minimum where None.
    """

    bits: int
    centre: int
    groups: Callable[[Kernel, Value, int, int], Sequence[Value]]
    scale: Callable[[Kernel, Value, int, int], Value]
    minimum: Callable[[Kernel, Value, int, int], Value] | None = None


@dataclass(frozen=True)
class Interleaved:
    """How a type's units lie, and are written and read.

    Attributes:
        block, unit_bytes: elements of one row in a unit, and bytes of it.
        write: `(k, sources, to)` copies one block of each of 16 rows, at 16 addresses, to the unit at an address.
        values: `(k, unit, element, part, lanes)` -> f32 of one element (a Python int) of the rows in part: `lanes` rows from
            row `part * lanes`.
        row_values: `(k, unit, row, first, lanes)` -> f32 of `lanes` consecutive elements of one row, inside a unit or (block 1)
            over adjacent units.
        codes: how int8 products read it; None for floats.
    """

    block: int
    unit_bytes: int
    write: Callable[[Kernel, Sequence[Value], Value], None]
    values: Callable[[Kernel, Value, int, int, int], Value]
    row_values: Callable[[Kernel, Value, Value, Value, int], Value]
    codes: Codes | None = None


FORMS: dict[str, Interleaved] = {}
"""By dtype; filled by `tensorgraph.ops.formats.interleaved_cpu`."""


def interleaved(dtype: DType) -> Interleaved:
    """The form of a type: its own, or that of f32."""
    if not FORMS:
        importlib.import_module("tensorgraph.ops.formats.interleaved_cpu")
    return FORMS.get(dtype.name, FORMS["f32"])


@dataclass(frozen=True)
class Panel:
    """16 rows of a matrix: `n_units` units from an address."""

    form: Interleaved
    address: Value
    n_units: int

    @property
    def size_bytes(self) -> int:
        return self.n_units * self.form.unit_bytes

    def unit(self, n: Int) -> Value:
        return self.address + self.address.fn.i64(n) * self.form.unit_bytes


def n_tiles(rows: int) -> int:
    """Tiles of 16 rows."""
    return -(-rows // ROWS)


def tile_bytes(weights: Node) -> int:
    """Bytes of one tile of a constant's rows."""
    form, width = interleaved(weights.dtype), weights.shape[-1]
    assert isinstance(width, int)
    return width // form.block * form.unit_bytes


def find_panel(weights: Operand, tile: Int, batch: Int = 0) -> Panel:
    """Rows `16 tile` to `16 tile + 15` of a matrix in layout r16; `batch` counts matrices over all leading axes."""
    k, form = weights.k, interleaved(weights.dtype)
    rows, width = weights.shape[-2:]
    assert weights.layout == "r16" and isinstance(rows, int) and isinstance(width, int)
    units = width // form.block
    at = k.i64(batch) * n_tiles(rows) + tile if not (isinstance(batch, int) and batch == 0) else k.i64(tile)
    return Panel(form, weights.address + at * (units * form.unit_bytes), units)


def load_r16_row(weights: Operand, row: Value, first: Value, lanes: int = ROWS) -> Value:
    """Elements `first` to `first + lanes - 1` of one row, as f32 of so many lanes: 4, 8 or 16, any number for floats.

    `first` is a multiple of `lanes`, and all of the elements lie within the row.
    """
    k, form = weights.k, interleaved(weights.dtype)
    panel = find_panel(weights, row // ROWS)
    return form.row_values(k, panel.unit(first // form.block), row % ROWS, first % form.block, lanes)


# Packing.


def pack(array: np.ndarray, dtype: DType, layout: str, device: CpuDevice) -> Held:
    """A constant in layout r16; block types come as `uint8 [..., row_bytes]`.

    Raises: InputError: the array is not of that type.
    """
    assert layout == "r16"
    value = np.asarray(array)
    if dtype.is_block and value.dtype != np.uint8:
        raise InputError(f"[pack] wanted the bytes of {dtype} as uint8; got {value.dtype}")
    if not dtype.is_block and value.dtype != dtype.numpy:
        value = value.astype(dtype.numpy)
    form, stored = interleaved(dtype), dtype
    if dtype.name not in FORMS:
        stored = as_dtype("f32")
    *lead, rows, length = value.shape
    width = length // dtype.block_bytes * dtype.block_size if dtype.is_block else length
    matrices = value.reshape(int(np.prod(lead)), rows, length)
    each = width // form.block * form.unit_bytes
    held = aligned(len(matrices) * n_tiles(rows) * each)
    if stored is dtype:
        _interleave(matrices, stored, held.ctypes.data, device)
        return Held(held, layout, (*lead, rows, width))
    decode = registry.decoders.get(dtype.name)
    step = max(ROWS, _DECODED_BYTES // max(4 * width, 1) // ROWS * ROWS)
    to = held.ctypes.data
    for matrix in matrices:
        for start in range(0, rows, step):
            some = decode(np.ascontiguousarray(matrix[start : start + step]))
            _interleave(some[None], stored, to, device)
            to += n_tiles(len(some)) * each
    return Held(held, layout, (*lead, rows, width))


def _interleave(matrices: np.ndarray, dtype: DType, to: int, device: CpuDevice) -> None:
    """[E, M, bytes of a row, or elements] to units from an address on."""
    if not matrices.size:
        return
    item = matrices.itemsize
    if any(s % item for s in matrices.strides) or (dtype.is_block and matrices.strides[-1] != 1):
        matrices = np.ascontiguousarray(matrices)
    strides = tuple(s // item for s in matrices.strides)
    dense, element = strides[-1] == 1, "u8" if dtype.is_block else dtype.name
    keys = (
        OperandKey("source", element, "dense", (None,) * 3, (None, None, 1 if dense else None), False),
        OperandKey("to", "u8", "dense", (1,), (1,), False),
    )
    text = device.kernel_text(write_units, ("source", "to"), keys, (("dtype", dtype.name),))
    (code,) = device.jit_compile([text])
    tiles = n_tiles(matrices.shape[1])
    each = matrices.nbytes // (len(matrices) * tiles)
    extents = [*matrices.shape, *(strides[:-1] if dense else strides)]
    numbers = np.array([0, len(matrices) * tiles, *extents], np.int64)  # no scratch; items; what the kernel reads
    zero, items, *of_source = range(numbers.ctypes.data, numbers.ctypes.data + numbers.nbytes, 8)
    args = np.array([device.code.executor.status_address, zero, zero, matrices.ctypes.data, *of_source, to], np.int64)
    assert len(HEADER) == 3
    table = np.array([[code, args.ctypes.data, items, max(1, _CHUNK_BYTES // max(each, 1)), 64, 0, 0, 0]], np.int64)
    with device.lock:
        device.run((table, int(table.ctypes.data)), MESSAGES)


def write_units(k: Kernel, operands: Mapping[str, Operand], *, dtype: str) -> None:
    """A kernel: matrices in row order, as bytes for block types, to units."""
    source, to = operands["source"], operands["to"]
    stored = as_dtype(dtype)
    form = interleaved(stored)
    matrices, rows, length = (k.i64(n) for n in source.shape)
    tiles = (rows + (ROWS - 1)) // ROWS
    units = length // stored.block_bytes if stored.is_block else length
    step = k.i64(source.strides[-1]) * stored.block_bytes
    with k.rows([matrices, tiles]) as (matrix, tile):
        starts = [source.at([matrix, k.min(tile * ROWS + r, rows - 1)]) for r in range(ROWS)]
        begin = to.address + (matrix * tiles + tile) * units * form.unit_bytes
        with k.loop(0, units) as loop:
            loop.next()
            form.write(k, [start + loop.i * step for start in starts], begin + loop.i * form.unit_bytes)
