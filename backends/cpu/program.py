"""Programs: the calls of a part of a plan as a table that the executor walks, and what changes in it from run to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from tensorgraph.backends.cpu.evaluation import compiled
from tensorgraph.backends.cpu.ir import I64, PTR, Int
from tensorgraph.backends.cpu.kernel import HEADER, MESSAGES, Call, Kernel, Ref
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.places import Places
from tensorgraph.backends.cpu.replay import ADVANCE, Given, Prepared, Replay, prepare
from tensorgraph.backends.cpu.streams import ClassTable
from tensorgraph.device import Part, Run, Values
from tensorgraph.dims import Extent, Symbol
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import StateError
from tensorgraph.graph import Node
from tensorgraph.memory import needs_storage
from tensorgraph.state import Layout
from tensorgraph.views import IndexMap

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.device import CpuDevice

Extents = tuple["int | None", ...]


class OperandKey(NamedTuple):
    """All that code depends on of an operand; None is what it reads when it runs."""

    name: str
    dtype: str
    layout: str
    shape: Extents
    strides: Extents
    offset: bool  # whether an offset is read when it runs


class Recipe(NamedTuple):
    """All that a kernel's text depends on, beside its target: `emit(k, operands, **attrs)` writes it."""

    emit: Any
    names: tuple[str, ...]
    keys: tuple[OperandKey | None, ...]
    attrs: tuple[tuple[str, Any], ...] = ()


