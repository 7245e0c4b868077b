"""Fast Walsh-Hadamard transform."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Extent, Shape
from tensorgraph.dtypes import DType
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Op
from tensorgraph.ops.cases import a_type
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]

_SIGNATURE = "x[..., N]: real -> y[..., N]: x"
_BOUND = Signature.parse(_SIGNATURE)

fwht = Op("fwht", _SIGNATURE, inplace={"y": "x"}, source="Sylvester-Hadamard matrix in natural order")
"""`x H / sqrt(N)` over the last axis, H the Sylvester-Hadamard matrix: orthogonal, and its own inverse.

Shapes: x [..., N], N a power of two -> x's.
"""


@fwht.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    found = _BOUND.infer("fwht", slots, attrs)
    n = slots["x"].shape[-1]
    if not isinstance(n, int) or n < 1 or n & (n - 1):
        raise ShapeError(f"[fwht] the last axis must be a power of two; got {n} ({source_line()})")
    return found


@fwht.reference
def reference(x: Array) -> Array:
    n = x.shape[-1]
    y, half = x / math.sqrt(n), 1
    while half < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], -2)
        half *= 2
    return y.reshape(x.shape)


@fwht.flops
def flops(node: Node) -> Extent:
    n = node.shape[-1]
    assert isinstance(n, int)
    return node.size * n.bit_length()


@fwht.law
def own_inverse(run: Callable[..., Array], x: Array) -> None:
    """Twice is nothing, and the length of a row stays."""
    y = np.float64(run(x))
    unit = {2: 2**-6, 4: 2**-18, 8: 2**-40}[x.dtype.itemsize]
    top = np.abs(np.float64(x)).max(initial=0.0) * math.sqrt(x.shape[-1])
    np.testing.assert_allclose(np.float64(run(y.astype(x.dtype))), np.float64(x), rtol=0, atol=unit * top)
    before, after = (np.sqrt(np.sum(np.square(np.float64(v)), -1)) for v in (x, y))
    np.testing.assert_allclose(after, before, rtol=0, atol=unit * top)


@fwht.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = draw(st.sampled_from(((), (0,), (1,), (3,), (2, 5))))
    n = 2 ** draw(st.integers(0, 8))
    dtype = a_type(draw)
    size = 1.0 if dtype is np.float16 else draw(st.sampled_from((1e-6, 1.0, 1e6)))
    return {"x": (rng.standard_normal((*lead, n)) * size).astype(dtype)}, {}
