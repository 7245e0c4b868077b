"""Products of interleaved weights with many rows of activations.

A panel of weights is decoded a slice at a time, into memory that stays in the first cache, and all rows of a piece pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.activations import BLOCK, Kind, Rows
from tensorgraph.backends.cpu.blocks import load_block, multiply_blocks, read_block, store_block, stored_bytes
from tensorgraph.backends.cpu.codes import ROWS, Codes
from tensorgraph.backends.cpu.fixed import FIXED, fixed_blocks
from tensorgraph.backends.cpu.int8 import ByteDot, byte_dot, has_words, wants_wide, wide_dot
from tensorgraph.backends.cpu.ir import F32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.matvec import panel_values
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.target import Target
from tensorgraph.backends.cpu.weights import Interleaved, Panel, find_panel, interleaved, n_tiles
from tensorgraph.dims import Extent
from tensorgraph.dtypes import DType

MOST_TOKENS = 8
"""A row buffer must be readable for this many rows behind its last."""
_PIECE = 128  # activation rows that pass over a slice before it is forgotten
_SLICE_BYTES = 16 << 10  # of a decoded slice of one panel
_AT_ONCE = {64: 2, 32: 1, 16: 1}  # by bytes of a register: panels side by side
_TOKENS = {64: 8, 32: 4, 16: 2}  # and activation rows of a tile
_FLOAT_TOKENS = {64: 8, 32: 5, 16: 2}
_UNROLLED = 4  # elements of f32 in a turn
_LINE = 64
MOST_TURNS = 4  # of panels of a group
_LEAST_GROUPS = 32  # where panels take turns: so many threads find enough to do in 128 rows
_FIXED = ("f16", "bf16")
Epilogue = Callable[[Value, Value, list[Value]], None]
"""`epilogue(tile, token, sums)`: the products of rows `16 tile` to `16 tile + 15` of each weight with one activation row."""


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into pieces, rows of activations outside: [pieces of rows, groups of panels].

    Attributes:
        groups, per_group: groups of panels, and tiles of 16 rows of each weight in one; the last may have fewer.
        side: tiles of each weight that are multiplied side by side, where there are as many.
        tokens: activation rows of a piece.
        scratch_bytes: that each thread needs.
    """

    groups: int
    per_group: int
    side: int
    tokens: int
    scratch_bytes: int

    def items(self, n_rows: Extent) -> Extent:
        """Pieces of a product with so many activation rows."""
        return (n_rows + (self.tokens - 1)) // self.tokens * self.groups


