"""Published checkpoints: of which of their tensors, and how, the weights are made that model files build with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.dtypes import DType, f32

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """A weight made of tensors of a checkpoint.

    Attributes:
        of: the tensors' names.
        make: the weight, from their values; vectors are given in f32.
        shape: its shape, from theirs.
        dtype: its type where that is not the first tensor's.
    """

    of: tuple[str, ...]
    make: Callable[[Sequence[Array]], Array]
    shape: Callable[[Sequence[Shape]], Shape]
    dtype: DType | None = None


def same(name: str) -> Made:
    """A tensor as it is."""
    return Made((name,), lambda given: given[0], lambda shapes: shapes[0])


def plus_one(name: str) -> Made:
    """A norm's weight, stored as its distance from 1; in f32."""
    return Made((name,), lambda given: given[0].astype(np.float32) + np.float32(1.0), lambda shapes: shapes[0], f32)


def neighbours(name: str, n_head: int) -> Made:
    """Rows of queries or keys, by heads, whose rotary pairs are the two halves of a head: as neighbours."""

    def make(given: Sequence[Array]) -> Array:
        (halves,) = given
        rest = halves.shape[1:]
        return halves.reshape(n_head, 2, -1, *rest).swapaxes(1, 2).reshape(halves.shape)

    return Made((name,), make, lambda shapes: shapes[0])


def stacked(names: Sequence[str]) -> Made:
    """One matrix for each expert: all of them. Shapes: E x [M, N] -> [E, M, N]."""
    return Made(tuple(names), np.stack, lambda shapes: (len(shapes), *shapes[0]))
