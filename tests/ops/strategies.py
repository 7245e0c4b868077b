"""Inputs for any op: drawn by the op itself (`Op.cases`) or from its signature, and the same values in other strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.op import Attr, Op
from tensorgraph.signature import Argument

Array = np.ndarray[Any, Any]
Draw = Callable[[Any], Any]
Slots = dict[str, Array]

EXTENTS = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64, 67, 130)  # empty, one, odd, prime, just off a vector's width
LEADING = (0, 1, 2, 3, 5)
TYPES = {
    "real": ("f32", "f16", "bf16"),
    "float": ("f32", "f16", "bf16"),
    "int": ("i32", "i64"),
    "any": ("f32", "f16", "bf16", "i32", "bool"),
}
VIEWS = ("permuted", "sliced", "reversed", "broadcast")


def draw_case(op: Op, draw: Draw) -> tuple[Slots, dict[str, Any]]:
    """Arrays by slot and attributes that the op takes."""
    if op.cases_fn is not None:
        slots, attrs = op.cases_fn(draw)
        return {slot: np.asarray(x) for slot, x in slots.items() if x is not None}, dict(attrs)
    assert op.signature is not None, f"{op.name} needs a signature or cases"
    attrs = {name: _attr(attr, draw) for name, attr in op.attrs.items()}
    axes: dict[str, tuple[int, ...]] = {}
    slots = {}
    for argument in op.signature.inputs:
        if not argument.optional or draw(st.booleans()):
            slots[argument.name] = _input(argument, axes, slots, draw)
    return slots, attrs


def _input(argument: Argument, axes: dict[str, tuple[int, ...]], slots: Slots, draw: Draw) -> Array:
    shape: list[int] = []
    for axis in argument.axes:
        if axis.isdigit():
            shape.append(int(axis))
            continue
        if axis not in axes:
            pack = axis.startswith("*")
            axes[axis] = (
                tuple(draw(st.lists(st.sampled_from(LEADING), max_size=3))) if pack else (draw(st.sampled_from(EXTENTS)),)
            )
        shape.extend(axes[axis])
    same = slots.get(argument.type)
    dtype = as_dtype(same.dtype) if same is not None else as_dtype(draw(st.sampled_from(TYPES[argument.type])))
    return values(dtype, tuple(shape), draw)


def values(dtype: DType, shape: tuple[int, ...], draw: Draw) -> Array:
    """Numbers near one, huge, tiny, of all sizes at once, with many ties, or all zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if not dtype.is_float:
        return rng.integers(-9, 10, shape).astype(dtype.numpy)
    far = 3.0 if dtype.name == "f16" else 30.0
    exponent = {"one": 0.0, "huge": far, "tiny": -far, "mixed": rng.uniform(-far, far, shape), "ties": 0.0, "zero": 0.0}
    kind = draw(st.sampled_from(sorted(exponent)))
    x = rng.standard_normal(shape) * 10.0 ** exponent[kind]
    if kind in ("ties", "zero"):
        x = np.round(x) * (kind == "ties")
    return np.asarray(x).astype(dtype.numpy)


def _attr(attr: Attr, draw: Draw) -> Any:
    if attr.choices is not None:
        return draw(st.sampled_from(attr.choices))
    if attr.type is bool:
        return draw(st.booleans())
    if attr.type is float:
        plain = [v for v in (-2.5, 0.0, 1e-6, 0.5, 1.0, 3.0, attr.low, attr.high) if v is not None]
        low, high = (-np.inf if attr.low is None else attr.low), (np.inf if attr.high is None else attr.high)
        return draw(st.sampled_from([v for v in plain if low <= v <= high]))
    if attr.type is DType:
        return as_dtype(draw(st.sampled_from(TYPES["any"])))
    assert attr.type is tuple, f"an attribute of {attr.type.__name__} needs the op's own cases"
    return tuple(draw(st.lists(st.sampled_from(EXTENTS[:8]), max_size=3)))


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
