"""Where the operands of a part of a plan lie, which of its calls a run makes, and how its results are seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorgraph.backends.cpu.evaluation import compiled, compiled_guards
from tensorgraph.backends.cpu.kernel import Buffer, Call, Ref
from tensorgraph.device import Part
from tensorgraph.dims import maximum
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import InputError, UnsupportedError
from tensorgraph.graph import Node
from tensorgraph.views import IndexMap


class Place(NamedTuple):
    """Where an operand lies: in what, how many bytes on, and what it is read as."""

    kind: str  # "arena", "constant", "external", "stream"
    of: Any
    offset_bytes: int
    index_map: IndexMap
    layout: str
    dtype: DType


class Output(NamedTuple):
    """A value after a run: an array of a shape in a buffer (the arena where None), dense from an offset or as `where` says."""

    node: Node
    shape: Callable[[Mapping[str, int]], tuple[int, ...]]
    dtype: np.dtype
    buffer: np.ndarray | None
    offset: int
    where: Callable[[Mapping[str, int]], tuple[int, ...]] | None
    shift_bytes: int = 0  # where the buffer given begins in the arena, less

    def array(self, arena: np.ndarray, dims: Mapping[str, int]) -> np.ndarray:
        buffer = arena if self.buffer is None else self.buffer
        if self.where is None:
            return np.ndarray(self.shape(dims), self.dtype, buffer, self.offset + self.shift_bytes)
        offset, *strides = self.where(dims)
        offset += self.shift_bytes
        return np.ndarray(self.shape(dims), self.dtype, buffer, offset, tuple(strides))


class Places:
    """A part of a plan.

    Attributes:
        calls: every call, in order; of a run those whose guards hold are made.
        checks: views whose place depends on extents, which each run looks at.
        external: buffers of values that the part is given.
        streams: those whose rows are read where they lie, with their layouts.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.calls: tuple[Call, ...] = tuple(c for group in part.groups for c in getattr(group, "calls", ()))
        self.checks: dict[IndexMap, Node] = {}
        self.external: dict[Node, np.ndarray] = {}
        self.streams: dict[str, str] = {}
        self._guards = list(dict.fromkeys(c.guard for c in self.calls if c.guard.bounds))
        self.holds = compiled_guards(self._guards)
        self._calls_of: dict[tuple[bool, ...], list[Call]] = {}

    def made_calls(self, dims: Mapping[str, int]) -> list[Call]:
        """The calls that a run of these extents makes."""
        holds = self.holds(dims)
        if holds not in self._calls_of:
            self._calls_of[holds] = [c for c in self.calls if self.makes(c, holds)]
        return self._calls_of[holds]

    def makes(self, call: Call, holds: Sequence[bool]) -> bool:
        return not call.guard.bounds or holds[self._guards.index(call.guard)]

    def check(self, dims: Mapping[str, int]) -> None:
        """Whether views lie within what they are views of.

        Raises: InputError.
        """
        for index_map, node in self.checks.items():
            shape, strides, offset = index_map.resolve(dims)
            size = node.base.size
            n = size if isinstance(size, int) else size.evaluate(dims)
            last = offset + sum((m - 1) * s for m, s in zip(shape, strides, strict=True))
            beyond = min(shape, default=1) < 0 or any(e.evaluate(dims) < 0 for e in index_map.within)
            if beyond or (0 not in shape and not 0 <= offset <= last < n):
                at = f"elements {offset} to {last} of {node.base!r}, which has {n} in this step"
                raise InputError(f"[view] wanted {list(shape)} within its base; got {at} ({node.where})")

    def place(self, ref: Ref) -> Place:
        """Where an operand lies that is not an extent."""
        if isinstance(ref.of, Buffer):
            size = ref.of.size_bytes
            offset = self.part.memory.buffers[ref.of].offset
            return Place("arena", None, offset, IndexMap.dense((size,)), "dense", as_dtype("u8"))
        assert isinstance(ref.of, Node)
        node, own = ref.of, ref.of.index_map
        index_map, base = ref.index_map or own, node.base
        if node.op == "view" and (own.within or not isinstance(own.offset, int)):
            self.checks.setdefault(own, node)
        while base.op == "choose":
            form = base.inputs[self.part.taken[base]]
            if not form.index_map.is_dense:
                raise UnsupportedError(
                    f"[compile] a form of {base!r} is a view that is not dense ({base.where}); wanted a copy of it"
                )
            base = form.base
        dtype = node.dtype
        if base.op == "constant":
            held = self.part.constants[base]
            return Place("constant", held.address, 0, index_map, held.layout, dtype)
        if base.op in ("append", "read") and ref.layout != "dense":
            name = base.attrs["stream"]
            self.streams[name] = ref.layout
            return Place("stream", name, 0, index_map, ref.layout, dtype)
        if base in self.part.memory.buffers:
            return Place("arena", None, self.part.memory.buffers[base].offset, index_map, "dense", dtype)
        if base not in self.external:
            self.external[base] = np.zeros(max(_most_elements(base), 1), np.float32 if dtype.is_block else dtype.numpy)
        return Place("external", base, 0, index_map, "dense", dtype)

    def stays(self, node: Node) -> bool:
        """Whether a stream's rows are read where they lie, by later parts too."""
        return node.op in ("append", "read") and node not in self.part.memory.buffers

    def output(self, node: Node) -> Output:
        """How a node's value is seen after a run."""
        place = self.place(Ref(node))
        dtype = np.dtype(np.float32) if node.dtype.is_block else node.dtype.numpy
        assert dtype is not None
        buffer = {"external": self.external.get(place.of), "constant": getattr(self.part.constants.get(node.base), "data", None)}
        index_map, item = place.index_map, dtype.itemsize
        strides = tuple(s * item for s in index_map.strides)
        offset = index_map.offset * item + place.offset_bytes
        where = None if index_map.is_dense and isinstance(offset, int) else compiled((offset, *strides))
        return Output(node, compiled(index_map.shape), dtype, buffer.get(place.kind), place.offset_bytes, where)


def root(node: Node, taken: Mapping[Node, int]) -> Node:
    """The node in whose memory a value lies."""
    while node.op in ("view", "choose"):
        node = node.base if node.op == "view" else node.inputs[taken[node]]
    return node


def _most_elements(node: Node) -> int:
    n = 1
    for extent in node.shape:
        n *= maximum(extent)
    return n
