"""Weights as kernels read them fast: 16 rows side by side, so that a lane of a vector is a row of the matrix.

A constant [..., M, K] in layout "r16" is `[..., ceil(M / 16), K / block]` units one after another; a unit is `block` consecutive
elements of each of 16 rows, as its type's `Interleaved` says. Rows behind the last are copies of it. Types that have no form of
their own are decoded and held as f32. `find_panel` gives the units of one tile of 16 rows to products; `load_r16_row` reads
elements of a single row (for `get_rows`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph import registry
from tensorgraph.backends.cpu.codes import ROWS, Codes
from tensorgraph.backends.cpu.constants import Held, forget, mapped_file
from tensorgraph.backends.cpu.file_blocks import InFiles, write_blocks
from tensorgraph.backends.cpu.ir import Int, Value
from tensorgraph.backends.cpu.kernel import HEADER, MESSAGES, MOST_CHUNKS, Kernel
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.backends.cpu.packing import BATCH_BYTES, Step
from tensorgraph.backends.cpu.program import OperandKey, Recipe
from tensorgraph.dtypes import DType, as_dtype, f32
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, Node

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.device import CpuDevice

LAYOUTS: tuple[str, ...] = ("r16",)
"""In the order in which they are preferred."""
_DECODED = 1 << 20  # elements at once
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Interleaved:
    """How a type's units lie, and are written and read.

    Attributes:
        block, unit_bytes: elements of one row in a unit, and bytes of it.
        file_block, file_block_bytes: elements and bytes of one row that `write` takes at a time, those of one or several units.
        write: `(k, row, n, step, to)` copies n blocks of each of 16 rows, `step` bytes apart, to the units from an address on;
            `row(r)` is where row r begins.
        row_values: `(k, unit, row, first, lanes)` -> f32 of `lanes` consecutive elements of one row, inside a unit or (block 1)
            over adjacent units.
        dtype: of floats, of which a unit has one of each row.
        codes: what elements are made of; None for floats.
        parts: of types with codes, as `InFiles` has it.
    """

    block: int
    unit_bytes: int
    file_block: int
    file_block_bytes: int
    write: Callable[[Kernel, Callable[[Int], Value], Int, Int, Value], None]
    row_values: Callable[[Kernel, Value, Value, Value, int], Value]
    dtype: DType | None = None
    codes: Codes | None = None
    parts: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None


def coded(codes: Codes, files: InFiles) -> Interleaved:
    """The form of a type whose rows have in each unit what `Codes.fields` says."""
    dtype = files.dtype

    def write(k: Kernel, row: Callable[[Int], Value], n: Int, step: Int, to: Value) -> None:
        write_blocks(k, codes, files, row, n, step, to)

    sizes = codes.block, codes.unit_bytes, dtype.block_size, dtype.block_bytes
    return Interleaved(*sizes, write, codes.row_values, codes=codes, parts=files.parts)


FORMS: dict[str, Interleaved] = {}
"""By dtype; filled by `tensorgraph.ops.formats.interleaved_cpu`."""


def interleaved(dtype: DType) -> Interleaved:
    """The form of a type: its own, or that of f32."""
    if "f32" not in FORMS:
        importlib.import_module("tensorgraph.ops.formats.interleaved_cpu")
    return FORMS.get(dtype.name, FORMS["f32"])


@dataclass(frozen=True)
class Panel:
    """16 rows of a matrix: `n_units` units from an address; the next 16 lie behind them."""

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


def same_tiles(value: Node) -> Node | None:
    """The constant of whose tiles a value is made, in order: itself, or what it is a view of; None where there is none."""
    base, index_map = value.base, value.index_map
    if base.op != "constant" or value is base:
        return base if base.op == "constant" else None
    whole = index_map.is_dense and index_map.offset == 0 and value.size == base.size
    both = (value.shape, base.shape)
    tiled = all(len(shape) > 1 and isinstance(shape[-2], int) and shape[-2] % ROWS == 0 for shape in both)
    return base if whole and tiled and value.shape[-1] == base.shape[-1] else None


def tile_readers(graph: Graph, value: Node) -> list[tuple[Node, str]]:
    """Who reads a constant, and in which slot, or a value of its tiles; outputs of such read it in no slot."""
    found = [(value, "")] if value.op == "view" and value in graph.outputs.values() else []
    for user in graph.users.get(value, ()):
        if same_tiles(user) is not None:
            found += tile_readers(graph, user)
        else:
            slots = user.slots if len(user.slots) == len(user.inputs) else ("",) * len(user.inputs)
            found += [(user, slot) for slot, i in zip(slots, user.inputs, strict=True) if i is value]
    return found


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
    """A constant in layout r16; block types come as `uint8 [..., row_bytes]`. It is on disk, perhaps, where the device keeps it.

    What lies in a mapped file is read later, but before the constant is next read by whatever the device runs.

    Raises: InputError: the array is not of that type.
    """
    assert layout == "r16"
    value = np.asarray(array)
    if dtype.is_block and value.dtype != np.uint8:
        raise InputError(f"[pack] wanted the bytes of {dtype} as uint8; got {value.dtype}")
    if not dtype.is_block and value.dtype != dtype.numpy:
        value = value.astype(dtype.numpy)
    form = interleaved(dtype)
    decode = registry.decoders.get(dtype.name) if dtype.is_block and dtype.name not in FORMS else None
    *lead, rows, length = value.shape
    width = length // dtype.block_bytes * dtype.block_size if dtype.is_block else length
    matrices = value.reshape(int(np.prod(lead)), rows, length)
    tile = width // form.block * form.unit_bytes
    size_bytes, shape = len(matrices) * n_tiles(rows) * tile, (*lead, rows, width)
    kept = device.packed.get(mapped_file(array)) if value is array else None
    if kept is not None and (found := kept.find(array, dtype, size_bytes)) is not None:
        return Held(found, layout, shape)
    held = device.constants.take(size_bytes)
    if kept is not None:
        kept.add(array, dtype, held)
    to = int(held.ctypes.data)
    if decode is None or not value.size:
        for some in _pieces(matrices):
            _interleave(some, dtype, to, device, (array, held), partial(forget, some))
            to += len(some) * n_tiles(some.shape[1]) * tile
        if value is not array or mapped_file(array) is None:  # it may change, or is held twice
            device.settle()
        return Held(held, layout, shape)
    step = max(ROWS, _DECODED // max(width, 1) // ROWS * ROWS)
    for matrix in matrices:
        for start in range(0, rows, step):
            some = decode(np.ascontiguousarray(matrix[start : start + step]))
            _interleave(some[None], f32, to, device, (held,), _nothing)
            device.settle()  # nothing more is held twice
            to += n_tiles(len(some)) * tile
    forget(array)
    return Held(held, layout, shape)


def _pieces(matrices: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Whole matrices, or whole tiles of one, so that no more than a batch of a file is resident at a time."""
    each = max(matrices[:1].nbytes, 1)
    n, rows = max(1, BATCH_BYTES // each), matrices.shape[1]
    step = rows if each <= BATCH_BYTES else max(ROWS, BATCH_BYTES * rows // each // ROWS * ROWS)
    for first in range(0, len(matrices), n):
        for start in range(0, rows, max(step, 1)):
            yield matrices[first : first + n, start : start + step]


def unpack(held: Held, dtype: DType, device: CpuDevice) -> NDArray[np.float32]:
    """The values of a constant in layout r16, as f32."""
    *lead, rows, width = held.shape
    found: NDArray[np.float32] = np.empty(held.shape, np.float32)
    keys = (
        OperandKey("units", dtype.name, "r16", (int(np.prod(lead)), rows, width), (), False),
        OperandKey("to", "f32", "dense", (1,), (1,), False),
    )
    if found.size:
        given, grain = (held.address, int(found.ctypes.data)), max(1, _CHUNK_BYTES // width)
        line, numbers = _line(device, read_units, keys, (), found.size // width, grain, given)
        table = np.array([line], np.int64)
        with device.lock:
            device.run((table, int(table.ctypes.data)), MESSAGES)
        del numbers  # it was read until now
    return found


def _interleave(
    matrices: NDArray[Any], dtype: DType, to: int, device: CpuDevice, memory: Sequence[Any], done: Callable[[], None]
) -> None:
    """[E, M, elements, or bytes that a form's `write` reads] to units from an address on, behind the caller's back."""
    if not matrices.size:
        return done()
    item = matrices.itemsize
    if any(s % item for s in matrices.strides) or (dtype.is_block and matrices.strides[-1] != 1):
        matrices = np.ascontiguousarray(matrices)
    strides = tuple(s // item for s in matrices.strides)
    dense, element = strides[-1] == 1, "u8" if dtype.is_block else dtype.name
    keys = (
        OperandKey("source", element, "dense", (None,) * 3, (None, None, 1 if dense else None), False),
        OperandKey("to", "u8", "dense", (1,), (1,), False),
    )
    n = len(matrices) * n_tiles(matrices.shape[1])
    extents = [*matrices.shape, *(strides[:-1] if dense else strides)]
    grain = max(1, _CHUNK_BYTES * n // matrices.nbytes)
    line, numbers = _line(device, write_units, keys, (("dtype", dtype.name),), n, grain, (matrices.ctypes.data, *extents, to))
    device.code.packing.add(Step(line, (matrices, numbers, *memory), done, matrices.nbytes))


def _nothing() -> None:
    pass


def _line(
    device: CpuDevice,
    emit: Any,
    keys: tuple[OperandKey, ...],
    attrs: tuple[tuple[str, Any], ...],
    items: int,
    grain: int,
    given: Sequence[int],
) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """The line of a table that calls a kernel, and memory that it reads; `given` are the addresses of its operands, the first
    one's followed by its unknown extents."""
    (code,) = device.kernels([Recipe(emit, tuple(key.name for key in keys), keys, attrs)])
    first, *extents, last = given
    n = 2 + len(extents)
    assert len(HEADER) == 3
    numbers: NDArray[np.int64] = np.empty(n + len(HEADER) + n, np.int64)
    at = int(numbers.ctypes.data)
    zero, n_items, *places = range(at, at + 8 * n, 8)
    status = device.code.executor.status_address
    numbers[:] = [0, items, *extents, status, zero, zero, first, *places, last]  # no scratch
    return (code, at + 8 * n, n_items, grain, MOST_CHUNKS, 0, 0, 0), numbers


def write_units(k: Kernel, operands: Mapping[str, Operand], *, dtype: str) -> None:
    """A kernel: matrices in row order, as bytes for block types, to units."""
    source, to = operands["source"], operands["to"]
    form, item = interleaved(as_dtype(dtype)), stored_type(source.dtype).size_bytes
    matrices, rows, length = (k.i64(n) for n in source.shape)
    tiles = (rows + (ROWS - 1)) // ROWS
    blocks = length // (form.file_block_bytes // item)
    step = k.i64(source.strides[-1]) * form.file_block_bytes
    with k.rows([matrices, tiles]) as (matrix, tile):

        def row(r: Int) -> Value:
            return source.at([matrix, k.min(tile * ROWS + r, rows - 1)])

        begin = to.address + (matrix * tiles + tile) * blocks * (form.file_block // form.block * form.unit_bytes)
        form.write(k, row, blocks, step, begin)


def read_units(k: Kernel, operands: Mapping[str, Operand]) -> None:
    """A kernel: units to f32 in row order."""
    units, to = operands["units"], operands["to"]
    matrices, rows, width = units.shape
    assert isinstance(rows, int) and isinstance(width, int)
    whole = width // ROWS * ROWS
    with k.rows([matrices, rows]) as (matrix, row):
        number, out = matrix * (n_tiles(rows) * ROWS) + row, to.address + (matrix * rows + row) * (width * 4)
        for start, stop, lanes in ((0, whole, ROWS), (whole, width, 1)):
            if start < stop:
                with k.loop(start, stop, lanes) as loop:
                    loop.next()
                    k.store(load_r16_row(units, number, loop.i, lanes), out + loop.i * 4)
