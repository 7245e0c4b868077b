"""Products of interleaved weights with many rows of activations, in tiles of 16 or 32 weight rows and up to 8 activation rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tensorgraph.backends.cpu.activations import Rows
from tensorgraph.backends.cpu.ir import Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.matvec import panel_dot
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.target import Target
from tensorgraph.backends.cpu.weights import find_panel, interleaved, n_tiles
from tensorgraph.dims import Extent
from tensorgraph.dtypes import DType

SIZES = (1, 4)
"""Activation rows, fewer than those of a whole tile, for which there is code."""
MOST_TOKENS = 8
"""A row buffer must be readable for this many rows behind its last."""
BLOCK_BYTES = 384 << 10  # of weights that stay in the cache while all rows pass
_SUMS = {64: (2, 16), 32: (1, 4), 16: (1, 2)}  # by bytes of a register: panels, and sums of 16 rows, of a tile
Epilogue = Callable[[Value, Value, list[Value]], None]
"""`epilogue(tile, token, sums)`: the products of rows `16 tile` to `16 tile + 15` of each weight with one activation row."""


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into pieces of equal size, weights outside: [blocks of weights, tiles of tokens, groups of panels].

    Attributes:
        n_blocks, groups: blocks of weights, and groups of panels in each; the last may have fewer.
        n_groups: groups of panels in all.
        per_group: tiles of 16 rows of each weight that a group has.
        tokens: activation rows of a piece.
        at_once: panels that are gone through side by side.
    """

    n_blocks: int
    groups: int
    n_groups: int
    per_group: int
    tokens: int
    at_once: int

    def items(self, n_rows: Extent) -> Extent:
        """Pieces of a product with so many activation rows."""
        return (n_rows + (self.tokens - 1)) // self.tokens * (self.n_blocks * self.groups)


def plan_tiles(target: Target, dtypes: Sequence[DType], rows: int, width: int) -> Tiling:
    """The pieces of a product of [rows, width] weights of these types, side by side."""
    most_panels, sums = _SUMS[target.vector_bytes]
    per_group = max(1, most_panels // len(dtypes))
    if target.vector_bytes == 64 and "vnni" not in target.has and any(_has_bytes(d) for d in dtypes):
        sums //= 2  # each takes two registers then
    n_groups = -(-n_tiles(rows) // per_group)
    group_bytes = sum(width // interleaved(d).block * interleaved(d).unit_bytes for d in dtypes) * per_group
    n_blocks = max(1, -(-n_groups * group_bytes // BLOCK_BYTES))
    groups = max(1, -(-n_groups // n_blocks))
    at_once = min(most_panels, per_group * len(dtypes))
    return Tiling(max(1, -(-n_groups // groups)), groups, n_groups, per_group, sums // at_once, at_once)


def _has_bytes(dtype: DType) -> bool:
    """Whether codes of a type have 8 bits."""
    codes = interleaved(dtype).codes
    return codes is not None and codes.bits == 8


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

    The call's items must be those of the weights' `Tiling`, times the batch.

    Args:
        x: the first of the rows.
        epilogue: called once for each tile of 16 rows and each activation row, which counts over the batch.
        matrix: which of the weights' matrices, counted over their leading axes, a number of the batch is multiplied by.
    """
    height, width = weights[0].shape[-2:]
    assert isinstance(height, int) and isinstance(width, int)
    tiling = plan_tiles(k.target, [w.dtype for w in weights], height, width)
    count = k.i64(n_rows)
    token_tiles = (count + (tiling.tokens - 1)) // tiling.tokens

    with k.rows([batch, tiling.n_blocks, token_tiles, tiling.groups]) as (number, block, token_tile, within):
        token = token_tile * tiling.tokens
        row = number * count + token

        def store(tile: Value, n: int, sums: list[Value]) -> None:
            epilogue(tile, row + n, sums)

        group, here = block * tiling.groups + within, k.min(count - token, k.i64(tiling.tokens))
        multiply_group(k, weights, tiling, group, matrix(number), x.from_row(row, 1), here, store)


def multiply_group(
    k: Kernel,
    weights: Sequence[Operand],
    tiling: Tiling,
    group: Value,
    matrix: Int,
    x: Rows,
    count: Value,
    store: Callable[[Value, int, list[Value]], None],
) -> None:
    """One group of panels of each weight times adjacent rows of activations.

    Args:
        group: of `tiling`; nothing is done where there is none of that number.
        matrix: of the weights, counted over their leading axes.
        count: of the rows, from 1 to `tiling.tokens`; as many as that must be readable. For few there is code of their own.
        store: `store(tile, n, sums)`, as an `Epilogue`, for row n of x.
    """
    height = weights[0].shape[-2]
    assert isinstance(height, int)
    tile = group * tiling.per_group

    sizes = [n for n in SIZES if n < tiling.tokens] + [tiling.tokens]

    def piece(tiles: int) -> None:
        for low, high in zip((0, *sizes), sizes, strict=False):
            with k.when(count.gt(low) & count.le(high)):
                panels = [find_panel(w, tile + i, matrix) for i in range(tiles) for w in weights]
                sums: list[list[Value]] = []
                for i in range(0, len(panels), tiling.at_once):
                    sums += panel_dot(k, panels[i : i + tiling.at_once], replace(x, count=high), panels[0].size_bytes)
                for t in range(high):
                    with k.when(k.i64(t).lt(count)):
                        for i in range(tiles):
                            store(tile + i, t, [sums[i * len(weights) + w][t] for w in range(len(weights))])

    complete = tiling.n_groups * tiling.per_group == n_tiles(height)
    with k.when(group.lt(tiling.n_groups if complete else tiling.n_groups - 1)):
        piece(tiling.per_group)
    if not complete:
        with k.when(group.eq(tiling.n_groups - 1)):
            piece(1)
