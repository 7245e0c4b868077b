"""One case of an op: its inputs as a graph holds them (views of larger inputs, constants, runtime extents), and their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.dims import Dim, Extent, Shape, shape_text
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import InputError, TensorGraphError
from tensorgraph.graph import Node, constant, input
from tensorgraph.op import Op
from tensorgraph.tools.conformance.draw import Array, Draw, Slots, draw_case

KINDS = ("dense", "padded", "sliced", "permuted", "scattered", "broadcast", "constant", "blocks")
"""How an input is held: as it is; with elements around it; with one between any two; its axes in another order; both; one
entry along an axis, repeated; as a weight; as a weight of a block type."""
OFTEN = 4
"""How many times likelier than another kind the blocks of a weight are, where an input may be one: few inputs may."""
SLACK = (1, 5, 64)


@dataclass(frozen=True)
class Operand:
    """An input: the node that the op reads, the array to bind by the slot's name, and the values that the op sees."""

    node: Node
    stored: Array
    values: Array
    kind: str

    def __str__(self) -> str:
        index_map, at = self.node.index_map, ""
        if self.node.op == "view":
            at = f" strides {shape_text(index_map.strides)}" + (f" + {index_map.offset}" if index_map.offset != 0 else "")
        return f"{self.node.dtype}{shape_text(self.node.shape)}{at} ({self.kind})"


@dataclass(frozen=True)
class Case:
    """An op over its operands; `attrs` are as numbers, the node's may hold Dims."""

    op: Op
    operands: Mapping[str, Operand]
    attrs: Mapping[str, Any]
    node: Node
    dims: Mapping[str, int]

    @property
    def values(self) -> Slots:
        return {slot: operand.values for slot, operand in self.operands.items()}

    @property
    def stored(self) -> Slots:
        return {slot: operand.stored for slot, operand in self.operands.items()}

    def lines(self) -> Iterator[str]:
        """The case for people."""
        for slot, operand in self.operands.items():
            yield f"{slot} = {operand}"
        if self.attrs:
            yield ", ".join(f"{name} = {value}" for name, value in self.attrs.items())
        for name, value in self.dims.items():
            largest = {d.max for n in (self.node, *self.node.inputs) for e in n.shape for d in _dims(e) if d.name == name}
            yield f"{name} = {value}, at most {max(largest, default=value)}"


def draw_any(op: Op, draw: Draw) -> tuple[Case, Slots]:
    """A case of an op, and the values that it was drawn with (those of a broadcast or rounded input differ)."""
    from hypothesis import strategies as st

    slots, attrs = draw_case(op, draw)
    shapes, symbolic, dims = _runtime_extents(op, slots, attrs, draw)
    operands = {}
    for slot, x in slots.items():
        kinds = [kind for kind in KINDS if _possible(op, slot, x, shapes[slot], kind)]
        if shapes[slot] != x.shape:  # strides that are known only when a step runs
            kinds += [kind for kind in kinds if kind in ("permuted", "scattered")] * 2
        kinds += ["blocks"] * OFTEN * ("blocks" in kinds)
        operands[slot] = present(slot, x, shapes[slot], draw(st.sampled_from(kinds)), draw)
    node = op.apply({slot: operand.node for slot, operand in operands.items()}, symbolic)
    return Case(op, operands, attrs, node, dims), slots


def _possible(op: Op, slot: str, x: Array, shape: Shape, kind: str) -> bool:
    static = all(isinstance(e, int) for e in shape)
    if kind == "constant":
        return static
    if kind == "blocks":
        whole = x.dtype == np.float32 and x.ndim > 1 and x.shape[-1] % 32 == 0 and x.size > 0
        return static and whole and takes_blocks(op, slot)
    if kind == "broadcast":
        return as_dtype(x.dtype).is_float and any(n > 1 for n in x.shape)
    return kind == "dense" or (x.ndim > 1 if kind in ("permuted", "scattered") else x.ndim > 0)


def takes_blocks(op: Op, slot: str) -> bool:
    """Whether an input may be of a block type by the signature, and nothing else is then to be of it."""
    if op.signature is None:
        return False
    named = {argument.name: argument.type for argument in op.signature.inputs}
    types = {op.signature.result.type, *named.values()}
    return named.get(slot) in ("float", "any") and slot not in types and op.signature.result.type not in op.attrs


