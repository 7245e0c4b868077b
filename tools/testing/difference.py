"""How far two arrays are apart, how far they may be, and what an array is like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tensorgraph import registry
from tensorgraph.graph import STRUCTURAL, Node

Array = np.ndarray[Any, Any]

UNDERFLOW = 2.0**-118
PEAK = 100.0
INT8_STEPS, FIXED_STEPS = 127, 8191
"""To which a product may round: up to the largest of 32 numbers."""
INT8_NMSE = 2e-4  # of a product whose activations are rounded to 8 bits, without looking at it further
INT8_PEAK = 0.1  # of its worst element
REGION_NMSE, REGION_INT8_NMSE = 1e-8, 5e-2
WHOLE_NMSE, WHOLE_INT8_NMSE = 1e-5, 1e-1


@dataclass(frozen=True)
class Difference:
    """How far a value is from what was wanted.

    Attributes:
        nmse: squared error over squared size; of whole numbers, the part of them that is not equal. Infinite where NaN or
            infinities stand in other places, or the shapes differ.
        peak: the largest error over the root mean square of what was wanted.
        at: the element that is farthest off, `got` and `wanted` there.
    """

    nmse: float
    peak: float = 0.0
    at: tuple[int, ...] = ()
    got: float = 0.0
    wanted: float = 0.0

    def beyond(self, limit: float) -> bool:
        """Whether it is more than an NMSE of `limit`, or one element alone is far off."""
        return self.nmse > limit or self.peak > PEAK * math.sqrt(limit)

    def __str__(self) -> str:
        return f"NMSE {self.nmse:.2g}, worst at {list(self.at)}: got {self.got:.9g}, wanted {self.wanted:.9g}"


def difference(got: Array, wanted: Array) -> Difference:
    """How far `got` is from `wanted`."""
    if got.shape != wanted.shape:
        return Difference(math.inf, math.inf)
    if not got.size:
        return Difference(0.0)
    if not is_float(wanted):
        wrong = got != wanted
        part = float(np.count_nonzero(wrong)) / wrong.size
        return _at(part, math.inf if part else 0.0, wrong, got, wanted)
    with np.errstate(all="ignore"):
        y, x = got.astype(np.float64), wanted.astype(np.float64)
        same = (y == x) | (np.isnan(y) & np.isnan(x))
        broken = ~same & ~(np.isfinite(y) & np.isfinite(x))
        if broken.any():
            return _at(math.inf, math.inf, broken, got, wanted)
        error = np.where(same, 0.0, np.abs(y - x))
        size = float(np.square(np.where(np.isfinite(x), x, 0.0)).sum()) + y.size * UNDERFLOW**2
        nmse, peak = float(np.square(error).sum()) / size, float(error.max()) / math.sqrt(size / y.size)
    return _at(nmse, peak, error, got, wanted)


def _at(nmse: float, peak: float, error: Array, got: Array, wanted: Array) -> Difference:
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
    return Difference(nmse, peak, at, float(got[at]), float(wanted[at]))


def is_float(array: Array) -> bool:
    """Whether its elements are real numbers."""
    return array.dtype.kind == "f" or bool(array.dtype == ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Limits:
    """How far values may be apart.

    Args:
        exact: products take numbers as they are, not rounded to 8 bits, or 14 where weights are f16 or bf16.
        node: largest NMSE of a node's value, judged with its own inputs; None is what its op, its dtype and `exact` allow.
        region: largest NMSE of a value that several nodes compute, between values that are known.
        whole: largest NMSE of what a step gives, in which the rounding of all nodes adds up; None is what `exact` allows.
    """

    exact: bool = True
    node: float | None = None
    region: float | None = None
    whole: float | None = None

    @property
    def of_whole(self) -> float:
        return self.whole if self.whole is not None else WHOLE_NMSE if self.exact else WHOLE_INT8_NMSE

    def of_region(self, node: Node) -> float:
        own = REGION_NMSE if self.exact else REGION_INT8_NMSE
        return self.region if self.region is not None else max(own, _rounding(node))

    def of_node(self, node: Node) -> float:
        """A value that two right ways of computing it round apart stays below this."""
        if self.node is not None:
            return self.node
        own = 0.0 if node.op in STRUCTURAL else registry.ops.get(node.op).tolerance
        steps = 0 if self.exact else steps_of(node)
        return max(own, _rounding(node), INT8_NMSE * (INT8_STEPS / steps) ** 2 if steps else 0.0)

    def is_far(self, node: Node, found: Difference) -> bool:
        """Whether a node's value is to be looked at further, or one element of it."""
        steps = 0 if self.exact or self.node is not None else steps_of(node)
        return found.beyond(self.of_node(node)) or (steps > 0 and found.peak > peak_of(steps))


def steps_of(node: Node) -> int:
    """To how many steps a node may round, if it is a product: its activations where weights are quantised, both where these
    are f16 or bf16; 0 for others."""
    weights = [i.dtype for i in node.inputs if i.base.op == "constant"]
    if not any(i.dtype.is_float and i.base.op != "constant" for i in node.inputs):
        return 0
    if any(dtype.is_block for dtype in weights):
        return INT8_STEPS
    return FIXED_STEPS if node.op == "mul_mat" and any(dtype.name in ("f16", "bf16") for dtype in weights) else 0


def peak_of(steps: int) -> float:
    """How far the worst element may be off where a product rounds so."""
    return INT8_PEAK * INT8_STEPS / steps


def _rounding(node: Node) -> float:
    """What a unit in the last place of a node's dtype is of its elements, squared; 0 for whole numbers."""
    numpy = node.dtype.numpy
    is_real = node.dtype.is_float and numpy is not None
    return float(ml_dtypes.finfo(numpy).eps) ** 2 if is_real else 0.0  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Statistics:
    """What an array is like; minimum, maximum, mean and deviation are those of its finite elements."""

    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float
    deviation: float
    nans: int
    infinities: int
    zeros: int

    @staticmethod
    def of(array: Array) -> Statistics:
        numbers = array.astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        low, high, mean, deviation = (float(f(finite)) if finite.size else math.nan for f in (np.min, np.max, np.mean, np.std))
        nans, infinities = int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum())
        return Statistics(str(array.dtype), array.shape, low, high, mean, deviation, nans, infinities, int((numbers == 0).sum()))

    def __str__(self) -> str:
        spread = f"{self.low:.4g} to {self.high:.4g}, mean {self.mean:.4g}, deviation {self.deviation:.4g}"
        counts = {"NaN": self.nans, "infinite": self.infinities, "zero": self.zeros}
        return "".join((f"{self.dtype}{list(self.shape)} ", spread, *(f", {n} {what}" for what, n in counts.items() if n)))
