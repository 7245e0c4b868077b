"""Products of interleaved weights with rows of activations: the inner loops, for a few rows and for the tiles of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorgraph.backends.cpu.activations import BLOCK, Kind, Rows
from tensorgraph.backends.cpu.blocks import Heads, multiply_blocks, read_block
from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.int8 import byte_dot
from tensorgraph.backends.cpu.ir import F32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand, read_value, stored_type
from tensorgraph.backends.cpu.weights import Panel, find_panel, interleaved
from tensorgraph.dtypes import DType

LINE = 64
AHEAD_BYTES = 8192  # how far mat-vec reads ahead
LEAST_HALVED = 8  # tiles of a matrix that is read in two places


def kind_of(dtype: DType, exact: bool) -> Kind:
    """In which form activations meet weights of a type."""
    return "f32" if exact or interleaved(dtype).codes is None else "int8"


def tiles_at_once(n_tiles: int) -> int:
    """Tiles of a matrix that mat-vec reads at once, one from each half: a core has more on the way from memory if it reads in two
    places (Zen 3: a seventh to a quarter more of most types). Of few tiles each is left to a thread."""
    return 2 if n_tiles % 2 == 0 and n_tiles >= LEAST_HALVED else 1


def unit_tiles(n_tiles: int, unit: Value) -> list[Value]:
    """The tiles of a unit, of which there are `n_tiles / tiles_at_once(n_tiles)`."""
    at_once = tiles_at_once(n_tiles)
    return [unit + n_tiles // at_once * i for i in range(at_once)]


def tile_dot(k: Kernel, weights: Operand, tiles: Sequence[Value], x: Rows, batch: Int = 0) -> list[list[Value]]:
    """Tiles of 16 rows, far from one another, times each row of x: [tile][row], f32 of 16 lanes, a lane for each weight row."""
    return panel_dot(k, [find_panel(weights, tile, batch) for tile in tiles], x)


def panel_dot(k: Kernel, panels: Sequence[Panel], x: Rows, ahead_bytes: int = AHEAD_BYTES) -> list[list[Value]]:
    """Panels of one form and length times each row of x: [panel][row], f32 of 16 lanes.

    What follows each panel in memory is what is read next, so many bytes ahead.
    """
    if x.is_integer:
        return _integer_dot(k, panels, x, ahead_bytes)
    return _float_dot(k, panels, x, ahead_bytes)


def _integer_dot(k: Kernel, panels: Sequence[Panel], x: Rows, ahead_bytes: int) -> list[list[Value]]:
    lanes = min(k.lanes, ROWS)
    parts = range(ROWS // lanes)
    codes = panels[0].form.codes
    assert codes is not None
    dot = byte_dot(k, codes.most, lanes)
    each = x.count * len(parts)

    def block(units: Sequence[Value], heads: Sequence[Heads], n: Value, sums: Sequence[Value]) -> list[Value]:
        sums, found = list(sums), x.address + (k.i64(loop.i) * codes.n_blocks + n) * x.block_bytes
        rows = [found + t * x.row_bytes for t in range(x.count)]
        for p, unit in enumerate(units):
            at = codes.at(unit, n)
            for part in parts:
                one = read_block(k, codes, dot, heads[p * len(parts) + part], at, part, lanes)
                for _, t, add in multiply_blocks(k, codes, dot, [one], rows):
                    s = p * each + t * len(parts) + part
                    sums[s] = add(sums[s])
        return sums

    with k.loop(0, panels[0].n_units, 1, [k.zero(F32.x(lanes))] * (len(panels) * each)) as loop:
        units = [p.unit(loop.i) for p in panels]
        heads = [codes.heads(k, unit, part, lanes) for unit in units for part in parts]
        if codes.n_blocks == 1:
            _prefetch(k, panels, loop.i * codes.unit_bytes + ahead_bytes, codes.unit_bytes)
            loop.next(*block(units, heads, k.i64(0), loop.values))
        else:
            with k.loop(0, codes.n_blocks, 1, loop.values) as blocks:
                begin = loop.i * codes.unit_bytes + blocks.i * codes.block_bytes
                _prefetch(k, panels, begin + ahead_bytes, codes.block_bytes)
                blocks.next(*block(units, heads, blocks.i, blocks.values))
            loop.next(*blocks.results)
    return _joined(k, loop.results, len(panels), x.count)


def _float_dot(k: Kernel, panels: Sequence[Panel], x: Rows, ahead_bytes: int) -> list[list[Value]]:
    lanes = min(k.lanes, ROWS)
    parts = range(ROWS // lanes)
    form = panels[0].form
    width = panels[0].n_units * form.block
    step = 8 if form.codes is None else BLOCK
    chains = max(1, 4 // (len(panels) * x.count))  # sums side by side, since each waits for its last
    n = len(panels) * x.count * len(parts) * chains

    def turn(i: Value, n_elements: int, sums: Sequence[Value]) -> list[Value]:
        sums, at = list(sums), x.address + i * 4
        if n_elements == step:
            _prefetch(k, panels, i // form.block * form.unit_bytes + ahead_bytes, form.unit_bytes * step // form.block)
        for p, panel in enumerate(panels):
            for part in parts:
                for e, w in enumerate(panel_values(k, panel, i, n_elements, part, lanes)):
                    for t in range(x.count):
                        s = ((p * x.count + t) * len(parts) + part) * chains + e % chains
                        sums[s] = k.fma(w, k.splat(k.load(at + (t * x.row_bytes + 4 * e), F32), lanes), sums[s])
        return sums

    sums: Sequence[Value] = [k.zero(F32.x(lanes))] * n
    whole = width // step * step
    if whole:
        with k.loop(0, whole, step, sums) as loop:
            loop.next(*turn(loop.i, step, loop.values))
        sums = loop.results
    if whole < width:
        sums = turn(k.i64(whole), width - whole, sums)
    totals = []
    for i in range(0, n, chains):
        total = sums[i]
        for other in sums[i + 1 : i + chains]:
            total = total + other
        totals.append(total)
    return _joined(k, totals, len(panels), x.count)


def panel_values(k: Kernel, panel: Panel, start: Value, count: int, part: int, lanes: int) -> Iterator[Value]:
    """f32 of some elements of the rows in a part, from one on: of coded types a block, and `start` is a multiple of 32."""
    form = panel.form
    if form.codes is not None:
        unit = panel.unit(start // form.block)
        heads = form.codes.heads(k, unit, part, lanes)
        yield from form.codes.values(k, heads, form.codes.at(unit, start % form.block // BLOCK), part, lanes)
        return
    assert form.dtype is not None
    stored, unit = stored_type(form.dtype), panel.unit(start)
    for e in range(count):
        yield read_value(k, k.load(unit + (e * ROWS + part * lanes) * stored.size_bytes, stored.x(lanes)), form.dtype)


def _prefetch(k: Kernel, panels: Sequence[Panel], ahead: Value, n_bytes: int) -> None:
    """Lines of each panel, so many bytes from its begin: of the panel that is read after it, behind its end."""
    for panel in panels:
        for line in range(0, n_bytes, LINE):
            k.prefetch(panel.address + ahead + line)


def _joined(k: Kernel, sums: Sequence[Value], n_panels: int, n_rows: int) -> list[list[Value]]:
    """[panel][row][part] to vectors of 16 lanes."""
    n_parts = len(sums) // (n_panels * n_rows)
    joined = []
    for i in range(0, len(sums), n_parts):
        some = list(sums[i : i + n_parts])
        while len(some) > 1:
            some = [k.join(a, b) for a, b in zip(some[::2], some[1::2], strict=True)]
        joined.append(some[0])
    return [joined[p * n_rows : (p + 1) * n_rows] for p in range(n_panels)]
