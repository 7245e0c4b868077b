"""Several products of one row of activations, with what comes before and after them, in one kernel.

Before: an RMS norm, or attention's partial results put together; each thread does this for itself, which costs less than
waiting. After: bias, gate, residual, rotation, and rows appended to a stream, 16 results at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorgraph import registry
from tensorgraph.backends.cpu.activations import Kind, Rows, row_bytes, write_row
from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.ir import F32, F64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.matvec import panel_dot, tiles_at_once, unit_tiles
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.backends.cpu.state_calls import stream_row
from tensorgraph.backends.cpu.weights import find_panel, n_tiles
from tensorgraph.dtypes import f32
from tensorgraph.ops.attention.paged_cpu import Heads, combine
from tensorgraph.ops.products.mul_mat_cpu import tile_mask

Operands = Mapping[str, Operand | None]


@dataclass(frozen=True)
class Source:
    """Where a row of activations comes from: `x` as it is, the RMS norm of `x`, or attention's partial results."""

    kind: Kind
    width: int
    norm: bool = False
    eps: float = 0.0
    heads: Heads | None = None

    @property
    def scratch_bytes(self) -> int:
        """For up to four rows, and one of f32 on the way."""
        return 4 * self.row_bytes + self.width * 4 + 128

    @property
    def row_bytes(self) -> int:
        return -(-row_bytes(self.kind, self.width) // 64) * 64


@dataclass(frozen=True)
class Part:
    """One result: the rows of a weight (with a gate: of two), and what is done to them.

    Operands: `w` (and `v`, the second weight), `bias` [M], `residual` [T, M], `table` [T, size / 2, 2]; the result `y` [T, M],
    dense or a stream; each with the part's number behind its name.
    """

    rows: int
    gate: tuple[str, tuple[tuple[str, Any], ...]] | None = None
    bias: bool = False
    residual: bool = False
    turn: int = 0  # channels of a head, whose neighbours are rotated
    stream: bool = False

    @property
    def tiles(self) -> int:
        return n_tiles(self.rows)

    @property
    def per_unit(self) -> int:
        """Tiles of a unit: those that are read at once, or one of each of two weights."""
        return tiles_at_once(self.tiles) if self.gate is None else 1

    @property
    def units(self) -> int:
        """What chunks are made of."""
        return self.tiles // self.per_unit


def emit_few(k: Kernel, operands: Operands, *, source: Source, parts: tuple[Part, ...]) -> None:
    """A few tokens: each weight is read once from memory for all of them."""
    n_tokens, rows = prepare(k, operands, source)
    n = sum(part.units for part in parts)
    start, stop = k.chunk * n // k.chunks, (k.chunk + 1) * n // k.chunks
    base = 0
    for p, part in enumerate(parts):
        low = k.min(k.max(start, k.i64(base)), k.i64(base + part.units)) - base
        high = k.min(k.max(stop, k.i64(base)), k.i64(base + part.units)) - base
        with k.loop(low, high) as loop:
            loop.next()
            tiles = unit_tiles(part.tiles, loop.i) if part.gate is None else [loop.i]
            panels = [find_panel(present(operands, f"w{p}"), tile) for tile in tiles]
            if part.gate:
                panels += [find_panel(present(operands, f"v{p}"), tile) for tile in tiles]
            with k.loop(0, n_tokens) as tokens:
                tokens.next()
                found = panel_dot(k, panels, rows.from_row(tokens.i, 1))
                finish(k, operands, p, part, [tile * ROWS for tile in tiles], tokens.i, [row[0] for row in found])
        base += part.units


def prepare(k: Kernel, operands: Operands, source: Source) -> tuple[Value, Rows]:
    """The rows as products read them, in this thread's scratch; written at its first chunk of the step."""
    rows = Rows(source.kind, k.scratch(), source.row_bytes)
    x = operands["part"] if source.heads else operands["x"]
    assert x is not None
    tokens = operands["tokens"]
    n_tokens = k.i64(tokens.shape[0]) if tokens is not None else k.i64(x.shape[0])
    with k.when(k.first), k.loop(0, n_tokens) as loop:
        loop.next()
        write_source(k, operands, source, loop.i, rows.address + loop.i * source.row_bytes, rows.address + 4 * source.row_bytes)
    return n_tokens, rows


def write_source(k: Kernel, operands: Operands, source: Source, t: Value, to: Value, between: Value) -> None:
    """Row t of the activations, at an address; `between` is room for one row of f32."""
    if source.heads is not None:
        h, part, slices, sinks = source.heads, present(operands, "part"), present(operands, "slices"), operands.get("sinks")
        n = slices.shape[0]
        with k.loop(0, h.n_kv) as kv, k.loop(0, h.group) as g:
            kv.next()
            g.next()
            one = part.address + (((t * h.n_kv + kv.i) * n) * h.group + g.i) * (h.partial * 4)
            head = kv.i * h.group + g.i
            sink = sinks.load([head]) if sinks is not None else None
            combine(k, h, one, n, sink, between + head * (h.d_v * 4))
        row, scale, weight = Row(k, f32, between, 1), None, None
    else:
        row = present(operands, "x").row([t])
        scale = root_mean_square(k, row, source.width, source.eps) if source.norm else None
        norm = operands.get("norm")
        weight = norm.row([]) if norm is not None else None

    def load(i: Value, lanes: int) -> Value:
        value = row.load(i, lanes)
        if scale is not None:
            value = value * scale
        return value if weight is None else value * weight.load(i, lanes)

    write_row(k, source.kind, load, source.width, to)


def root_mean_square(k: Kernel, row: Row, width: int, eps: float) -> Value:
    """1 / sqrt(mean of squares + eps), the sum in f64."""
    lanes = k.lanes

    def square(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
        value = k.convert(row.load(i, lanes, mask), F64)
        return [k.fma(value, value, sums[0])]

    (total,) = k.sweep(width, square, [k.zero(F64.x(lanes))])
    return k.convert(1.0 / k.unary("sqrt", k.sum(total) / float(width) + eps), F32)


def finish(k: Kernel, operands: Operands, p: int, part: Part, rows: Sequence[Value], t: Value, found: Sequence[Value]) -> None:
    """What is done to the results of some tiles (of both weights, where there is a gate) for one token.

    Shapes: rows: the first row of each tile; found: f32 of 16 lanes for each tile, then for each of the second weight.
    """
    values = list(found)
    if part.bias:
        bias = present(operands, f"bias{p}").row([])
        values = [v + bias.load(row, ROWS, tile_mask(k, part.rows, row)) for v, row in zip(values, rows, strict=True)]
    if part.gate:
        name, attrs = part.gate
        formula: Callable[..., Value] = registry.ops.get(name).kernel("cpu").formula
        n = len(rows)
        values = [formula(k, [values[i], values[n + i]], dict(attrs)) for i in range(n)]
    if part.turn:
        values = turned(k, part.turn, present(operands, f"table{p}"), t, rows, values)
    if part.residual:
        other = present(operands, f"residual{p}").row([t])
        values = [v + other.load(row, ROWS, tile_mask(k, part.rows, row)) for v, row in zip(values, rows, strict=True)]
    y = present(operands, f"y{p}")
    out = stream_row(k, y, t, "new") if part.stream else y.row([t])
    for row, value in zip(rows, values, strict=True):
        out.store(row, value, tile_mask(k, part.rows, row))


def turned(k: Kernel, size: int, table: Operand, t: Value, rows: Sequence[Value], values: Sequence[Value]) -> list[Value]:
    """Neighbouring channels rotated by the table's cosines and sines (f32 [T, size / 2, 2])."""
    base, lanes = table.at([t]), range(ROWS)
    signs = k.vector([-1.0 if i % 2 == 0 else 1.0 for i in lanes], F32)
    results = []
    for row, value in zip(rows, values, strict=True):
        both = k.load(base + row % size * 4, F32.x(ROWS))  # cos, sin, cos, sin, ...
        cos, sin = both.shuffle([i & ~1 for i in lanes]), both.shuffle([i | 1 for i in lanes])
        results.append(k.fma(value, cos, value.shuffle([i ^ 1 for i in lanes]) * (sin * signs)))
    return results


def present(operands: Operands, name: str) -> Operand:
    """An operand that a kernel cannot do without."""
    operand = operands[name]
    assert operand is not None
    return operand


__all__ = ["Part", "Source", "emit_few", "finish", "present", "write_source"]
