"""A mixture of experts in a few kernels: rows by expert; gate, up and their unit; down and the weighed sum.

Units are written as the second product reads its rows, at the places of their pairs in the order of experts. Of a few tokens,
each panel of weights is read once for all rows of its expert, and sums of tokens are made where it is; of many, pieces are
products of matrices, and another step sums them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorgraph import registry
from tensorgraph.backends.cpu.activations import BLOCK, Kind, Rows, block_bytes, quantise_blocks, row_bytes, write_row
from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.gemm import MOST_TOKENS, Tiling, plan_tiles
from tensorgraph.backends.cpu.ir import F32, I32, Value
from tensorgraph.backends.cpu.kernel import CHUNK, MOST_CHUNKS, Buffer, Call, Context, Emit, Kernel, Ref
from tensorgraph.backends.cpu.matvec import panel_dot
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.target import Target
from tensorgraph.backends.cpu.weights import find_panel, interleaved, n_tiles
from tensorgraph.dims import Extent, Guard
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node
from tensorgraph.ops.products.linear_cpu import Operands, present
from tensorgraph.ops.products.mul_mat_cpu import guarded, load_f32, tile_mask
from tensorgraph.ops.products.pairs_cpu import Sorted, in_steps, most_pieces, multiply_rows, order_bytes, sort_pairs

FEW = 4
"""Tokens of which sums are made where their products are."""
MORE = ("more0", "more1")
"""Values that are added to the sum."""
_CHUNK_BYTES = 1 << 18  # of weights
_AT_ONCE = 4  # rows whose blocks are rounded together


@dataclass(frozen=True)
class Mixture:
    """`y[t] = sum of w[t, u] * (down @ unit(gate @ x[t], up @ x[t]))` over a token's experts, and what is added to it.

    Operands: `x` [T, 1, D], `ids` [T, U], `w` [T, U, 1], weights `gate` and `up` [E, M, D] and `down` [E, N, M]; `gate_bias`,
    `up_bias`, `down_bias`, [E, ...], where there are any; `more0`, `more1` [T, N], which are added; the result `y` [T, N].

    Attributes:
        weights: the types of gate, up and down.
        kind, middle: the form of rows of x, and of units.
        unit, attrs: the op that makes a unit of gate and up.
    """

    weights: tuple[DType, DType, DType]
    kind: Kind
    middle: Kind
    unit: str
    attrs: tuple[tuple[str, Any], ...]
    n_experts: int
    n_used: int
    width: int
    size: int
    height: int

    def first(self, target: Target) -> Tiling:
        """Of gate and up."""
        return plan_tiles(target, self.weights[:2], self.kind, self.size)

    def second(self, target: Target) -> Tiling:
        return plan_tiles(target, self.weights[2:], self.middle, self.height)

    def piece(self, target: Target) -> int:
        """Most rows of a piece."""
        return min(self.first(target).tokens, self.second(target).tokens)

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.kind, self.width)

    @property
    def unit_bytes(self) -> int:
        """Of a pair's units."""
        return row_bytes(self.middle, self.size)

    @property
    def tiles_together(self) -> int:
        """Tiles of units that are written together: those of a block, where they are rounded."""
        return BLOCK // ROWS if self.middle != "f32" else 1

    def groups_together(self, target: Target) -> int:
        """The same in groups of panels."""
        return max(1, self.tiles_together // self.first(target).per_group)

    def room(self, target: Target) -> int:
        """Where units are kept until they are rounded, behind what gate and up need of scratch."""
        return -(-self.first(target).scratch_bytes // 64) * 64

    @property
    def grain(self) -> int:
        """Tiles of down in a chunk, so many that each expert's are worth it."""
        form = interleaved(self.weights[2])
        tile_bytes = self.size // form.block * form.unit_bytes
        return max(1, min(_CHUNK_BYTES // (tile_bytes * self.n_used), n_tiles(self.height) // 8))

    @property
    def most_tiles(self) -> int:
        """Of a chunk."""
        tiles = n_tiles(self.height)
        return -(-tiles // min(MOST_CHUNKS, -(-tiles // self.grain)))


def mixture_calls(
    context: Context, m: Mixture, given: Mapping[str, Ref | None], n_tokens: Extent, nodes: Sequence[tuple[Node, ...]]
) -> list[Call]:
    """The calls of a mixture; `nodes` are those of units, of down, and of sums."""
    target, pairs = context.target, n_tokens * m.n_used
    first, second, piece = m.first(target), m.second(target), m.piece(target)
    order = Ref(Buffer(order_bytes(m.n_experts, pairs, piece), "order"))
    rows = Ref(Buffer((n_tokens + MOST_TOKENS) * m.row_bytes, "rows"))
    units = Ref(Buffer((pairs + MOST_TOKENS) * m.unit_bytes, "units"))
    of_order = {"ids": given["ids"], "order": order}
    of_units = {**of_order, "units": units} | {name: given.get(name) for name in ("gate", "up", "gate_bias", "up_bias")}
    of_down = {**of_order, "units": units} | {name: given.get(name) for name in ("down", "down_bias")}
    of_sums = {**of_order} | {name: given.get(name) for name in ("w", *MORE, "y")}
    placed = Ref(Buffer((pairs + MOST_TOKENS) * m.row_bytes, "placed"))
    products = Ref(Buffer((pairs + MOST_TOKENS) * m.height * 4, "products"))
    of_unit, of_product, of_sum = nodes
    few, many = n_tokens <= FEW, n_tokens > FEW

    def call(
        emit: Emit,
        nodes: tuple[Node, ...],
        operands: Mapping[str, Ref | None],
        items: Extent,
        grain: int = 1,
        scratch: int = 0,
        guard: Guard | bool = True,
        apart: bool = False,
    ) -> list[Call]:
        made = Call(emit, operands, {"m": m}, items, max(1, grain), apart=apart, scratch_bytes=scratch, nodes=nodes)
        return guarded(made, guard)

    rows_at_once, sums_at_once = CHUNK // m.width, CHUNK // (m.height * m.n_used)
    tiles, n_pieces = n_tiles(m.size) // m.tiles_together, most_pieces(m.n_experts, pairs, piece)
    items = n_pieces * (first.groups // m.groups_together(target))
    room = m.most_tiles * FEW * ROWS * 4, m.room(target) + piece * BLOCK * 4, second.scratch_bytes
    return [
        *call(sort_and_write, of_unit[:1], {**of_order, "x": given["x"], "rows": rows}, n_tokens, rows_at_once),
        *call(units_of_few, of_unit, {**of_units, "rows": rows}, pairs * tiles, guard=few, apart=True),
        *call(sums_of_few, (*of_product, *of_sum), {**of_down, **of_sums}, n_tiles(m.height), m.grain, room[0], few, apart=True),
        *call(place_rows_of_tokens, of_unit[:1], {**of_order, "rows": rows, "placed": placed}, pairs, rows_at_once, guard=many),
        *call(units_of_many, of_unit, {**of_units, "rows": placed}, items, scratch=room[1], guard=many),
        *call(
            products_of_many, of_product, {**of_down, "products": products}, n_pieces * second.groups, scratch=room[2], guard=many
        ),
        *call(sum_products, of_sum, {**of_sums, "products": products}, n_tokens, sums_at_once, guard=many),
    ]


def sort_and_write(k: Kernel, operands: Operands, *, m: Mixture) -> None:
    """The order of pairs, by the first chunk, and each token's row as products read it."""
    x, rows = present(operands, "x"), present(operands, "rows")
    with k.when(k.chunk.eq(0)):
        ordered = {name: present(operands, name) for name in ("ids", "order")}
        sort_pairs(k, ordered, n_experts=m.n_experts, tokens=m.piece(k.target))
    with k.rows(x.shape[:1]) as (t,):
        write_row(k, m.kind, load_f32(k, x.row([t, 0])), m.width, rows.address + t * m.row_bytes)


def place_rows_of_tokens(k: Kernel, operands: Operands, *, m: Mixture) -> None:
    """Copies of tokens' rows at the places of their pairs."""
    order, rows, placed = sorted_pairs(k, operands, m), present(operands, "rows"), present(operands, "placed")
    with k.span(order.n_pairs) as pairs:
        place, source = order.read(order.place(pairs.i)), rows.address + pairs.i // m.n_used * m.row_bytes
        to = placed.address + place * m.row_bytes

        def copy(i: Value, mask: Value | None, _: list[Value]) -> None:
            k.store(k.load(source + i * 4, I32.x(k.lanes), mask=mask), to + i * 4, mask=mask)

        with k.when(place.ge(0)):
            k.sweep(m.row_bytes // 4, copy)


def units_of_few(k: Kernel, operands: Operands, *, m: Mixture) -> None:
    """Units of all pairs, expert by expert."""
    order, rows, units = sorted_pairs(k, operands, m), present(operands, "rows"), present(operands, "units")
    with k.rows([order.n_pieces, n_tiles(m.size) // m.tiles_together]) as (piece, number):
        expert, first, count = order.read_piece(piece)
        tiles = [number * m.tiles_together + i for i in range(m.tiles_together)]
        for n, some in in_steps(k, count, 2):
            tokens = [order.read(order.pair(first + (n + i))) // m.n_used for i in range(some)]
            start = rows.address + tokens[0] * m.row_bytes
            x = Rows(m.kind, start, (tokens[-1] - tokens[0]) * m.row_bytes, some)  # the second of two lies so far behind
            found = [
                panel_dot(k, [find_panel(present(operands, name), tile, expert) for name in ("gate", "up")], x) for tile in tiles
            ]
            for i in range(some):
                values = [unit(k, operands, m, expert, t, [s[i] for s in sums]) for t, sums in zip(tiles, found, strict=True)]
                to = units.address + (first + (n + i)) * m.unit_bytes
                if m.middle != "f32":
                    lanes = min(k.lanes, ROWS)
                    parts = [v.shuffle(range(j, j + lanes)) for v in values for j in range(0, ROWS, lanes)]
                    quantise_blocks(k, m.middle, [parts], to + number * block_bytes(m.middle))
                else:
                    k.store(values[0], to + number * (ROWS * 4), mask=tile_mask(k, m.size, number * ROWS))


def units_of_many(k: Kernel, operands: Operands, *, m: Mixture) -> None:
    """Units of every piece, piece by piece."""
    order, rows, units = sorted_pairs(k, operands, m), present(operands, "rows"), present(operands, "units")
    tiling, together = m.first(k.target), m.groups_together(k.target)
    between, lanes = k.scratch() + m.room(k.target), min(k.lanes, ROWS)
    with k.rows([order.n_pieces, tiling.groups // together]) as (piece, number):
        expert, first, count = order.read_piece(piece)
        x = Rows(m.kind, rows.address + first * m.row_bytes, m.row_bytes)
        to = units.address + first * m.unit_bytes

        def store(tile: Value, n: Value, sums: list[Value]) -> None:
            value = unit(k, operands, m, expert, tile, sums)
            if m.middle != "f32":
                k.store(value, between + n * (BLOCK * 4) + tile % 2 * (ROWS * 4))
            else:
                k.store(value, to + n * m.unit_bytes + tile * (ROWS * 4), mask=tile_mask(k, m.size, tile * ROWS))

        weights = [present(operands, "gate"), present(operands, "up")]
        with k.loop(0, together) as groups:
            groups.next()
            multiply_rows(k, weights, tiling, number * together + groups.i, expert, x, count, store)
        if m.middle != "f32":
            for n, some in in_steps(k, count, _AT_ONCE):
                sources = [between + (n + i) * (BLOCK * 4) for i in range(some)]
                blocks = [[k.load(source + j * 4, F32.x(lanes)) for j in range(0, BLOCK, lanes)] for source in sources]
                quantise_blocks(k, m.middle, blocks, to + n * m.unit_bytes + number * block_bytes(m.middle), m.unit_bytes)


def unit(k: Kernel, operands: Operands, m: Mixture, expert: Value, tile: Value, sums: Sequence[Value]) -> Value:
    """A tile of units, from the sums of gate and up."""
    both = [biased(k, operands.get(f"{name}_bias"), expert, tile, s) for name, s in zip(("gate", "up"), sums, strict=True)]
    value: Value = registry.ops.get(m.unit).kernel("cpu").formula(k, both, dict(m.attrs))
    return k.convert(value, F32)


def sums_of_few(k: Kernel, operands: Operands, *, m: Mixture) -> None:
    """Some tiles of all tokens: down of every pair, weighed and summed expert by expert."""
    order, units, w = sorted_pairs(k, operands, m), present(operands, "units"), present(operands, "w")
    n_tokens, tiles, lanes = k.i64(w.shape[0]), n_tiles(m.height), F32.x(ROWS)
    start, stop = k.chunk * tiles // k.chunks, (k.chunk + 1) * tiles // k.chunks

    def kept(tile: Value, token: Value) -> Value:
        return k.scratch() + ((tile - start) * FEW + token) * (ROWS * 4)

    with k.loop(start, stop) as each, k.loop(0, n_tokens) as tokens:
        each.next()
        tokens.next()
        k.store(k.zero(lanes), kept(each.i, tokens.i))
    with k.loop(0, order.n_pieces) as pieces, k.loop(start, stop) as each:
        pieces.next()
        each.next()
        expert, first, count = order.read_piece(pieces.i)
        panel = find_panel(present(operands, "down"), each.i, expert)
        for n, some in in_steps(k, count, 2):
            x = Rows(m.middle, units.address + (first + n) * m.unit_bytes, m.unit_bytes, some)
            for i, sums in enumerate(panel_dot(k, [panel], x)[0]):
                pair = order.read(order.pair(first + (n + i)))
                token, used = pair // m.n_used, pair % m.n_used
                value = biased(k, operands.get("down_bias"), expert, each.i, sums)
                place = kept(each.i, token)
                k.store(k.fma(value, k.splat(w.load([token, used, 0]), ROWS), k.load(place, lanes)), place)
    with k.loop(start, stop) as each, k.loop(0, n_tokens) as tokens:
        each.next()
        tokens.next()
        value, mask = k.load(kept(each.i, tokens.i), lanes), tile_mask(k, m.height, each.i * ROWS)
        for row in (more.row([tokens.i]) for more in (operands.get(name) for name in MORE) if more is not None):
            value = value + row.load(each.i * ROWS, ROWS, mask)
        present(operands, "y").row([tokens.i]).store(each.i * ROWS, value, mask)


def products_of_many(k: Kernel, operands: Operands, *, m: Mixture) -> None:
    """Down of every piece, at the places of pairs."""
    order, units, products = sorted_pairs(k, operands, m), present(operands, "units"), present(operands, "products")
    tiling = m.second(k.target)
    with k.rows([order.n_pieces, tiling.groups]) as (piece, group):
        expert, first, count = order.read_piece(piece)

        def store(tile: Value, n: Value, sums: list[Value]) -> None:
            value = biased(k, operands.get("down_bias"), expert, tile, sums[0])
            to = products.address + ((first + n) * m.height + tile * ROWS) * 4
            k.store(value, to, mask=tile_mask(k, m.height, tile * ROWS))

        x = Rows(m.middle, units.address + first * m.unit_bytes, m.unit_bytes)
        multiply_rows(k, [present(operands, "down")], tiling, group, expert, x, count, store)


def sum_products(k: Kernel, operands: Operands, *, m: Mixture) -> None:
    """The weighed sum over a token's experts, in their order."""
    order, products, w, y = (sorted_pairs(k, operands, m), *(present(operands, name) for name in ("products", "w", "y")))
    more = [operand for operand in (operands.get(name) for name in MORE) if operand is not None]
    with k.rows(w.shape[:1]) as (token,):
        out, added = y.row([token]), [operand.row([token]) for operand in more]

        def begin(i: Value, mask: Value | None, _: list[Value]) -> None:
            value = k.zero(F32.x(k.lanes))
            for row in added:
                value = value + row.load(i, k.lanes, mask)
            out.store(i, value, mask)

        k.sweep(m.height, begin)
        with k.loop(0, m.n_used) as used:
            used.next()
            place = order.read(order.place(token * m.n_used + used.i))
            source, by = products.address + place * (m.height * 4), k.splat(w.load([token, used.i, 0]), k.lanes)

            def add(i: Value, mask: Value | None, _: list[Value]) -> None:
                value = k.load(source + i * 4, F32.x(k.lanes), mask=mask)
                out.store(i, k.fma(value, by, out.load(i, k.lanes, mask)), mask)

            with k.when(place.ge(0)):
                k.sweep(m.height, add)


def biased(k: Kernel, bias: Operand | None, expert: Value, tile: Value, sums: Value) -> Value:
    """Products of a tile, and the expert's bias where there is one."""
    if bias is None:
        return sums
    height = bias.shape[-1]
    assert isinstance(height, int)
    return sums + bias.row([expert]).load(tile * ROWS, ROWS, tile_mask(k, height, tile * ROWS))


def sorted_pairs(k: Kernel, operands: Operands, m: Mixture) -> Sorted:
    return Sorted(k, present(operands, "order").address, m.n_experts, k.i64(k.size(present(operands, "ids").shape)))