class Program(Places):
    """A part of a plan on the CPU. Calling it computes the part.

    Attributes:
        calls: every call, in order; of a run those whose guards hold are made.
        advance: the kernel that `Replay` begins with, once there is a table.
    """

    advance: int

    def __init__(self, device: CpuDevice, part: Part) -> None:
        super().__init__(part)
        self.device = device
        self.calls: tuple[Call, ...] = tuple(c for group in part.groups for c in getattr(group, "calls", ()))
        self._numbers: dict[Extent, int] = {}  # of each extent, its place in the table of extents
        self._args: list[tuple[str, Any]] = []
        self._uses: dict[Node, list[tuple[int, int]]] = {}  # of what lies in the arena: arguments, and bytes into it
        self._starts: list[int] = []
        self._kernels: list[Recipe] = []  # of each call
        for call in self.calls:
            self._starts.append(len(self._args))
            self._kernels.append(self._describe(call))
        device.require(part.memory.peak_bytes, max((c.scratch_bytes for c in self.calls), default=0))
        self._tables: dict[tuple[bool, ...], tuple[np.ndarray, int]] = {}
        self._items = [self._number(c.items) for c in self.calls]
        self._arrange_extents()
        self._seen = -1
        self.owner: Replay | None = None  # whose numbers stand in the buffers, if they are not those of a run
        self.class_tables: dict[str, ClassTable] = {}
        self.outputs = [self.output(n) for n in part.keep if n.op not in ("input", "constant") and not self.stays(n)]

    # What a run does.

    def __call__(self, values: Values, run: Run) -> None:
        dims, device = run.dims, self.device
        self.disown()
        if self.checks:
            self.check(dims)
        if self.n_dynamic:
            self.extents[: self.n_dynamic] = self.evaluate(dims)
        for node, buffer in self.external.items():
            given = values[node]
            buffer[: given.size] = given if given.ndim == 1 else given.reshape(-1)
        self.bind(run)
        table = self.table_of(dims)
        if device.note is None:
            device.run(table, MESSAGES)
        else:
            device.profile(table, MESSAGES, self.made_calls(dims), dims)
        for output in self.outputs:
            values[output.node] = output.array(device.arena, dims)

    def disown(self) -> None:
        """From now on, numbers and addresses are those of a run."""
        if self.owner is not None:
            self.owner.release()
            self.owner = None

    def written(self, output: Node) -> Sequence[tuple[int, int]]:
        """The arguments that say where a node's value lies, and how far into it; none where it is not the arena's own."""
        return self._uses.get(output, ()) if needs_storage(output) else ()

    def replay(self, runs: Sequence[Given], varying: Node) -> Prepared | None:
        """Several runs prepared at once, with one element of one input left open; None where they are not alike."""
        return prepare(self, runs, varying)

    def bind(self, run: Run) -> None:
        """Write the addresses that a run needs."""
        if self.device.version != self._seen:
            self._bind()
            self._seen = self.device.version
        if self.streams:
            self._bind_streams(run)

    def table_of(self, dims: Mapping[str, int]) -> tuple[np.ndarray, int]:
        """The table that a run of these extents walks, and its address."""
        holds = self.holds(dims)
        if holds not in self._tables:
            self._tables[holds] = self._table(holds)
        return self._tables[holds]

    def table(self, dims: Mapping[str, int]) -> tuple[np.ndarray, list[Call]]:
        """The table that a run of these extents walks, and the calls of its lines."""
        return self._table(self.holds(dims))[0], self.made_calls(dims)

    def _table(self, holds: tuple[bool, ...]) -> tuple[np.ndarray, int]:
        """The lines of the calls that are made, and their address; only the kernels of these are compiled now."""
        base, extents = self.args.ctypes.data, self.extents.ctypes.data
        made = [i for i, call in enumerate(self.calls) if self.makes(call, holds)]
        self.advance, *codes = self.device.kernels([Recipe(*ADVANCE), *(self._kernels[i] for i in made)])
        rows = []
        for i, code in zip(made, codes, strict=True):
            call, items = self.calls[i], extents + 8 * self._place_of[self._items[i]]
            rows.append([code, base + 8 * self._starts[i], items, call.grain, call.most_chunks, call.apart, 0, 0])
        lines = np.array(rows, np.int64).reshape(len(rows), 8)
        return lines, int(lines.ctypes.data)

    # Addresses.

    def _bind(self) -> None:
        """Write every address; again whenever the arena or the threads' scratch has moved."""
        device = self.device
        extents, arena = int(self.extents.ctypes.data), int(device.arena.ctypes.data)
        found: dict[str, Callable[[Any], int]] = {
            "status": lambda _: device.code.executor.status_address,
            "scratch": lambda _: int(device.scratch.ctypes.data),
            "scratch stride": lambda _: int(device.scratch_stride.ctypes.data),
            "extent": lambda number: extents + 8 * self._place_of[number],
            "arena": lambda offset: arena + offset,
            "address": lambda address: address,
            "external": lambda given: int(self.external[given[0]].ctypes.data) + given[1],
            "stream": lambda _: 0,
            "class": lambda _: 0,
        }
        for i, (kind, what) in enumerate(self._args):
            self.args[i] = found[kind](what)
        self._stream_args = [(i, what) for i, (kind, what) in enumerate(self._args) if kind == "stream"]
        self._class_args = [(i, what) for i, (kind, what) in enumerate(self._args) if kind == "class"]
        self._store_seen: Any = None

    def _bind_streams(self, run: Run) -> None:
        step: Any = run.state  # a state_store.Step: its pages are read where they lie
        if step is None:
            name = next(iter(self.streams))
            raise StateError(f"[run] the plan uses the stream {name!r}; wanted the step of a state store; got none")
        store = step.store
        if self._store_seen != (store, store.moved):
            for name in self.streams:
                wanted, layout = self.streams[name], store.layouts[name]
                if layout != wanted or store.page_rows != 16:
                    got = f"{store.page_rows}, {layout}"
                    raise StateError(f"[run] wanted pages of 16 rows held as {wanted} for {name!r}; got {got}")
            for i, name in self._stream_args:
                self.args[i] = store.pages(name).ctypes.data
            for i, name in self._class_args:
                cls = store.specs[name].stream_class
                table = self.class_tables.setdefault(cls.name, ClassTable(cls))
                self.args[i] = table.address
            self._store_seen = (store, store.moved)
        for table in self.class_tables.values():
            if table.fill(step.classes[table.stream_class]):  # it had to grow, and moved
                for i, name in self._class_args:
                    self.args[i] = self.class_tables[store.specs[name].stream_class.name].address

    # Extents.

    def _number(self, extent: Extent) -> int:
        return self._numbers.setdefault(extent, len(self._numbers))

    def _arrange_extents(self) -> None:
        """Those that change come first in the table; the function that computes them all at once."""
        dynamic = [e for e in self._numbers if not isinstance(e, int)]
        order: list[Extent] = [*dynamic, *(e for e in self._numbers if isinstance(e, int))]
        self._place_of = {self._numbers[e]: i for i, e in enumerate(order)}
        self.extents = np.array([e if isinstance(e, int) else 0 for e in order], np.int64)
        self.n_dynamic = len(dynamic)
        self.evaluate: Callable[[Mapping[str, int]], tuple[int, ...]] = compiled(dynamic)
        self.args = np.zeros(max(len(self._args), 1), np.int64)

    # Building.

    def _describe(self, call: Call) -> Recipe:
        """What a call's kernel is written from; its addresses go to the end of the arguments."""
        self._args += [("status", None), ("scratch", None), ("scratch stride", None)]
        assert len(HEADER) == 3
        keys: list[OperandKey | None] = []
        for name, ref in call.operands.items():
            keys.append(None if ref is None else self._operand(name, ref))
        attrs = tuple(sorted(call.attrs.items()))
        return Recipe(call.emit, tuple(call.operands), tuple(keys), attrs)

    def _operand(self, name: str, ref: Ref) -> OperandKey:
        if isinstance(ref.of, (int, Symbol)):
            self._args.append(("extent", self._number(ref.of)))
            return OperandKey(name, "i64", "number", (None,), (), False)
        place = self.place(ref)
        index_map = place.index_map
        item = 4 if place.dtype.is_block else place.dtype.block_bytes
        static = isinstance(index_map.offset, int)
        offset = place.offset_bytes + (index_map.offset * item if isinstance(index_map.offset, int) else 0)
        if place.kind == "arena":
            if isinstance(ref.of, Node):
                self._uses.setdefault(ref.of.base, []).append((len(self._args), offset - place.offset_bytes))
            self._args.append(("arena", offset))
        elif place.kind == "constant":
            self._args.append(("address", place.of + offset))
        elif place.kind == "external":
            self._args.append(("external", (place.of, offset)))
        else:
            self._args.append(("stream", place.of))
            self._args.append(("class", place.of))
        if not static:
            self._args.append(("extent", self._number(index_map.offset)))
        dense = place.layout == "dense"
        shape, strides, numbers = _written(index_map, ref.known or not dense, dense)
        self._args += [("extent", self._number(e)) for e in numbers]
        return OperandKey(name, place.dtype.name, place.layout, shape, strides, not static)

