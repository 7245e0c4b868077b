"""Inputs as large models have them: what speeds are measured with, and what types are asked about."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import GraphError
from tensorgraph.op import Attr, Op
from tensorgraph.tools.conformance.draw import TYPES, Array, Slots

MOST_ELEMENTS = 1 << 26
ROWS, WIDTH = 4096, 4096
"""Of what a signature says no more about: 64 MiB as f32, more than caches hold."""


def typical_cases(op: Op) -> list[tuple[Slots, dict[str, Any]]]:
    """Arrays by slot and attributes: what the op declares, or else one case from its signature. Floats are zeros, which take
    no memory until `filled`.

    Raises: GraphError: neither says enough.
    """
    if op.typical_fn is not None:
        return [(dict(slots), dict(attrs)) for slots, attrs in op.typical_fn(np.random.default_rng(0))]
    if op.signature is None:
        raise GraphError(f"[{op.name}] wanted a signature, or `typical` inputs to measure; got neither")
    axes: dict[str, tuple[int, ...]] = {}
    slots: Slots = {}
    for argument in op.signature.inputs:
        letters = [axis for axis in argument.axes if not axis.startswith("*") and not axis.isdigit()]
        shape: list[int] = []
        for axis in argument.axes:
            size = (int(axis),) if axis.isdigit() else (ROWS,) if axis.startswith("*") and letters else (WIDTH,)
            whole = (ROWS, WIDTH) if axis.startswith("*") and not letters else size
            shape += axes.setdefault(axis, whole) if not axis.isdigit() else size
        if math.prod(shape) > MOST_ELEMENTS:
            raise GraphError(f"[{op.name}] wanted `typical` inputs to measure: its signature would make {argument.name} {shape}")
        same = slots.get(argument.type)
        dtype = same.dtype if same is not None else as_dtype(TYPES.get(argument.type, (argument.type,))[0]).numpy
        slots[argument.name] = np.zeros(shape, dtype)
    return [(slots, {name: _attr(op, name, attr) for name, attr in op.attrs.items()})]


def _attr(op: Op, name: str, attr: Attr) -> Any:
    """A value of an attribute that says nothing special."""
    if not attr.required:
        return attr.default
    if attr.choices is not None:
        return attr.choices[0]
    if attr.type in (int, float):
        low, high = (-math.inf if attr.low is None else attr.low), (math.inf if attr.high is None else attr.high)
        return attr.type(min(max(1, low), high))
    if attr.type is DType:
        return as_dtype("f16")
    if attr.type in (bool, tuple):
        return (ROWS, WIDTH) if attr.type is tuple else False
    raise GraphError(f"[{op.name}] wanted `typical` inputs, since nothing says which {name} it takes; got none")


def filled(slots: Slots) -> Slots:
    """The same with random floats between -1 and 1."""
    rng = np.random.default_rng(0)
    return {slot: _random(rng, x) if as_dtype(x.dtype).is_float else x for slot, x in slots.items()}


def _random(rng: np.random.Generator, x: Array) -> Array:
    values: Array = np.asarray(rng.random(x.shape, np.float32))
    return (2 * values - 1).astype(x.dtype)
