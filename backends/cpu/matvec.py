"""Products of interleaved weights with rows of activations: the inner loops, for a few rows and for the tiles of many."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.activations import BLOCK_BYTES, SCALE, SCALED_SUM, START, Kind, Rows
from tensorgraph.backends.cpu.int8 import byte_dot
from tensorgraph.backends.cpu.ir import F32, I32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.weights import ROWS, Panel, find_panel, interleaved
from tensorgraph.dtypes import DType

LINE = 64
AHEAD_BYTES = 8192  # how far mat-vec reads ahead
MOST_SUMS = 8  # vectors of sums that are made side by side in a loop: half of the registers there may be


def kind_of(dtype: DType, exact: bool) -> Kind:
    """In which form activations meet weights of a type."""
    return "f32" if exact or interleaved(dtype).codes is None else "int8"


def tile_dot(k: Kernel, weights: Operand, tile: Int, x: Rows, tiles: int = 1, batch: Int = 0) -> list[list[Value]]:
    """`tiles` adjacent tiles of 16 rows times each row of x: [tile][row], f32 of 16 lanes, a lane for each weight row."""
    panels = [find_panel(weights, k.i64(tile) + t, batch) for t in range(tiles)]
    return panel_dot(k, panels, x)


def panel_dot(k: Kernel, panels: Sequence[Panel], x: Rows, ahead_bytes: int = AHEAD_BYTES) -> list[list[Value]]:
    """Panels of one form and length times each row of x: [panel][row], f32 of 16 lanes.

    Panels of the same weights are neighbours, and those that follow them are read next: each so many bytes ahead.
    """
    if x.kind == "int8":
        return _integer_dot(k, panels, x, ahead_bytes)
    return _float_dot(k, panels, x, ahead_bytes)


def _integer_dot(k: Kernel, panels: Sequence[Panel], x: Rows, ahead_bytes: int) -> list[list[Value]]:
    lanes = min(k.lanes, ROWS)
    parts = range(ROWS // lanes)
    zero = k.zero(F32.x(lanes))
    with k.loop(0, panels[0].n_units, 1, [zero for _ in panels for _ in range(x.count) for _ in parts]) as loop:
        units, block = [p.unit(loop.i) for p in panels], x.address + loop.i * BLOCK_BYTES
        _prefetch(k, panels, loop.i, ahead_bytes)
        sums = iter(loop.values)
        old = [[[next(sums) for _ in parts] for _ in range(x.count)] for _ in panels]
        new = [[[zero for _ in parts] for _ in range(x.count)] for _ in panels]
        for some in _parts_at_once(k, panels, x, lanes):
            whole = _block_dot(k, panels, units, some, lanes, block, x)
            for p, (panel, unit) in enumerate(zip(panels, units, strict=True)):
                codes = panel.form.codes
                assert codes is not None
                scales = [codes.scale(k, unit, part, lanes) for part in some]
                least = [codes.minimum(k, unit, part, lanes) for part in some] if codes.minimum else None
                for t in range(x.count):
                    at = block + t * x.row_bytes
                    d = k.splat(k.load(at + SCALE, F32), lanes)
                    scaled_sum = k.splat(k.load(at + SCALED_SUM, F32), lanes) if least else None
                    for i, part in enumerate(some):
                        total = k.fma(k.convert(whole[p][t][i], F32), scales[i] * d, old[p][t][part])
                        if least is not None and scaled_sum is not None:
                            total = k.fma(least[i], scaled_sum, total)
                        new[p][t][part] = total
        loop.next(*(v for a in new for b in a for v in b))
    return _joined(k, loop.results, len(panels), x.count)


def _parts_at_once(k: Kernel, panels: Sequence[Panel], x: Rows, lanes: int) -> list[Sequence[int]]:
    """All parts of the panels where their sums leave registers for the rest, so that activations are loaded once for them."""
    codes, parts = panels[0].form.codes, range(ROWS // lanes)
    assert codes is not None
    dot, pairs = byte_dot(k, codes.bits, lanes), len(panels) * x.count
    few = pairs * len(parts) * dot.n_sums <= MOST_SUMS
    return [parts] if few and dot.in_turn and pairs > 1 else [[part] for part in parts]


def _block_dot(
    k: Kernel, panels: Sequence[Panel], units: Sequence[Value], parts: Sequence[int], lanes: int, block: Value, x: Rows
) -> list[list[list[Value]]]:
    """[panel][row][part] i32 of the weight rows in parts: one block's codes, less their centre, times the row's."""
    codes = panels[0].form.codes
    assert codes is not None
    dot = byte_dot(k, codes.bits, lanes)
    n_words, pairs = codes.n_words, len(panels) * x.count
    halves = [(unit, part) for unit in units for part in parts]

    def add(word: Int, sums: Sequence[Sequence[Value]]) -> list[Sequence[Value]]:
        """`sums` by panel and part, then by row."""
        sums = list(sums)
        for listed in zip(*(codes.groups(k, unit, part, lanes, word) for unit, part in halves), strict=True):
            weights, at = [dot.of_codes(of_half) for _, of_half in listed], block + k.i64(listed[0][0]) * 4
            for t in range(x.count):
                row = dot.of_four(k.splat(k.load(at + t * x.row_bytes, I32), lanes))
                for h in range(len(halves)):
                    sums[h * x.count + t] = dot.add(sums[h * x.count + t], weights[h], row)
        return sums

    sums: list[Sequence[Value]] = [()] * (len(halves) * x.count)
    if pairs == 1 or not dot.in_turn:
        for word in range(n_words):
            sums = add(word, sums)
    else:
        sums = add(0, sums)
        each = len(sums[0])
        with k.loop(1, n_words, 1, [v for total in sums for v in total]) as loop:
            old = [loop.values[i : i + each] for i in range(0, len(loop.values), each)]
            loop.next(*(v for total in add(loop.i, old) for v in total))
        sums = [loop.results[i : i + each] for i in range(0, len(loop.results), each)]
    zero = k.zero(I32.x(lanes))
    starts = [block + (t * x.row_bytes + START[codes.centre]) if codes.centre else None for t in range(x.count)]
    offsets = [zero if at is None else k.splat(k.load(at, I32), lanes) for at in starts] * len(halves)
    ends = [dot.end(total, offset) for total, offset in zip(sums, offsets, strict=True)]
    by_half = [ends[i : i + x.count] for i in range(0, len(ends), x.count)]
    n = len(parts)
    return [[[by_half[p * n + i][t] for i in range(n)] for t in range(x.count)] for p in range(len(panels))]


def _float_dot(k: Kernel, panels: Sequence[Panel], x: Rows, ahead_bytes: int) -> list[list[Value]]:
    lanes = min(k.lanes, ROWS)
    parts = range(ROWS // lanes)
    form = panels[0].form
    width = panels[0].n_units * form.block
    step = form.block if form.block > 1 else 8
    chains = max(1, 4 // (len(panels) * x.count))  # sums side by side, since each waits for its last
    n = len(panels) * x.count * len(parts) * chains

    def turn(i: Value, n_elements: int, sums: Sequence[Value]) -> list[Value]:
        sums = list(sums)
        units, at = [p.unit(i // form.block) for p in panels], x.address + i * 4
        if n_elements == step:
            _prefetch(k, panels, i // form.block, ahead_bytes, step // form.block)
        for e in range(n_elements):
            xs = [k.splat(k.load(at + (t * x.row_bytes + 4 * e), F32), lanes) for t in range(x.count)]
            for p, (panel, unit) in enumerate(zip(panels, units, strict=True)):
                for part in parts:
                    w = panel.form.values(k, unit, e, part, lanes)
                    for t in range(x.count):
                        s = ((p * x.count + t) * len(parts) + part) * chains + e % chains
                        sums[s] = k.fma(w, xs[t], sums[s])
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


def _prefetch(k: Kernel, panels: Sequence[Panel], unit: Value, ahead_bytes: int, n_units: int = 1) -> None:
    """The lines of as many units of each panel, so many bytes on: of the panel that is read after it, behind its end."""
    for panel in panels:
        at = unit * panel.form.unit_bytes + ahead_bytes
        beside = sum(other.weights is panel.weights for other in panels) - 1
        if beside:  # these are passed over
            at = at + k.select(at.lt(panel.size_bytes), k.i64(0), beside * panel.size_bytes)
        for line in range(0, panel.form.unit_bytes * n_units, LINE):
            k.prefetch(panel.address + at + line)


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