@lru_cache(1 << 12)
def _written(index_map: IndexMap, known: bool, dense: bool) -> tuple[Extents, Extents, tuple[Extent, ...]]:
    """The extents and strides of an operand as its kernel has them in its code, and those that are read when it runs."""
    shape: Extents = tuple(e if known and isinstance(e, int) else None for e in index_map.shape)
    strides: Extents = ()
    if dense:
        last = len(index_map.strides) - 1
        strides = tuple(
            s if isinstance(s, int) and (known or (i == last and s in (0, 1))) else None for i, s in enumerate(index_map.strides)
        )
    given = (*zip(index_map.shape, shape, strict=True), *zip(index_map.strides, strides, strict=False))
    return shape, strides, tuple(extent for extent, written in given if written is None)


def write_kernel(k: Kernel, recipe: Recipe) -> str:
    """The text of a kernel for operands of these kinds."""
    operands: dict[str, Operand | None] = {}
    for name, key in zip(recipe.names, recipe.keys, strict=True):
        operands[name] = None if key is None else _read_operand(k, key)
    recipe.emit(k, operands, **dict(recipe.attrs))
    return k.text()


def _read_operand(k: Kernel, key: OperandKey) -> Operand:
    dtype = as_dtype(key.dtype)
    if key.layout == "number":
        return Operand(k, dtype, (k.load(k.slot(), I64),), (), k.zero(PTR), key.layout)
    address = k.slot()
    table = k.slot() if key.layout in get_args(Layout) else None
    if key.offset:
        address = address + k.load(k.slot(), I64) * (4 if dtype.is_block else dtype.block_bytes)

    def resolve(extents: Extents) -> tuple[Int, ...]:
        return tuple(k.load(k.slot(), I64) if e is None else e for e in extents)

    shape = resolve(key.shape)
    strides = resolve(key.strides)
    return Operand(k, dtype, shape, strides, address, key.layout, table)