def plan_tiles(target: Target, dtypes: Sequence[DType], kind: Kind, rows: int, most_turns: int = 1) -> Tiling:
    """The pieces of a product of weights with so many rows of these types, side by side.

    Panels of a group take up to `most_turns` turns: then each slice of activations is fetched once for all of these, and what is
    written lies in longer pieces. No more turns than leave `_LEAST_GROUPS` groups.
    """
    at_once, tile = _AT_ONCE[target.vector_bytes], _tile_tokens(target, kind)
    side = max(1, at_once // len(dtypes))
    turns = next(n for n in (4, 2, 1) if n <= most_turns and (n == 1 or n_tiles(rows) >= n * side * _LEAST_GROUPS))
    tokens = -(-_PIECE // tile) * tile
    room = _Room(at_once, tokens + MOST_TOKENS)
    per_group = side * turns
    return Tiling(-(-n_tiles(rows) // per_group), per_group, side, tokens, room.size_bytes(per_group * len(dtypes)))


def _tile_tokens(target: Target, kind: Kind) -> int:
    return (_FLOAT_TOKENS if kind == "f32" else _TOKENS)[target.vector_bytes]


@dataclass(frozen=True)
class _Room:
    """Scratch: decoded slices of panels, then sums of each panel, [tokens, 16] f32."""

    at_once: int
    tokens: int

    @property
    def panel_bytes(self) -> int:
        return self.tokens * ROWS * 4

    def sums(self, panel: Int) -> Int:
        return panel * self.panel_bytes + self.at_once * _SLICE_BYTES

    def size_bytes(self, panels: int) -> int:
        return panels * self.panel_bytes + self.at_once * _SLICE_BYTES


def multiply(
    k: Kernel,
    weights: Sequence[Operand],
    x: Rows,
    n_rows: Int,
    epilogue: Epilogue,
    *,
    batch: Int = 1,
    matrix: Callable[[Value], Int] = lambda n: 0,
) -> None:
    """This chunk's part of the products of weights, side by side, with `batch * n_rows` adjacent rows of activations.

    The call's items must be those of the weights' `Tiling` of `MOST_TURNS`, times the batch, and its scratch as that says.

    Args:
        x: the first of the rows.
        epilogue: called for each tile of 16 rows and each activation row, which counts over the batch.
        matrix: which of the weights' matrices, counted over their leading axes, a number of the batch is multiplied by.
    """
    tiling = plan_tiles(k.target, [w.dtype for w in weights], x.kind, _height(weights), MOST_TURNS)
    count = k.i64(n_rows)
    pieces = (count + (tiling.tokens - 1)) // tiling.tokens
    with k.rows([batch, pieces, tiling.groups]) as (number, piece, group):
        token = piece * tiling.tokens
        row = number * count + token

        def store(tile: Value, n: Value, sums: list[Value]) -> None:
            epilogue(tile, row + n, sums)

        rows = k.min(count - token, k.i64(tiling.tokens))
        multiply_piece(k, weights, tiling, group, matrix(number), x.from_row(row, 1), rows, store)


def _height(weights: Sequence[Operand]) -> int:
    height = weights[0].shape[-2]
    assert isinstance(height, int)
    return height


def multiply_piece(
    k: Kernel, weights: Sequence[Operand], tiling: Tiling, group: Value, matrix: Int, x: Rows, count: Value, store: Epilogue
) -> None:
    """One group of panels of each weight times adjacent rows of activations.

    Args:
        matrix: of the weights, counted over their leading axes.
        count: of the rows, at most `Tiling.tokens`.
        store: as an `Epilogue`, for each of the rows.
    """
    n, at_once, side = len(weights), _AT_ONCE[k.target.vector_bytes], tiling.side
    room, scratch, total = _Room(at_once, tiling.tokens + MOST_TOKENS), k.scratch(), n_tiles(_height(weights))
    first = group * tiling.per_group
    tiles = k.min(total - first, k.i64(tiling.per_group))
    lanes = min(k.lanes, ROWS)
    with k.loop(0, tiles * n) as panels, k.loop(0, count + (MOST_TOKENS - 1)) as tokens:
        panels.next()
        tokens.next()
        for part in range(ROWS // lanes):
            k.store(k.zero(F32.x(lanes)), scratch + room.sums(panels.i) + (tokens.i * ROWS + part * lanes) * 4)

    length, width = _slice_of(k, weights, x.kind), weights[0].shape[-1]
    assert isinstance(width, int)
    with k.loop(0, width, length) as slices:
        slices.next()
        n_here = k.min(width - slices.i, k.i64(length))
        here = _Slice(slices.i, n_here, x, count, scratch, side if tiling.per_group > side else 0)

        def turn(tile: Value, some: int) -> None:
            """So many tiles of each weight from one on."""
            found = [find_panel(w, first + tile + i, matrix) for i in range(some) for w in weights]
            sums = [scratch + room.sums(tile * n + i) for i in range(some * n)]
            for i in range(0, len(found), at_once):
                here.multiply(k, found[i : i + at_once], sums[i : i + at_once])

        with k.loop(0, tiles // side) as turns:
            turns.next()
            turn(turns.i * side, side)
        if total % side:
            with k.when((tiles % side).ne(0)):
                turn(tiles // side * side, total % side)
    with k.loop(0, count) as tokens, k.loop(0, tiles) as done:
        tokens.next()
        done.next()
        at = scratch + room.sums(done.i * n) + tokens.i * (ROWS * 4)
        store(first + done.i, tokens.i, [k.load(at + j * room.panel_bytes, F32.x(ROWS)) for j in range(n)])


def _slice_of(k: Kernel, weights: Sequence[Operand], kind: Kind) -> int:
    """Elements along the width that all weights have room for: whole units of each."""
    forms, lanes = [interleaved(w.dtype) for w in weights], min(k.lanes, ROWS)
    unit = max(BLOCK, *(form.block for form in forms))
    return min(slice_length(*many_dot(k, form, kind, lanes)) for form in forms) // unit * unit


@dataclass(frozen=True)
class _Slice:
    """Elements `start` to `start + n` of rows of activations, and where panels are decoded.

    `stride`: panels from one to that of the next turn; 0 where the next slice of the same one is decoded next.
    """

    start: Value
    n: Value
    x: Rows
    count: Value
    decoded: Value
    stride: int

    def multiply(self, k: Kernel, panels: Sequence[Panel], sums: Sequence[Value]) -> None:
        """Add panels side by side times these rows to sums, [count, 16] f32 of each."""
        form = panels[0].form
        assert all(panel.form is form for panel in panels)
        codes, dot = many_dot(k, form, self.x.kind, min(k.lanes, ROWS))
        if codes is not None and dot is not None:
            ahead = self.n // codes.block * codes.unit_bytes if not self.stride else k.i64(self.stride * panels[0].size_bytes)
            _decode_codes(k, panels, codes, dot, self.start, self.n, self.decoded, ahead)
            _integer_tiles(k, len(panels), codes, dot, self.x, self.start, self.n, self.count, self.decoded, sums)
        else:
            places = [self.decoded + i * _SLICE_BYTES for i in range(len(panels))]
            sources = [_values_at(k, panel, self.start, self.n, to) for panel, to in zip(panels, places, strict=True)]
            _float_tiles(k, sources, self.x, self.start, self.n, self.count, sums)


def rows_kind(target: Target, dtypes: Sequence[DType], kind: Kind, width: int = 0) -> Kind:
    """The form in which many rows are prepared for products of weights of these types, where few are of a kind.

    `width`: of rows that only such products read, where these need not be exact; 0 for others.
    """
    if kind == "f32" and width and width % BLOCK == 0 and all(d.name in _FIXED for d in dtypes):
        return "fixed" if has_words(target, target.vector_bytes // 4) else kind
    wide = [codes is not None and wants_wide(target, codes.most) for codes in (interleaved(d).codes for d in dtypes)]
    if kind != "int8" or not any(wide):
        return kind
    return "words" if width and all(wide) else "int16"


def many_dot(k: Kernel, form: Interleaved, kind: Kind, lanes: int) -> tuple[Codes, ByteDot] | tuple[None, None]:
    """Codes of a form, and how they meet many rows of a kind; None for floats."""
    codes = FIXED if kind == "fixed" else form.codes if kind != "f32" else None
    if codes is None:
        return None, None
    wide = kind == "fixed" or wants_wide(k.target, codes.most)
    return codes, wide_dot(k, codes.centre, lanes, kind in ("words", "fixed")) if wide else byte_dot(k, codes.most, lanes)


def slice_length(codes: Codes | None, dot: ByteDot | None) -> int:
    """Elements along the width of a slice: whole units, or whole blocks of f32."""
    if dot is None or codes is None:
        return _SLICE_BYTES // (ROWS * 4)
    return _SLICE_BYTES // stored_bytes(codes, dot) * BLOCK // codes.block * codes.block


def _decode_codes(
    k: Kernel, panels: Sequence[Panel], codes: Codes, dot: ByteDot, start: Value, n: Value, to: Value, ahead: Value
) -> None:
    """Blocks as products take them, from element `start` of the width on; `ahead`: bytes to what will be decoded next."""
    lanes = min(k.lanes, ROWS)
    if codes is FIXED:
        with k.loop(0, n, BLOCK) as loop:
            loop.next()
            for p, panel in enumerate(panels):
                place = to + loop.i // BLOCK * stored_bytes(codes, dot) + p * _SLICE_BYTES
                for part, block in enumerate(fixed_blocks(k, panel, start + loop.i, lanes)):
                    store_block(k, codes, block, place, part, lanes)
        return
    each = stored_bytes(codes, dot)
    first = start // codes.block
    with k.loop(0, n // codes.block) as units, k.loop(0, codes.n_blocks) as blocks:
        units.next()
        blocks.next()
        for p, panel in enumerate(panels):
            unit = panel.unit(first + units.i)
            at = codes.at(unit, blocks.i)
            for line in range(0, codes.block_bytes, _LINE):
                k.prefetch(at + ahead + line)
            place = to + (units.i * codes.n_blocks + blocks.i) * each + p * _SLICE_BYTES
            for part in range(ROWS // lanes):
                block = read_block(k, codes, dot, codes.heads(k, unit, part, lanes), at, part, lanes)
                store_block(k, codes, block, place, part, lanes)


def _integer_tiles(
    k: Kernel,
    n_panels: int,
    codes: Codes,
    dot: ByteDot,
    x: Rows,
    start: Value,
    n: Value,
    count: Value,
    decoded: Value,
    sums: Sequence[Value],
) -> None:
    lanes = min(k.lanes, ROWS)
    each, tile = stored_bytes(codes, dot), _tile_tokens(k.target, "int8")
    halves = [(p, part) for p in range(n_panels) for part in range(ROWS // lanes)]
    # codes of activations are loaded once for what is gone through together; in two sums each these would fill all registers
    together = [halves] if dot.n_sums == 1 else [[half] for half in halves]
    with k.loop(0, count, tile) as tiles, k.loop(0, n // BLOCK) as loop:
        tiles.next()
        loop.next()
        rows = [x.address + (tiles.i + t) * x.row_bytes + (start // BLOCK + loop.i) * x.block_bytes for t in range(tile)]
        for some in together:
            blocks = [load_block(k, codes, dot, decoded + loop.i * each + p * _SLICE_BYTES, part, lanes) for p, part in some]
            for b, t, add in multiply_blocks(k, codes, dot, blocks, rows):
                p, part = some[b]
                at = sums[p] + ((tiles.i + t) * ROWS + part * lanes) * 4
                k.store(add(k.load(at, F32.x(lanes))), at)


def _values_at(k: Kernel, panel: Panel, start: Value, n: Value, to: Value) -> Value:
    """f32 of 16 rows, element by element, from element `start` of the width on: where they are, or decoded."""
    form, lanes = panel.form, min(k.lanes, ROWS)
    if form.codes is None and form.unit_bytes == ROWS * 4:
        return panel.unit(start)
    step = 1 if form.codes is None else BLOCK
    with k.loop(0, n, step) as loop:
        loop.next()
        for part in range(ROWS // lanes):
            for e, value in enumerate(panel_values(k, panel, start + loop.i, step, part, lanes)):
                k.store(value, to + ((loop.i + e) * ROWS + part * lanes) * 4)
    return to


def _float_tiles(
    k: Kernel, sources: Sequence[Value], x: Rows, start: Value, n: Value, count: Value, sums: Sequence[Value]
) -> None:
    lanes, tile = min(k.lanes, ROWS), _tile_tokens(k.target, "f32")
    parts = range(ROWS // lanes)
    whole = n // _UNROLLED * _UNROLLED

    def turn(i: Value, elements: int, rows: Sequence[Value], old: Sequence[Value]) -> list[Value]:
        totals = list(old)
        for e in range(elements):
            ws = [k.load(s + ((i + e) * ROWS + part * lanes) * 4, F32.x(lanes)) for s in sources for part in parts]
            for t, row in enumerate(rows):
                value = k.splat(k.load(row + (i + e) * 4, F32), lanes)
                for j, w in enumerate(ws):
                    totals[t * len(ws) + j] = k.fma(w, value, totals[t * len(ws) + j])
        return totals

    with k.loop(0, count, tile) as tiles:
        tiles.next()
        rows = [x.address + (tiles.i + t) * x.row_bytes + start * 4 for t in range(tile)]
        at = [s + ((tiles.i + t) * ROWS + part * lanes) * 4 for t in range(tile) for s in sums for part in parts]
        with k.loop(0, whole, _UNROLLED, [k.load(a, F32.x(lanes)) for a in at]) as loop:
            loop.next(*turn(loop.i, _UNROLLED, rows, loop.values))
        with k.loop(whole, n, 1, loop.results) as rest:
            rest.next(*turn(rest.i, 1, rows, rest.values))
        for a, value in zip(at, rest.results, strict=True):
            k.store(value, a)
