"""Inputs for any op: drawn by the op itself (`Op.cases`) or from its signature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import GraphError, InputError
from tensorgraph.op import Attr, Op
from tensorgraph.signature import Argument

Array = np.ndarray[Any, Any]
Draw = Callable[[Any], Any]
"""As hypothesis's `data.draw`: takes a strategy."""
Slots = dict[str, Array]

EXTENTS = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64, 67, 130, 1031, 4099)  # empty, one, odd, prime, off a vector's width, long
LEADING = (0, 1, 2, 3, 5)
MANY_ROWS = 1031
LONG = 1000
"""An axis as long as this stands alone: the others of its input are then short."""
TYPES = {
    "real": ("f32", "f16", "bf16", "f64"),
    "float": ("f32", "f16", "bf16", "f64"),
    "int": ("i32", "i64", "i16", "i8", "u8"),
    "any": ("f32", "f16", "bf16", "f64", "i32", "i64", "i16", "i8", "u8", "bool"),
}
KINDS_OF_VALUES = ("one", "ties", "zero", "mixed", "tiny", "huge", "subnormal", "infinite", "nan")
SPECIAL = 0.1
"""How many of some values are infinite, or NaN."""
DECADES = 12.0
"""Powers of ten to either side of one: the squares of such values, and their sums, stay within f32."""


def draw_case(op: Op, draw: Draw, decades: float = DECADES) -> tuple[Slots, dict[str, Any]]:
    """Arrays by slot and attributes that the op takes; floats drawn from a signature span 10 ** +-decades.

    Attributes that are floats are numbers of f32, so that a kernel that holds them as such loses nothing.

    Raises: GraphError: the op has neither cases nor a signature that says enough.
    """
    if op.cases_fn is not None:
        slots, attrs = op.cases_fn(draw)
        return {slot: np.asarray(x) for slot, x in slots.items() if x is not None}, _as_f32(op, attrs)
    if op.signature is None:
        raise GraphError(f"[{op.name}] wanted a signature or `cases`, from which inputs can be drawn; got neither")
    attrs = {name: _attr(op, name, attr, draw) for name, attr in op.attrs.items()}
    axes: dict[str, tuple[int, ...]] = {}
    slots = {}
    for argument in op.signature.inputs:
        if not argument.optional or draw(_strategies().booleans()):
            slots[argument.name] = _input(argument, axes, slots, draw, decades)
    return slots, _as_f32(op, attrs)


def _as_f32(op: Op, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with their floats rounded to f32, where they stay within their range."""
    found = dict(attrs)
    for name, value in attrs.items():
        attr = op.attrs.get(name)
        if attr is not None and attr.type is float and isinstance(value, float):
            rounded = float(np.float32(value))
            within = (attr.low is None or rounded >= attr.low) and (attr.high is None or rounded <= attr.high)
            found[name] = rounded if within and attr.choices is None else value
    return found


def _strategies() -> Any:
    from hypothesis import strategies

    return strategies


def _input(argument: Argument, axes: dict[str, tuple[int, ...]], slots: Slots, draw: Draw, decades: float) -> Array:
    st = _strategies()
    shape: list[int] = []
    for axis in argument.axes:
        if axis.isdigit():
            shape.append(int(axis))
            continue
        if axis not in axes:
            pack = axis.startswith("*")
            axes[axis] = _leading(draw) if pack else _extent(draw, math.prod(shape))
        shape.extend(axes[axis])
    same = slots.get(argument.type)
    types = TYPES.get(argument.type, (argument.type,))
    dtype = as_dtype(same.dtype) if same is not None else as_dtype(draw(st.sampled_from(types)))
    return values(dtype, tuple(shape), draw, decades)


def _leading(draw: Draw) -> tuple[int, ...]:
    """Extents in front: mostly a few short ones, at times as many rows as keep several threads at work."""
    st = _strategies()
    few = tuple(draw(st.lists(st.sampled_from(LEADING), max_size=3)))
    return (MANY_ROWS,) if len(few) == 1 and draw(st.integers(0, 7)) == 7 else few


def _extent(draw: Draw, before: int) -> tuple[int]:
    fitting = [n for n in EXTENTS if n < LONG or before < LONG]
    return (draw(_strategies().sampled_from(fitting)),)


def values(dtype: DType, shape: tuple[int, ...], draw: Draw, decades: float = DECADES) -> Array:
    """Numbers near one, with many ties, all zero, of all sizes at once, tiny, huge, subnormal, some infinite, or some NaN."""
    st = _strategies()
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if not dtype.is_float:
        return rng.integers(-9, 10, shape).astype(dtype.numpy)
    kind = draw(st.sampled_from(KINDS_OF_VALUES))
    if kind not in KINDS_OF_VALUES:
        raise InputError(f"[case] wanted values {', '.join(KINDS_OF_VALUES)}; got {kind!r}")
    far = 3.0 if dtype.name == "f16" else decades
    exponent: dict[str, Any] = {"huge": far, "tiny": -far, "subnormal": -6.0 if dtype.name == "f16" else -40.0}
    exponent["mixed"] = rng.uniform(-far, far, shape)
    x = np.asarray(rng.standard_normal(shape) * 10.0 ** exponent.get(kind, 0.0))
    if kind in ("ties", "zero"):
        x = np.round(2 * x) / 2 * (kind == "ties")
    if kind in ("infinite", "nan"):
        x = np.where(rng.random(shape) < SPECIAL, np.nan if kind == "nan" else np.copysign(np.inf, x), x)
    return x.astype(dtype.numpy)


def _attr(op: Op, name: str, attr: Attr, draw: Draw) -> Any:
    st = _strategies()
    if attr.choices is not None:
        return draw(st.sampled_from(attr.choices))
    if attr.type is bool:
        return draw(st.booleans())
    low, high = (-np.inf if attr.low is None else attr.low), (np.inf if attr.high is None else attr.high)
    if attr.type in (int, float):
        plain = (0, 1, 2, 3, 7) if attr.type is int else (-2.5, 0.0, 1e-6, 0.5, 1.0, 3.0)
        numbers = [v for v in (*plain, attr.low, attr.high) if v is not None and low <= v <= high]
        return attr.type(draw(st.sampled_from(numbers)))
    if attr.type is DType:
        return as_dtype(draw(st.sampled_from(TYPES["any"])))
    if attr.type is tuple:
        return tuple(draw(st.lists(st.sampled_from(EXTENTS[:8]), max_size=3)))
    raise GraphError(f"[{op.name}] wanted `cases`, since nothing says which {name} ({attr.type.__name__}) it takes; got none")


def is_finite(slots: Slots) -> bool:
    """Whether no number is infinite or NaN: what the laws of ops are stated for."""
    return all(bool(np.isfinite(x.astype(np.float64)).all()) for x in slots.values() if as_dtype(x.dtype).is_float)
