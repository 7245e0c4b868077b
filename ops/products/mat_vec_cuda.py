"""How mat-vec kernels divide a matrix among threads (`mat_vec.cuh`), by its shape: chosen for a GPU of the size of an H100."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorgraph.backends.cuda.launches import SHARED_BYTES
from tensorgraph.backends.cuda.weights import codes_of
from tensorgraph.dims import Extent, maximum
from tensorgraph.dtypes import DType

WARPS = 132 * 16
"""That keep enough loads in flight."""
THREADS = 256
FEW = 4
"""Tokens of a step up to which products are joined with what comes before and after them."""
_MOST_LANES = 256
_ROOM = SHARED_BYTES - (4 << 10)


@dataclass(frozen=True)
class VecPlan:
    """A kernel's constants.

    Attributes:
        x: the type of its rows in shared memory.
        chunk: units of a row that it holds at once.
        units: of a whole row.
        unit_bytes: of a unit of all rows.
        resident: blocks that a multiprocessor is to hold.
    """

    lanes: int
    depth: int
    rows: int
    x: str
    chunk: int
    shared_bytes: int
    units: int
    unit_bytes: int
    resident: int

    @property
    def fits(self) -> bool:
        """Whether rows are held whole."""
        return self.chunk >= self.units

    @property
    def per_block(self) -> int:
        """Rows of the matrix that a block takes at once."""
        return THREADS // self.lanes * self.rows


def unit_of(dtype: DType, planes: bool) -> int:
    """Elements of a row of weights that a lane takes at once."""
    return 32 if planes else 8 if dtype.block_bytes == 2 else 4


def plan_vec(dtype: DType, planes: bool, exact: bool, height: Extent, width: Extent, tokens: int) -> VecPlan:
    """For a matrix [height, width] of a type, in planes or dense, times at most `tokens` rows."""
    rows, unit = maximum(height), unit_of(dtype, planes)
    units = -(-maximum(width) // unit)
    rounded = planes and not exact
    lanes = _lanes(rows, units)
    both = rounded and tokens <= 2 and rows * lanes // 64 >= WARPS
    codes = codes_of(dtype) if planes else None
    size_bytes = 4 * codes.bits if codes is not None else 16
    steps = -(-units // lanes)
    few = both or tokens > 4 or size_bytes > 24 or (planes and not rounded)
    depth = min(max(steps, 1), 2 if few else 3 if planes else 4)
    unit_bytes = tokens * (40 if rounded else 4 * unit)
    chunk = min(max(units, 1), _ROOM // unit_bytes)
    if chunk < units:  # whole turns of all lanes
        chunk = max(chunk // (lanes * depth) * (lanes * depth), min(chunk, lanes))
    resident = 1 if not rounded and tokens > 2 else 2
    kind = f"Quantised<{tokens}>" if rounded else f"Floats<{tokens}, {unit}>"
    return VecPlan(lanes, depth, 1 + both, kind, chunk, chunk * unit_bytes, units, unit_bytes, resident)


def _lanes(rows: int, units: int) -> int:
    """Threads that share a row: more where there are few rows, fewer where a row is short."""
    lanes = 32
    while lanes < _MOST_LANES and rows * lanes // 32 < WARPS and units >= 4 * lanes:
        lanes *= 2
    if units < 96:  # those of which fewest have nothing to do in the last turn
        lanes = min((8, 16, 32), key=lambda n: (-(-max(units, 1) // n) * n, -n))
    return lanes


def narrow(plan: VecPlan) -> VecPlan:
    """With a row of weights for each warp at most: all of its lanes then have the sum."""
    return replace(plan, lanes=min(plan.lanes, 32))


__all__ = ["FEW", "THREADS", "VecPlan", "narrow", "plan_vec", "unit_of"]
