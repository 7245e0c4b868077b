"""When a backend's result is right: the criterion, stated exactly.

`exact` is what the reference computes in float64, before it is rounded to the result's dtype. A result conforms where its
shape and dtype are the node's, and every element of it conforms:

- ints, bools, and all results of an op whose tolerance is 0: it equals `exact` rounded to the dtype (NaN where that is NaN).
- other floats: it is NaN exactly where `exact` is, infinite with its sign where `exact` rounds to infinity and nowhere that is
  farther from doing so than what follows allows, and else

      |got - exact| <= max(sqrt(tolerance) * |exact|, 16 * moved, 16 * lost) + half + 2**-118

`tolerance` is the op's largest NMSE, so its root is a relative error. `half` is half a unit in the last place of the dtype at
`exact`, subnormal numbers included. 2**-118 (256 times f32's smallest normal number) is what an intermediate may lose
that underflows to zero and is then multiplied. `moved` and `lost` are root mean squares over 16 draws of signs, one for each
element of each float input:

- `moved`: how far `exact` changes when every such element is multiplied by 1 + 2**-24 or 1 - 2**-24. A kernel that is
  backward stable, in whatever order it sums, errs by a few of these.
- `lost`: how far the reference, computed in float32, is from the reference in float64, both of inputs changed by a unit in the
  last place of their own dtype: what rounding intermediates costs, where they cancel. Of an op that the backend runs
  by its expansion, it is how far the expansion is, every op of it rounded to its dtype.

Where `exact` is well conditioned, 16 of either are a relative error of about 1e-6, less than sqrt(1e-10).

Two things follow from the draws. Where a change of 2**-50 moves the element as much as one of 2**-24 does (a sixteenth of
it or more), `exact` jumps there: the input stands at a tie, where no rounding is excused, and `moved` is 0. And where some
draw of `exact` is of another kind than `exact`, of finite, NaN and the two infinities, the element is a difference that
cancels to nothing, and is not compared.

Elements are judged one by one, not by their mean: one wrong lane, tail or small number does not hide behind a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Slots = Mapping[str, Array]
Compute = Callable[[Slots, Any], Array]
"""The reference, computed in the type given, float32 or float64, as float64."""

DRAWS = 16
STEP, TIE_STEP = 2.0**-24, 2.0**-50
MULTIPLE = 16.0
JUMP = 1 / 16
UNDERFLOW = 2.0**-118


@dataclass(frozen=True)
class Verdict:
    """How a result compares: the largest error as a fraction of what is allowed there (inf where none is), and where it is."""

    worst: float
    at: tuple[int, ...] = ()
    got: Any = None
    wanted: Any = None
    allowed: float = 0.0

    @property
    def ok(self) -> bool:
        return self.worst <= 1


def judge(got: Array, exact: Array, dtype: np.dtype[Any], tolerance: float, compute: Compute, slots: Slots) -> Verdict:
    """Compare a result of the right shape and dtype with `exact`; `compute` is the reference, and `slots` what it was given.

    Where it does not conform, `at` is the first element that does not, in row order.
    """
    with np.errstate(all="ignore"):
        wanted = exact.astype(dtype)
        if exact.dtype.kind != "f" or tolerance == 0 or not _is_float(dtype):
            same = (got == wanted) | ((got != got) & (wanted != wanted))
            return _verdict(np.where(same, 0.0, np.inf), np.zeros(exact.shape), got, wanted)
        rounding = half_unit(exact, dtype) + UNDERFLOW
        relative = math.sqrt(tolerance) * np.where(np.isfinite(exact), np.abs(exact), 0.0)
        allowed = relative + rounding
        fractions = _fractions(got, exact, allowed, dtype)
        if np.any(fractions > 1):
            excused, unstable = conditioning(compute, slots, exact)
            allowed = np.maximum(relative, MULTIPLE * excused) + rounding
            fractions = np.where(unstable, 0.0, _fractions(got, exact, allowed, dtype))
        return _verdict(fractions, allowed, got, wanted)


def conditioning(compute: Compute, slots: Slots, exact: Array) -> tuple[Array, Array]:
    """The larger of `moved` and `lost` of every element, and where results of another kind lie within a rounding."""
    rng = np.random.default_rng(0)
    floats = {slot: x.astype(np.float64) for slot, x in slots.items() if _is_float(x.dtype)}
    unit = {slot: float(ml_dtypes.finfo(slots[slot].dtype).eps) for slot in floats}  # type: ignore[no-untyped-call]
    moved, tie, lost = (np.zeros(exact.shape) for _ in range(3))
    unstable = np.zeros(exact.shape, bool)
    unchanged = compute(slots, np.float64)
    for _ in range(DRAWS):
        signs = {slot: rng.choice((-1.0, 1.0), x.shape) for slot, x in floats.items()}
        for step, total in ((STEP, moved), (TIE_STEP, tie)):
            changed = compute({**slots, **{slot: x * (1 + step * signs[slot]) for slot, x in floats.items()}}, np.float64)
            unstable |= _kind(changed) != _kind(unchanged)
            total += _squares(changed, unchanged)
        beside = {slot: (x * (1 + unit[slot] * signs[slot])).astype(slots[slot].dtype) for slot, x in floats.items()}
        lost += _squares(compute({**slots, **beside}, np.float32), compute({**slots, **beside}, np.float64))
    moved, tie, lost = (np.sqrt(total / DRAWS) for total in (moved, tie, lost))
    return np.maximum(np.where(tie > JUMP * moved, 0.0, moved), lost), unstable


def _kind(x: Array) -> Array:
    """0 of finite numbers, 1 and -1 of the infinities, 2 of NaN."""
    return np.where(np.isnan(x), 2.0, np.where(np.isinf(x), np.sign(x), 0.0))


def _squares(a: Array, b: Array) -> Array:
    """Squared differences, 0 where either is not finite."""
    difference = a - b
    return np.where(np.isfinite(difference), np.square(difference), 0.0)


def half_unit(exact: Array, dtype: np.dtype[Any]) -> Array:
    """Half a unit in the last place of `dtype` at each element; 0 where that is not finite."""
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    finite = np.isfinite(exact)
    _, exponent = np.frexp(np.where(finite, exact, 0.0))
    unit = np.maximum(exponent - 1, int(info.minexp)) - int(info.nmant) - 1
    return np.where(finite, np.ldexp(1.0, unit), 0.0)


def _fractions(got: Array, exact: Array, allowed: Array, dtype: np.dtype[Any]) -> Array:
    """Each element's error as a fraction of what is allowed."""
    y = got.astype(np.float64)
    error = np.abs(y - exact) / allowed
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    largest = float(info.max)
    overflows = largest + float(half_unit(np.asarray(largest), dtype))  # from here on, the nearest number is infinity
    short = np.maximum(overflows - np.abs(exact), 0.0) / allowed
    infinite = np.where(np.sign(y) == np.sign(exact), short, np.inf)
    found = np.where(np.isfinite(y), error, np.where(np.isfinite(exact), infinite, np.inf))
    same = (np.isnan(y) & np.isnan(exact)) | (y == exact)
    return np.where(same, 0.0, np.where(np.isnan(y) | np.isnan(exact), np.inf, found))


def _verdict(fractions: Array, allowed: Array, got: Array, wanted: Array) -> Verdict:
    if fractions.size == 0:
        return Verdict(0.0)
    wrong = np.flatnonzero(fractions.reshape(-1) > 1)
    index = int(wrong[0]) if wrong.size else int(np.argmax(fractions))
    at = tuple(int(i) for i in np.unravel_index(index, fractions.shape))
    return Verdict(float(fractions.max()), at, got[at].item(), wanted[at].item(), float(allowed[at]))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16
