"""Codes that are numbers of vectors of a grid, and scales for them: the nearest vectors, and of three scales of a group the one
whose vectors leave the least error.

ggml does it otherwise: it weights errors, by an importance matrix too, without which it writes none of iq1_s, iq2_xxs and iq2_xs.
Here no error counts more than another. Numbers are rounded to 16ths of a grid's unit first, so that all sums are whole, and exact
in f32 in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorgraph.ops.formats.bits import as_f16, pack, quotient, read_f16, whole
from tensorgraph.ops.formats.blocks import F32, U8
from tensorgraph.ops.formats.grids import I8, grid
from tensorgraph.ops.formats.searches import TINY

PARTS = 16
"""Of a grid's unit, to which numbers are rounded."""
FARTHEST = 80 * PARTS
"""Of rounded numbers; no vector goes as far."""
ENDS = (1.0, 1.25, 0.8)
"""What a group's largest magnitude becomes in each try for a scale, as parts of the grid's largest."""
_AT_ONCE = 1 << 18  # products in a matrix product: stays in the cache, and is too small for BLAS to wake other threads


@dataclass(frozen=True)
class Coding:
    """How a type codes its numbers.

    Attributes:
        grid: by name.
        group: numbers of one scale.
        scales: how many there are: the odd numbers from 1, in units of `step` times the f16 of the block.
        even: of eight numbers an even count is negative; any where False.
        shared: numbers that are all a unit more than the grid's, or all a unit less; 0 where they have signs instead.
    """

    grid: str
    group: int
    scales: int
    step: float
    even: bool = False
    shared: int = 0

    @property
    def shifts(self) -> tuple[int, ...]:
        """What may be added to the vectors of the grid."""
        return (1, -1) if self.shared else (0,)

    @property
    def vectors(self) -> list[I8]:
        """The grid with each shift."""
        return [grid(self.grid) + np.int8(shift) for shift in self.shifts]

    @property
    def tries(self) -> list[tuple[float, float, float]]:
        """What a group's largest magnitude becomes, in 16ths of a unit, for each scale tried; 1 by it, and 1 by its square."""
        ends = [PARTS * part * int(np.abs(self.vectors[0]).max()) for part in ENDS]
        return [(end, 1 / end, 1 / end**2) for end in ends]


CODINGS: Mapping[str, Coding] = {
    "iq2_xxs": Coding("iq2_xxs", 32, 16, 1 / 8, even=True),
    "iq2_xs": Coding("iq2_xs", 16, 16, 1 / 8, even=True),
    "iq2_s": Coding("iq2_s", 16, 16, 1 / 8),
    "iq3_xxs": Coding("iq3_xxs", 32, 16, 1 / 4, even=True),
    "iq3_s": Coding("iq3_s", 32, 16, 1.0),
    "iq1_s": Coding("iq1", 32, 8, 1 / 8, shared=32),
    "iq1_m": Coding("iq1", 16, 8, 1 / 8, shared=8),
}


@dataclass(frozen=True)
class Codes:
    """Numbers of vectors, values in units, and for each eight the signs, or for each `shared` values whether they are less."""

    numbers: NDArray[np.intp]
    values: F32
    marks: U8


def _nearest(of: I8, x: F32) -> tuple[NDArray[np.intp], F32]:
    """Numbers of the nearest vectors, the first of those, and by how much each lessens the error; x [n, 4 or 8] in 16ths."""
    far = of.astype(np.float32)
    terms = np.concatenate([far.T, (np.float32(-PARTS / 2) * far * far).sum(axis=1)[None]])
    x = np.concatenate([x, np.ones_like(x[:, :1])], axis=1)
    numbers, gains = np.empty(len(x), np.intp), np.empty(len(x), np.float32)
    step = _AT_ONCE // terms.size
    for start in range(0, len(x), step):
        found = x[start : start + step] @ terms
        best = found.argmax(axis=1)
        numbers[start : start + step], gains[start : start + step] = best, found[np.arange(len(best)), best]
    return numbers, gains


def nearest_codes(coding: Coding, x: F32) -> Codes:
    """The nearest of what a type can say; x [n, 256] in 16ths of a unit."""
    first, *less = coding.vectors
    size = first.shape[1]
    if not less:
        eights, negative = np.abs(x).reshape(-1, 8), (x < 0).reshape(-1, 8)
        if coding.even:  # where it is not so, the smallest changes its sign
            odd = np.flatnonzero(negative.sum(axis=1) % 2)
            at = odd, eights[odd].argmin(axis=1)
            eights[at], negative[at] = -eights[at], ~negative[at]
        numbers, _ = _nearest(first, eights.reshape(-1, size))
        values = first[numbers].reshape(-1, 8)
        values = np.where(negative, -values, values)
        marks = pack(negative.astype(np.uint8), 1, 1)
    else:
        more, fewer = (_nearest(vectors, x.reshape(-1, size)) for vectors in (first, *less))
        gains = [found.reshape(-1, coding.shared // size).sum(axis=1) for _, found in (more, fewer)]
        marks = gains[1] > gains[0]
        down = np.repeat(marks, coding.shared // size)
        numbers = np.where(down, fewer[0], more[0])
        values = np.where(down[:, None], less[0][numbers], first[numbers])
    rows = len(x)
    return Codes(numbers.reshape(rows, -1), values.reshape(x.shape).astype(np.float32), marks.reshape(rows, -1).astype(np.uint8))


def _rounded(x: F32, inverse: F32) -> F32:
    return whole(x * inverse, -FARTHEST, FARTHEST)


def _group_scales(coding: Coding, x: F32) -> F32:
    """For each group the best of three: each is tried by the vectors that it gives, and is what suits these best."""
    groups = x.reshape(-1, coding.group)
    top = np.abs(groups).max(axis=1, keepdims=True)
    top = np.where(top < TINY, np.float32(0), top)
    scale, best = np.zeros_like(top), np.zeros_like(top)
    for end, per_unit, per_square in coding.tries:
        q = _rounded(groups, quotient(end, top))
        values = nearest_codes(coding, q.reshape(x.shape)).values.reshape(q.shape)
        products = (q * values).sum(axis=1, keepdims=True)
        fit = quotient(products, (values * values).sum(axis=1, keepdims=True))
        gain = products * fit * np.float32(per_square)
        better = (products > 0) & (gain > best)
        scale = np.where(better, fit * (top * np.float32(per_unit)), scale)
        best = np.where(better, gain, best)
    return scale.reshape(len(x), -1)


def encode_blocks(coding: Coding, x: F32) -> tuple[U8, U8, Codes]:
    """The f16 of each block, the codes of its groups' scales [n, groups], and the codes of its numbers."""
    scales = _group_scales(coding, x)
    step = np.float32(coding.step)
    head = as_f16(scales.max(axis=1, keepdims=True) / (step * np.float32(2 * coding.scales - 1)))
    unit = read_f16(head, 0) * step
    stored = whole((scales * quotient(1, unit) - np.float32(1)) * np.float32(0.5), 0, coding.scales - 1)
    inverse = quotient(PARTS, unit * (np.float32(2) * stored + np.float32(1)))
    q = _rounded(x.reshape(*scales.shape, coding.group), inverse[:, :, None]).reshape(x.shape)
    return head, stored.astype(np.uint8), nearest_codes(coding, q)
