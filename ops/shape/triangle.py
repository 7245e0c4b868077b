"""Matrices of which a part, told by row and column, is kept and the rest is one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import numbers

Array = NDArray[Any]

KINDS = {"upper_diag": (False, 0), "upper": (False, 1), "lower_diag": (True, 0), "lower": (True, -1)}
"""Of `tri`: whether columns up to, or from, so many to the right of the diagonal are kept."""


def _partly(name: str, attrs: Mapping[str, Attr], kept: Callable[..., tuple[bool, int]], other: float) -> Op:
    op = Op(name, "x[..., M, N]: real -> y[..., M, N]: x", attrs=attrs, inplace={"y": "x"}, rows=(), source=f"ggml_{name}")

    @op.reference
    def reference(x: Array, **given: Any) -> Array:
        lower, right = kept(**given)
        right = min(right, x.shape[-1])
        rows, columns = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])
        return np.where(columns <= rows + right if lower else columns >= rows + right, x, other)

    @op.flops
    def none(node: Node) -> Extent:
        return 0

    @op.law
    def kept_or_not(run: Callable[..., Array], x: Array, **given: Any) -> None:
        """Each element is x's or the other number, and doing it again changes nothing."""
        y = run(x, **given)
        assert np.all((y == x) | (y == other))
        np.testing.assert_array_equal(run(y, **given), y)

    @op.cases
    def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
        from hypothesis import strategies as st

        lead = draw(st.sampled_from(((), (0,), (1,), (4,), (2, 3))))
        shape = [draw(st.sampled_from((0, 1, 2, 5, 17, 64))) for _ in range(2)]
        x = numbers(draw, (*lead, *shape))
        far = (0, 1, 3, 70, 2**31 - 1, 2**31, 2**63)
        values = {n: st.sampled_from(a.choices or far) for n, a in attrs.items()}
        return {"x": x}, {n: draw(v) for n, v in values.items()}

    @op.typical
    def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
        """Scores of eight heads."""
        return [({"x": np.zeros((8, 1024, 1024), np.float32)}, {n: a.choices[-1] if a.choices else 0 for n, a in attrs.items()})]

    return op


def _past(n_past: int) -> tuple[bool, int]:
    return True, n_past


tri = _partly("tri", {"kind": Attr(str, choices=tuple(KINDS))}, lambda kind: KINDS[kind], 0.0)
"""The triangle above or below the diagonal, with it or without; zeros beside."""
diag_mask_inf = _partly("diag_mask_inf", {"n_past": Attr(int, low=0)}, _past, -np.inf)
"""-inf where the column is farther than `n_past` to the right of the diagonal."""
diag_mask_zero = _partly("diag_mask_zero", {"n_past": Attr(int, low=0)}, _past, 0.0)
"""Zeros where the column is farther than `n_past` to the right of the diagonal."""
