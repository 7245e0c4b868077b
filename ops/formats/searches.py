"""Scales of groups of numbers for codes of few bits: the best of several, each tried by the codes that it gives.

They are ggml's, to the bit: in f32, sums one element after another. Shapes: x, weights [n, size] -> scales, minima [n, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from tensorgraph.ops.formats.bits import extreme, in_order, quotient, whole
from tensorgraph.ops.formats.blocks import F32

TINY = np.float32(1e-15)
"""Groups without a larger number become zeros."""


def _best_scale(
    x: F32, most: F32, inverses: Iterable[F32], found: Callable[[F32], F32], product: Callable[[F32, F32], F32]
) -> F32:
    """Of those with some inverses: that of the least error, weighted with squares; `product(x, found(q))` is what lessens it."""
    scale, best = np.zeros_like(most), np.zeros_like(most)
    for inverse in inverses:
        values = found(x * inverse)
        products, squares = in_order(product(x, values)), in_order(x * x * values * values)
        better = (squares > 0) & (products * products > best * squares)
        scale = np.where(better, quotient(products, squares), scale)
        best = np.where(better, scale * products, best)
    return np.where(np.abs(most) < TINY, np.float32(0), scale)


def centred_scale(x: F32, half: int) -> F32:
    """For codes from -half to half - 1: the best of that which makes the extreme -half, and 18 beside it."""
    most = extreme(x)
    steps = (0, *(i for i in range(-9, 10) if i))
    inverses = (quotient(-(half + np.float32(0.1) * np.float32(step)), most) for step in steps)
    return _best_scale(x, most, inverses, lambda q: whole(q, -half, half - 1), lambda x, codes: x * x * x * codes)


def table_scale(x: F32, table: F32, midpoints: F32) -> F32:
    """For codes that index a table: the best of that which makes the extreme minus the first entry, and 15 near the one that
    makes it the first entry."""
    most = extreme(x)
    inverses = (quotient(1, most / -table[0]), *(quotient(np.float32(step) + table[0], most) for step in range(-7, 8)))

    def found(q: F32) -> F32:
        return table[np.searchsorted(midpoints, q, side="right")]

    return _best_scale(x, most, inverses, found, lambda x, values: x * x * values * x)


def descended_scale(x: F32, half: int) -> F32:
    """For codes from -half to half - 1: first those that make the extreme -half; then, five times, each code is moved to where
    the others want it, if that lessens the error, weighted with squares."""
    most, weights = extreme(x), x * x
    codes = whole(x * quotient(-half, most), -half, half - 1)
    products, squares = in_order(weights * x * codes), in_order(weights * codes * codes)
    for _ in range(5):
        for i in range(x.shape[1]):
            at = slice(i, i + 1)
            code, weight, product = codes[:, at], weights[:, at], weights[:, at] * x[:, at]
            rest, rest_squares = products - product * code, squares - weight * code * code
            moved = whole(quotient(x[:, at] * rest_squares, rest), -half, half - 1)
            new, new_squares = rest + product * moved, rest_squares + weight * moved * moved
            better = (rest > 0) & (moved != code) & (new_squares > 0)
            better &= new * new * squares > products * products * new_squares
            codes[:, at] = np.where(better, moved, code)
            products, squares = np.where(better, new, products), np.where(better, new_squares, squares)
    return np.where(np.abs(most) < TINY, np.float32(0), quotient(products, squares))


def affine_scale(x: F32, weights: F32, top: int, first: float, steps: int, *, absolute: bool) -> tuple[F32, F32]:
    """For codes from 0 to top times a scale, less a minimum that is not negative: of the codes that end at the largest number and
    of those that end `first`, `first + 0.1`, ... behind it, those of the least weighted error, squared or absolute, each with
    the scale and minimum that suit them best."""
    low, high = np.minimum(x.min(axis=1, keepdims=True), np.float32(0)), x.max(axis=1, keepdims=True)
    total, total_x = in_order(weights), in_order(weights * x)
    inverse = quotient(top, high - low)
    scale, start = quotient(1, inverse), low

    def error(codes: F32, scale: F32, start: F32) -> F32:
        difference = scale * codes + start - x
        return in_order(weights * (np.abs(difference) if absolute else difference * difference))

    least = error(whole((x - low) * inverse, 0, top), scale, start)
    for step in range(steps + 1):
        ends = np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(top)
        codes = whole((x - start) * quotient(ends, high - start), 0, top)  # from where the best so far starts
        sums, squares, products = (in_order(weights * codes * by) for by in (np.float32(1), codes, x))
        determinant = total * squares - sums * sums
        new_scale = quotient(total * products - total_x * sums, determinant)
        new_start = quotient(squares * total_x - sums * products, determinant)
        new_scale = np.where(new_start > 0, quotient(products, squares), new_scale)
        new_start = np.minimum(new_start, np.float32(0))
        found = error(codes, new_scale, new_start)
        better = (determinant > 0) & (found < least)
        scale, start, least = (np.where(better, *pair) for pair in ((new_scale, scale), (new_start, start), (found, least)))
    return np.where(low == high, np.float32(0), scale), -start
