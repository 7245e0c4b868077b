"""The same values in other strides, as arrays; what ops take is drawn by `tensorgraph.tools.conformance`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tensorgraph.dtypes import as_dtype
from tensorgraph.tools.conformance.draw import draw_case

__all__ = ["VIEWS", "draw_case", "view_of"]

Array = np.ndarray[Any, Any]
Draw = Callable[[Any], Any]

VIEWS = ("permuted", "sliced", "reversed", "broadcast")


def view_of(x: Array, kind: str, draw: Draw) -> Array:
    """The values of `x` in other strides; a broadcast has those of its first entry along one axis, everywhere."""
    if kind == "permuted" and x.ndim > 1:
        order = draw(st.permutations(range(x.ndim)))
        return np.array(x.transpose(order), order="C").transpose(np.argsort(order))
    if kind == "reversed":
        back = (slice(None, None, -1),) * x.ndim
        return np.array(x[back], order="C")[back]
    if kind == "broadcast" and as_dtype(x.dtype).is_float and any(n > 1 for n in x.shape):
        axis = draw(st.sampled_from([i for i, n in enumerate(x.shape) if n > 1]))
        return np.broadcast_to(x.take([0], axis), x.shape)
    between = np.nan if as_dtype(x.dtype).is_float else True  # what an op must not read
    parent = np.full([2 * n + 1 for n in x.shape], between, x.dtype)
    view: Array = parent[(..., *(slice(1, 2 * n + 1, 2) for n in x.shape))]
    view[...] = x
    return view
