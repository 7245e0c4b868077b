"""The reference device: every op by its NumPy definition, in float64, rounded to each node's dtype.

It is what every other backend is compared with. Values are NumPy arrays; floats that a node declares as f32 or narrower are
rounded to that after every op, block types are held decoded, and constants are held as float64 so that no step converts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.device import Device, Part, Run, Values
from tensorgraph.dims import evaluate_shape
from tensorgraph.dtypes import DType
from tensorgraph.errors import InputError, StateError
from tensorgraph.graph import STRUCTURAL, Node

Step = Callable[[Values, Run], None]


class ReferenceDevice(Device):
    """A device that runs every op that has a reference."""

    def __init__(self, name: str = "reference") -> None:
        super().__init__()
        self.name = name

    def supports(self, node: Node) -> bool:
        return node.op in STRUCTURAL or registry.ops.get(node.op).reference_fn is not None

    def upload(self, array: np.ndarray, dtype: DType, *, constant: bool = False, layout: str = "dense") -> np.ndarray:
        value = registry.decoders.get(dtype.name)(array) if dtype.is_block and array.dtype == np.uint8 else np.asarray(array)
        if not dtype.is_block and dtype.numpy is not None and value.dtype != dtype.numpy:
            value = value.astype(dtype.numpy)
        if constant and dtype.is_float:
            value = value.astype(np.float64)
        return value

    def download(self, value: Any, dtype: DType) -> np.ndarray:
        array = np.asarray(value, order="C")
        return array.astype(np.float32 if dtype.is_block else dtype.numpy)

    def compile(self, part: Part) -> Step:
        steps: list[Step] = []
        last = {source: i for i, node in enumerate(part.nodes) for source in (node, *node.inputs)}
        dead: dict[int, list[Node]] = {}
        ours = set(part.nodes) - part.keep
        for node, i in last.items():
            if node in ours:
                dead.setdefault(i, []).append(node)
        for i, node in enumerate(part.nodes):
            steps.append(_step(node, part))
            if i in dead:
                steps.append(_release(tuple(dead[i])))

        def run(values: Values, step: Run) -> None:
            with np.errstate(all="ignore"):
                for compute in steps:
                    compute(values, step)

        return run


def _release(nodes: tuple[Node, ...]) -> Step:
    def release(values: Values, _: Run) -> None:
        for node in nodes:
            values.pop(node, None)

    return release


def _step(node: Node, part: Part) -> Step:
    if node.op == "view":
        return _view_step(node)
    if node.op == "choose":
        source = node.inputs[part.taken[node]]

        def choose(values: Values, _: Run) -> None:
            values[node] = values[source]

        return choose
    if node.op in ("append", "read"):
        return _state_step(node)
    return _op_step(node)


def _op_step(node: Node) -> Step:
    op = registry.ops.get(node.op)
    floats = tuple(i.dtype.is_float for i in node.inputs)
    rounded = None if node.dtype.is_block else node.dtype.numpy
    fixed = dict(node.attrs)
    extents = fixed.pop("shape", None)

    def compute(values: Values, step: Run) -> None:
        arrays = {}
        for slot, source, is_float in zip(node.slots, node.inputs, floats, strict=True):
            value = values[source]
            arrays[slot] = value.astype(np.float64) if is_float and value.dtype != np.float64 else value
        attrs = fixed if extents is None else fixed | {"shape": evaluate_shape(extents, step.dims)}
        result = np.asarray(op.compute(arrays, attrs))
        values[node] = result if rounded is None or result.dtype == rounded else result.astype(rounded)

    return compute


def _view_step(node: Node) -> Step:
    index_map, base = node.index_map, node.base
    is_dense = index_map.is_dense
    static = all(isinstance(e, int) for e in (*index_map.shape, *index_map.strides, index_map.offset, *index_map.within))
    resolved = index_map.resolve({}) if static else None

    def view(values: Values, step: Run) -> None:
        shape, strides, offset = resolved or index_map.resolve(step.dims)
        flat = np.ascontiguousarray(values[base]).reshape(-1)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        beyond = min(shape, default=1) < 0 or any(e.evaluate(step.dims) < 0 for e in index_map.within)
        if beyond or (0 not in shape and not 0 <= offset <= last < flat.size):
            at = f"elements {offset} to {last} of {node.base!r}, which has {flat.size} in this step"
            raise InputError(f"[view] wanted {list(shape)} within its base; got {at} ({node.where})")
        if is_dense:
            values[node] = flat[: math.prod(shape)].reshape(shape)
            return
        item = flat.itemsize
        window = flat[offset:] if 0 <= offset < flat.size else flat[:0]
        values[node] = np.lib.stride_tricks.as_strided(window, shape, tuple(s * item for s in strides), writeable=False)

    return view


def _state_step(node: Node) -> Step:
    stream = node.attrs["stream"]

    def access(values: Values, step: Run) -> None:
        if step.state is None:
            raise StateError(f"[run] the plan uses the stream {stream!r}; wanted the step of a state store; got none")
        if node.op == "append":
            step.state.append(stream, values[node.inputs[0]])
        values[node] = step.state.read(stream)

    return access
