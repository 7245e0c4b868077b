"""Made-up devices for tests of conformance: one that computes in float32 in another order, and ones with a mistake planted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.backends.reference.device import ReferenceDevice
from tensorgraph.device import Device, Part, Run, Values
from tensorgraph.dims import evaluate_shape
from tensorgraph.dtypes import f64
from tensorgraph.graph import STRUCTURAL, Node
from tensorgraph.op import Op

Array = np.ndarray[Any, Any]
Slots = dict[str, Array]
Kernel = Callable[..., Array]
Read = Callable[[Node, Values, Run], Array]
Finish = Callable[[Node, Slots, Array, Run], Array]


@contextmanager
def registered(name: str, make: Callable[[str], Device]) -> Iterator[str]:
    """A backend for as long as the context lasts."""
    registry.backends.add(name, make)
    try:
        yield name
    finally:
        registry.backends.remove(name)


def _as_given(source: Node, values: Values, step: Run) -> Array:
    found: Array = values[source]
    return found


def _right(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    return y


class KernelDevice(ReferenceDevice):
    """The reference, but that a kernel reads its inputs by `read` and what it computed passes through `finish`."""

    def __init__(self, name: str, read: Read = _as_given, finish: Finish = _right) -> None:
        super().__init__(name)
        self.read, self.finish = read, finish
        self.wide = False  # whether the node being computed is, or reads, f64

    def kernel(self, op: Op, slots: Slots, attrs: Mapping[str, Any]) -> Array:
        floats = {s: x.astype(np.float64) if x.dtype.kind in "fV" else x for s, x in slots.items()}
        return np.asarray(op.compute(floats, attrs))

    def compile(self, part: Part) -> Callable[[Values, Run], None]:
        structural = {
            n: super(KernelDevice, self).compile(Part((n,), frozenset((n,)), part.taken))
            for n in part.nodes
            if n.op in STRUCTURAL
        }

        def run(values: Values, step: Run) -> None:
            with np.errstate(all="ignore"):
                for node in part.nodes:
                    if node in structural:
                        structural[node](values, step)
                    else:
                        values[node] = self._compute(node, values, step)

        return run

    def _compute(self, node: Node, values: Values, step: Run) -> Array:
        attrs = dict(node.attrs)
        if "shape" in attrs:
            attrs["shape"] = evaluate_shape(attrs["shape"], step.dims)
        read, finish = (self.read, self.finish) if node.op != "cont" else (_as_given, _right)  # conformance copies inputs by it
        self.wide = any(n.dtype == f64 for n in (node, *node.inputs))
        slots = {slot: read(source, values, step) for slot, source in zip(node.slots, node.inputs, strict=True)}
        y = finish(node, slots, self.kernel(registry.ops.get(node.op), slots, attrs), step)
        return y.astype(node.dtype.numpy) if node.dtype.numpy is not None else y


class Float32Device(KernelDevice):
    """Every product and sum in float32, one after another from the last element on; in float64 where that cannot do: of wider
    inputs, of squares that underflow, of sums as long as nobody adds up in one go."""

    def kernel(self, op: Op, slots: Slots, attrs: Mapping[str, Any]) -> Array:
        if self.wide or any(max(x.shape, default=0) > 1000 or _has_subnormals(x) for x in slots.values()):
            return super().kernel(op, slots, attrs)
        narrow = {s: x.astype(np.float32) if x.dtype.kind in "fV" else x for s, x in slots.items()}
        own = _FLOAT32.get(op.name)
        y = own(*op.arguments(narrow), **attrs) if own is not None else op.compute(narrow, attrs)
        return np.asarray(y).astype(np.float32) if np.asarray(y).dtype == np.float64 else np.asarray(y)


def _has_subnormals(x: Array) -> bool:
    size = np.abs(x.astype(np.float64))
    return bool(((size > 0) & (size < 2.0**-60)).any()) if x.dtype.kind in "fV" else False


def _sum(x: Array) -> Array:
    """Of rows, [..., N] -> [..., 1], one element after another from the last one."""
    total = np.zeros((*x.shape[:-1], 1), np.float32)
    for i in reversed(range(x.shape[-1])):
        total += x[..., i : i + 1]
    return total


def _mean(x: Array) -> Array:
    return _sum(x) / np.float32(x.shape[-1])


def _rms_norm(x: Array, weight: Array | None, *, eps: float) -> Array:
    y = x / np.sqrt(_mean(x * x) + np.float32(eps))
    return y if weight is None else y * weight


def _norm(x: Array, weight: Array | None, bias: Array | None, *, eps: float) -> Array:
    centred = x - _mean(x)
    y = centred / np.sqrt(_mean(centred * centred) + np.float32(eps))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _mul_mat(a: Array, b: Array) -> Array:
    """One product after another along K."""
    compute = registry.ops.get("mul_mat").compute
    total: Array = compute({"a": a[..., :0], "b": b[..., :0]}, {})
    for k in reversed(range(a.shape[-1])):
        total = total + compute({"a": a[..., k : k + 1], "b": b[..., k : k + 1]}, {})
    return total


def _mul_mat_id(a: Array, b: Array, ids: Array) -> Array:
    compute = registry.ops.get("mul_mat_id").compute
    total = np.zeros((*ids.shape, a.shape[1]), np.float32)
    for k in reversed(range(a.shape[-1])):
        total += compute({"a": a[..., k : k + 1], "b": b[..., k : k + 1], "ids": ids}, {})
    return total


def _soft_max(x: Array, mask: Array | None, sinks: Array | None, **attrs: float) -> Array:
    back = (..., slice(None, None, -1))
    y = registry.ops.get("soft_max").compute(
        {"x": x[back], **_given(mask=mask if mask is None else mask[back], sinks=sinks)}, attrs
    )
    found: Array = y[back]
    return found


def _given(**arrays: Array | None) -> Slots:
    return {name: x for name, x in arrays.items() if x is not None}


_FLOAT32: dict[str, Kernel] = {
    "sum": lambda x: _sum(x.reshape(1, -1))[0],
    "sum_rows": _sum,
    "mean": _mean,
    "rms_norm": _rms_norm,
    "norm": _norm,
    "mul_mat": _mul_mat,
    "mul_mat_id": _mul_mat_id,
    "soft_max": _soft_max,
}


# Mistakes in reading.


def without_strides(source: Node, values: Values, step: Run) -> Array:
    return np.resize(values[source.base], evaluate_shape(source.shape, step.dims))


def _strided(base: Array, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
    at = np.full(shape, offset)
    for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        at = at + (np.arange(n) * stride).reshape(-1, *(1,) * (len(shape) - axis - 1))
    flat = base.reshape(-1)
    return flat.take(at, mode="clip") if flat.size else np.zeros(shape, base.dtype)


def without_offset(source: Node, values: Values, step: Run) -> Array:
    shape, strides, _ = source.index_map.resolve(step.dims)
    return _strided(values[source.base], shape, strides, 0)


def strides_of_the_maximum(source: Node, values: Values, step: Run) -> Array:
    """As if every Dim in a stride or offset had its largest value."""
    index_map = source.index_map
    dims = {d.name: d.max for e in (*index_map.strides, index_map.offset) if not isinstance(e, int) for d in e.dims()}
    _, strides, offset = index_map.resolve({**step.dims, **dims})
    return _strided(values[source.base], evaluate_shape(source.shape, step.dims), strides, offset)


def constants_turned(source: Node, values: Values, step: Run) -> Array:
    """A weight's layout that loses the order of its rows."""
    found: Array = values[source]
    return found[::-1] if source.op == "constant" and found.ndim else found


