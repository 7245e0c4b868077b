"""A window of a value written over, or added to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent, Shape, Symbol, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import AttributeValueError, DTypeError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Prepared, Slots
from tensorgraph.ops.cases import ANY, REALS, a_type, numbers
from tensorgraph.ops.shape.axes import of_every_axis
from tensorgraph.source import source_line

Array = NDArray[Any]
Run = Callable[..., Array]


def _window(name: str, kind: str, write: Callable[[Array, Array], Array]) -> Op:
    op = Op(
        name,
        f"a[*A]: {kind}, b[*B]: {kind} -> y[*A]: a",
        attrs={"offset": Attr(tuple)},
        inplace={"y": "a"},
        rows=(),
        source=f"ggml_{name}",
    )

    @op.prepare
    def given_by_axis(a: Node, b: Node, *, offset: Sequence[int] = ()) -> Prepared:
        return {"a": a, "b": b}, {"offset": of_every_axis(a, offset)}

    @op.shape
    def like_a(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
        a, b, offset = slots["a"], slots["b"], attrs["offset"]
        if len(offset) != a.ndim or not all(type(n) is int and n >= 0 for n in offset):
            wanted = f"numbers that are not negative, at most one for each axis of {shape_text(a.shape)}"
            raise AttributeValueError(f"[{name}] offset must be {wanted}; got {offset} ({source_line()})")
        left = [n - m - start for n, m, start in zip(a.shape, b.shape, offset, strict=False)]
        if a.ndim != b.ndim or any((n.min if isinstance(n, Symbol) else n) < 0 for n in left):
            wanted = f"within a {shape_text(a.shape)}, from {offset} on"
            raise ShapeError(f"[{name}] b must lie {wanted}; got {shape_text(b.shape)} ({source_line()})")
        if a.dtype.is_block or a.dtype != b.dtype:
            raise DTypeError(f"[{name}] b must be {a.dtype}, as a, and no block type; got {b.dtype} ({source_line()})")
        assert op.signature is not None
        return op.signature.infer(name, slots, attrs)

    @op.reference
    def reference(a: Array, b: Array, *, offset: tuple[int, ...]) -> Array:
        y = np.array(a)
        at = _at(b, offset)
        y[at] = write(y[at], b)
        return y

    @op.law
    def only_there(run: Run, a: Array, b: Array, *, offset: tuple[int, ...]) -> None:
        """Beside the window all is a; without a's content the window is b."""
        y = run(a, b, offset=offset)
        beside = np.ones(a.shape, bool)
        beside[_at(b, offset)] = False
        np.testing.assert_array_equal(y[beside], a[beside])
        np.testing.assert_array_equal(run(np.zeros_like(a), b, offset=offset)[_at(b, offset)], b)

    @op.cases
    def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
        from hypothesis import strategies as st

        shape = draw(st.lists(st.sampled_from((0, 1, 2, 5, 8, 33)), max_size=4))
        sizes = [draw(st.integers(0, n)) for n in shape]
        types = [a_type(draw, ANY if kind == "any" else REALS)]
        a, b = (numbers(draw, n, types) for n in (shape, sizes))
        return {"a": a, "b": b}, {"offset": tuple(draw(st.integers(0, n - m)) for n, m in zip(shape, sizes, strict=True))}

    @op.typical
    def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
        a, b = np.zeros((2048, 4096), np.float32), np.zeros((1024, 4096), np.float32)
        return [({"a": a, "b": b}, {"offset": (512, 0)})]

    return op


def _at(b: Array, offset: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(offset, b.shape, strict=True))


set = _window("set", "any", lambda a, b: b)
"""A copy of a in which the window of b's shape from `offset` on is b; ggml's offset and strides in bytes are elements by axis.

Of fewer numbers than axes are meant the last axes.
Raises: ShapeError: b does not certainly lie within a.
"""
acc = _window("acc", "real", lambda a, b: a + b)
"""A copy of a in which b is added to the window of its shape from `offset` on, as `set` has it."""


@set.flops
def none(node: Node) -> Extent:
    return 0


@acc.flops
def additions(node: Node) -> Extent:
    return node.inputs[1].size
