"""add, sub, mul, div: b is broadcast to a by NumPy's rule, and tiled to a where it only divides a, as in ggml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent, Shape, divide_exact, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Op, Prepared, Slots
from tensorgraph.ops.cases import THOUSANDS, at_times_long, numbers
from tensorgraph.ops.shape.repeat import repeat
from tensorgraph.source import source_line

Array = NDArray[Any]
Run = Callable[..., Array]


def _binary(name: str, formula: Callable[[Array, Array], Array], *laws: Callable[..., None]) -> Op:
    op = Op(name, "a[...]: real, b[*B]: real -> y[...]: a", inplace={"y": "a"}, rows=("a", "b"), source=f"ggml_{name}")

    @op.reference
    def reference(a: Array, b: Array) -> Array:
        return formula(a, b)

    @op.prepare
    def tiled(a: Node, b: Node) -> Prepared:
        if isinstance(a, Node) and isinstance(b, Node) and not _broadcasts(a, b) and _tiles(a, b):
            b = repeat(b, shape=[m if n == 1 else n for m, n in zip(b.shape, _last(a, b.ndim), strict=True)])
        return {"a": a, "b": b}, {}

    @op.shape
    def like_a(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
        a, b = slots["a"], slots["b"]
        if not _broadcasts(a, b):
            wanted = shape_text(_last(a, b.ndim))
            place = ", ".join(filter(None, (source_line(), b.name and f'"{b.name}"')))
            raise ShapeError(
                f"[{name}] b must be {wanted}, with 1 or a divisor on any axis, to match a {shape_text(a.shape)}; "
                f"got {shape_text(b.shape)} ({place})"
            )
        assert op.signature is not None
        return op.signature.infer(name, slots, attrs)

    @op.cases
    def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
        from hypothesis import strategies as st
        from hypothesis.extra import numpy as arrays

        shape = at_times_long(draw, draw(st.lists(st.sampled_from((0, 1, 2, 5, 8, 17)), max_size=3)))
        axes = [draw(st.sampled_from((n, 1))) for n in shape][draw(st.integers(0, len(shape))) :]
        if max(shape, default=0) in THOUSANDS or draw(st.booleans()):
            return {"a": numbers(draw, shape), "b": numbers(draw, axes)}, {}
        dtype = draw(st.sampled_from((np.float32, np.float16)))
        finite = {"allow_nan": False, "allow_infinity": False, "width": 8 * np.dtype(dtype).itemsize}
        values = st.floats(**finite)
        a = draw(arrays.arrays(dtype, tuple(shape), elements=values))
        return {"a": a, "b": draw(arrays.arrays(dtype, tuple(axes), elements=values))}, {}

    for law in laws:
        op.law(law)
    return op


def _last(a: Node, ndim: int) -> tuple[Extent, ...]:
    return a.shape[max(a.ndim - ndim, 0) :]


def _broadcasts(a: Node, b: Node) -> bool:
    return b.ndim <= a.ndim and all(n == m or n == 1 for m, n in zip(_last(a, b.ndim), b.shape, strict=True))


def _tiles(a: Node, b: Node) -> bool:
    pairs = zip(_last(a, b.ndim), b.shape, strict=False)
    return b.ndim <= a.ndim and all(n == m or (n != 0 and divide_exact(m, n) is not None) for m, n in pairs)


def commutes(run: Run, a: Array, b: Array) -> None:
    if a.shape == b.shape and a.dtype == b.dtype:
        np.testing.assert_array_equal(run(a, b), run(b, a))


def undoes_itself(run: Run, a: Array, b: Array) -> None:
    np.testing.assert_array_equal(run(a, a), np.zeros_like(a))


def one_over_itself(run: Run, a: Array, b: Array) -> None:
    np.testing.assert_array_equal(run(a, a).astype(np.float64), np.where(a == 0, np.nan, 1.0))


add = _binary("add", np.add, commutes)
sub = _binary("sub", np.subtract, undoes_itself)
mul = _binary("mul", np.multiply, commutes)
div = _binary("div", np.divide, one_over_itself)