def present(name: str, x: Array, shape: Shape, kind: str, draw: Draw) -> Operand:
    """An input of these values, or of those of its first entry for a broadcast, held as `kind` says; `shape` may hold Dims."""
    from hypothesis import strategies as st

    dtype = as_dtype(x.dtype)
    if kind not in KINDS:
        raise InputError(f"[case] wanted an input held {', '.join(KINDS)}; got {kind!r}")
    if kind == "constant":
        return Operand(constant(name, shape=x.shape, dtype=dtype), x, x, kind)
    if kind == "blocks":
        return _blocks(name, x, as_dtype(draw(st.sampled_from(_block_types(x.shape[-1])))), draw(st.integers(0, 2**32 - 1)))
    if kind == "broadcast":
        axis = draw(st.sampled_from([i for i, n in enumerate(x.shape) if n > 1]))
        first = np.ascontiguousarray(x.take([0], axis))
        base = input(name, (*shape[:axis], 1, *shape[axis + 1 :]), dtype)
        return Operand(base.broadcast(*shape), first, np.ascontiguousarray(np.broadcast_to(first, x.shape)), kind)
    order = list(draw(st.permutations(range(x.ndim)))) if kind in ("permuted", "scattered") else list(range(x.ndim))
    layout = [(axis, *_gap(kind, draw)) for axis in order]
    node = input(name, [step * shape[axis] + before + after for axis, before, step, after in layout], dtype)
    extents = [step * x.shape[axis] + before + after for axis, before, step, after in layout]
    stored = np.full(extents, np.nan if dtype.is_float else True, x.dtype)  # what an op must not read
    window: list[Any] = [...]
    for i, (axis, before, step, _) in enumerate(layout):
        node = node.slice(i, before, before + step * shape[axis], step)
        window.append(slice(before, before + step * x.shape[axis], step))
    back = [int(i) for i in np.argsort(order)]
    stored[tuple(window)].transpose(back)[...] = x
    return Operand(node.permute(*back), stored, x, kind)


def _gap(kind: str, draw: Draw) -> tuple[int, int, int]:
    """Elements before the first of an axis, the step between any two, and elements after the last."""
    from hypothesis import strategies as st

    if kind == "padded":
        return draw(st.integers(0, 3)), 1, draw(st.integers(0, 3))
    return (1, 2, 0) if kind in ("sliced", "scattered") else (0, 1, 0)


def _block_types(n: int) -> list[str]:
    """The block types of which whole blocks make a row of n elements; those that can be written first."""
    from tensorgraph.ops.formats import FORMATS

    fitting = [form for form in FORMATS.values() if n % form.dtype.block_size == 0]
    return [form.dtype.name for form in sorted(fitting, key=lambda form: form.encode is None)]


def _blocks(name: str, x: Array, dtype: DType, seed: int) -> Operand:
    """A weight of a block type: x rounded to it, or any bytes where nothing writes the type or its scales cannot hold x."""
    from tensorgraph.ops.formats import block_format, decode, encode

    node = constant(name, shape=x.shape, dtype=dtype)
    if block_format(dtype).encode is not None:
        raw = encode(x, dtype)
        held = decode(raw, dtype)
        if np.isfinite(held).all():
            return Operand(node, raw, held, "blocks")
    raw = np.random.default_rng(seed).integers(0, 256, (*x.shape[:-1], dtype.size_bytes(x.shape[-1])), np.uint8)
    blocks = raw.reshape(-1, dtype.block_bytes)
    with np.errstate(all="ignore"):
        finite = np.isfinite(decode(blocks, dtype)).all(axis=-1)
    blocks[~finite] = 0  # scales that are infinite or NaN
    return Operand(node, raw, decode(raw, dtype), "blocks")


def _runtime_extents(
    op: Op, slots: Slots, attrs: Mapping[str, Any], draw: Draw
) -> tuple[dict[str, Shape], dict[str, Any], dict[str, int]]:
    """Shapes, attributes and Dims of a case in which, if the op takes it, one extent is known only when a step runs.

    One axis, mostly a first one, is given a Dim, and with it whatever else is as long and makes the op's shapes fit.
    """
    from hypothesis import strategies as st

    shapes: dict[str, Shape] = {slot: x.shape for slot, x in slots.items()}
    wanted = op.signature.result.axes if op.signature is not None else ()
    sizes = {name: value for name, value in attrs.items() if name in wanted and isinstance(value, tuple)}
    several: dict[str, Shape] = {s: shape for s, shape in (shapes | sizes).items() if shape}
    if not several or not draw(st.booleans()):
        return shapes, dict(attrs), {}
    chosen = draw(st.sampled_from(sorted(several)))
    axis = draw(st.sampled_from((0, 0, 0, len(several[chosen]) - 1)))
    n = several[chosen][axis]
    assert isinstance(n, int)
    dim = Dim("T", n + draw(st.sampled_from(SLACK)))

    def with_dim(replaced: Any) -> dict[str, Shape]:
        return {
            slot: tuple(dim if e == n and replaced(slot, i) else e for i, e in enumerate(shape))
            for slot, shape in (shapes | sizes).items()
        }

    forms = (lambda slot, i: i == 0, lambda slot, i: (slot, i) == (chosen, axis), lambda slot, i: True)
    for form in forms if axis == 0 else forms[1:]:
        found = with_dim(form)
        symbolic = dict(attrs) | {name: found.pop(name) for name in sizes}
        try:
            op.apply({slot: input(slot, found[slot], as_dtype(x.dtype)) for slot, x in slots.items()}, symbolic)
        except TensorGraphError:
            continue
        return found, symbolic, {"T": n}
    return shapes, dict(attrs), {}


def _dims(extent: Extent) -> frozenset[Dim]:
    return frozenset() if isinstance(extent, int) else extent.dims()
