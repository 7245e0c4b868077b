"""Pairs of a token and an expert: sorted by expert, and products of an expert's weights with the rows of its pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tensorgraph.backends.cpu.activations import Kind, Rows
from tensorgraph.backends.cpu.gemm import Epilogue, Tiling, multiply_piece
from tensorgraph.backends.cpu.ir import I32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.matvec import panel_dot
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.weights import find_panel, n_tiles
from tensorgraph.dims import Extent
from tensorgraph.ops.rows.index_cpu import checked

MOST_ALONE: dict[Kind, int] = {"int8": 4, "int16": 4, "f32": 6}
"""Rows of a piece up to which panels are read for every two of them: to decode them for so few costs more."""


def most_pieces(n_experts: int, n_pairs: Extent, tokens: int) -> Extent:
    return n_pairs // tokens + n_experts


def order_bytes(n_experts: int, n_pairs: Extent, tokens: int) -> Extent:
    """Of what `Sorted` reads and writes, for pieces of at most so many rows."""
    return (1 + n_experts + n_pairs * 2 + most_pieces(n_experts, n_pairs, tokens) * 3) * 4


@dataclass(frozen=True)
class Sorted:
    """Pairs by expert, as i32 in memory: how many pieces; a place for each pair, -1 for none; the pair at each place; pieces.

    A pair is a token and one of its experts, counted as the result's rows are. A piece is an expert, the first place of its
    rows, and how many rows: at most those of a tile.
    """

    k: Kernel
    address: Value
    n_experts: int
    n_pairs: Value

    def word(self, n: Int) -> Value:
        return self.address + self.k.i64(n) * 4

    def start(self, expert: Value) -> Value:
        return self.word(expert + 1)

    def place(self, pair: Value) -> Value:
        return self.word(pair + (1 + self.n_experts))

    def pair(self, place: Value) -> Value:
        return self.word(place + self.n_pairs + (1 + self.n_experts))

    def piece(self, n: Value) -> Value:
        return self.word(n * 3 + self.n_pairs * 2 + (1 + self.n_experts))

    def read(self, address: Value) -> Value:
        return self.k.convert(self.k.load(address, I32), self.n_pairs.type)

    def write(self, number: Value, address: Value) -> None:
        self.k.store(self.k.convert(number, I32), address)

    @property
    def n_pieces(self) -> Value:
        return self.read(self.word(0))

    def read_piece(self, n: Value) -> tuple[Value, Value, Value]:
        """Its expert, first place and rows."""
        at = self.piece(n)
        return self.read(at), self.read(at + 4), self.read(at + 8)


def sort_pairs(k: Kernel, operands: Mapping[str, Operand], *, n_experts: int, tokens: int) -> None:
    """The order of pairs by expert, and pieces of at most so many of one expert."""
    ids = operands["ids"]
    n_pairs = k.i64(k.size(ids.shape))
    to = Sorted(k, operands["order"].address, n_experts, n_pairs)
    zero = k.i64(0)

    @contextmanager
    def each_pair() -> Iterator[tuple[Value, Value]]:
        """A pair and its expert, where it has one."""
        with k.loop(0, n_pairs) as loop:
            loop.next()
            number, named = checked(k, "mul_mat_id", ids.load(k.unflatten(loop.i, ids.shape)), n_experts)
            to.write(k.i64(-1), to.place(loop.i))
            with k.when(named):
                yield loop.i, number

    with k.loop(0, n_experts) as loop:
        to.write(zero, to.start(loop.i))
        loop.next()
    with each_pair() as (_, expert):
        to.write(to.read(to.start(expert)) + 1, to.start(expert))
    with k.loop(0, n_experts, 1, [zero, zero]) as loop:
        begun, n_pieces = loop.values
        here = to.read(to.start(loop.i))
        to.write(begun, to.start(loop.i))
        with k.loop(0, here, tokens, [n_pieces]) as pieces:
            at = to.piece(pieces.values[0])
            for i, number in enumerate((loop.i, begun + pieces.i, k.min(here - pieces.i, k.i64(tokens)))):
                to.write(number, at + 4 * i)
            pieces.next(pieces.values[0] + 1)
        loop.next(begun + here, pieces.results[0])
    to.write(loop.results[1], to.word(0))
    with each_pair() as (pair, expert):
        at = to.read(to.start(expert))
        to.write(at + 1, to.start(expert))
        to.write(at, to.place(pair))
        to.write(pair, to.pair(at))


def multiply_rows(
    k: Kernel, weights: Sequence[Operand], tiling: Tiling, group: Value, expert: Value, x: Rows, count: Value, store: Epilogue
) -> None:
    """What `multiply_piece` does, of few rows without decoding panels for them."""
    height = weights[0].shape[-2]
    assert isinstance(height, int)
    few = count.le(MOST_ALONE[x.kind])
    with k.when(few.invert()):
        multiply_piece(k, weights, tiling, group, expert, x, count, store)
    with k.when(few):
        first = group * tiling.per_group
        with k.loop(first, k.min(first + tiling.per_group, k.i64(n_tiles(height)))) as tiles:
            tiles.next()
            panels = [find_panel(w, tiles.i, expert) for w in weights]
            for n, some in in_steps(k, count, 2):
                found = panel_dot(k, panels, x.from_row(n, some))
                for i in range(some):
                    store(tiles.i, n + i, [sums[i] for sums in found])


def in_steps(k: Kernel, count: Value, step: int) -> Iterator[tuple[Value, int]]:
    """The first of so many numbers below a count at a time, then each that is left, and how many they are: loops around what is
    written meanwhile."""
    whole = count // step * step
    for start, stop, some in ((k.i64(0), whole, step), (whole, count, 1)):
        with k.loop(start, stop, some) as loop:
            loop.next()
            yield loop.i, some