# Mistakes in what is written.


def hundred_units(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    return y * (1 + 100 * 2.0**-23)


def last_element(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    y = np.array(y)
    y.reshape(-1)[-1:] += 1
    return y


def tail_of_16(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    y = np.array(y)
    if y.ndim and y.shape[-1] % 16:
        y[..., y.shape[-1] // 16 * 16 :] = 0
    return y


def empty_sums(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    """Reductions of nothing leave what was in memory."""
    return np.ones_like(y) if any(x.size == 0 for x in slots.values()) else y


def no_nan(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    return np.where(np.isnan(y), np.inf, y)


def nan_for_infinity(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    return np.where(np.isinf(y), np.nan, y)


def infinity_unsigned(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    return np.where(np.isinf(y), np.inf, y)


def half_to_even(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    return np.round(slots["x"].astype(np.float64))


def last_of_ties(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    """Of equal elements the later one first."""
    y, x = np.array(y), slots["x"]
    n = x.shape[-1]
    rows = zip(x.reshape(math.prod(x.shape[:-1]), n), y.reshape(math.prod(y.shape[:-1]), y.shape[-1]), strict=True)
    for row, chosen in rows:
        for i, taken in enumerate(chosen.tolist()):
            if taken >= 0:
                equal = [j for j in range(n) if row[j] == row[taken]]
                chosen[i] = equal[len(equal) - 1 - equal.index(taken)] if equal else taken
    return y


def divided_by_the_maximum(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    """A mean that takes a Dim's largest value for the length of a row."""
    n = node.inputs[0].shape[-1]
    return y if isinstance(n, int) or not n.max else y * (n.evaluate(step.dims) / n.max)


def truncated(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    """Rounds toward zero to 16 bits."""
    if node.dtype.numpy is None or node.dtype.numpy.itemsize != 2:
        return y
    rounded = y.astype(node.dtype.numpy)
    beyond = np.abs(rounded.astype(np.float64)) > np.abs(y)
    bits = rounded.view(np.uint16)
    return np.where(beyond, bits - np.uint16(1), bits).astype(np.uint16).view(node.dtype.numpy)


def adds_up() -> Finish:
    """What a run leaves behind is in the next one's result."""
    before: dict[Node, Array] = {}

    def finish(node: Node, slots: Slots, y: Array, step: Run) -> Array:
        found = y + before[node] if node in before else y
        before[node] = y
        return found

    return finish


def raises(node: Node, slots: Slots, y: Array, step: Run) -> Array:
    if y.ndim == 3:
        raise MemoryError("a kernel for three axes is missing")
    return y
