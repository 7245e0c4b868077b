"""What ops draw their own cases from: every type, and shapes of which one axis is at times thousands long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Draw = Callable[[Any], Any]

REALS = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
INTS = (np.int32, np.int64, np.int16, np.int8, np.uint8)
ANY = (*REALS, *INTS, np.bool_)
THOUSANDS = (1031, 4099)
"""With a few rows beside them, more than one piece of work."""


def a_type(draw: Draw, types: Sequence[Any] = REALS) -> Any:
    from hypothesis import strategies as st

    return draw(st.sampled_from(types))


def generator(draw: Draw) -> np.random.Generator:
    from hypothesis import strategies as st

    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def numbers(draw: Draw, shape: Sequence[int], types: Sequence[Any] = REALS, size: float = 1.0) -> Array:
    """Of one of the types: near `size`, with many ties, or zero."""
    from hypothesis import strategies as st

    dtype, rng, kind = np.dtype(a_type(draw, types)), generator(draw), draw(st.sampled_from(("one", "ties", "zero")))
    if dtype.kind in "iub":
        low = 0 if dtype.kind in "ub" else -99
        return np.asarray(rng.integers(low, 100, tuple(shape)) * (kind != "zero")).astype(dtype)
    x = rng.standard_normal(tuple(shape)) * size
    return np.asarray(np.round(2 * x) / 2 if kind == "ties" else x * (kind == "one")).astype(dtype)


def indices(draw: Draw, low: int, end: int, shape: Sequence[int]) -> Array:
    """From low to end of any integer type that holds them."""
    ids = generator(draw).integers(low, max(end, low + 1), tuple(shape))
    fitting = [t for t in INTS if np.iinfo(t).min <= low and end - 1 <= np.iinfo(t).max]
    return ids.astype(a_type(draw, fitting))


def at_times_long(draw: Draw, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, or once in eight one of its axes thousands long, and the others at most 8 in all."""
    from hypothesis import strategies as st

    if not shape or draw(st.integers(0, 7)) != 7:
        return tuple(shape)
    at, kept, room = draw(st.integers(0, len(shape) - 1)), list(shape), 8
    for axis, n in enumerate(shape):
        if axis != at:
            kept[axis] = min(max(n, 1), room)
            room //= kept[axis]
    kept[at] = draw(st.sampled_from(THOUSANDS))
    return tuple(kept)
