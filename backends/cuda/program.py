"""Programs: the calls of a part of a plan as launches, and what is written to the device before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorgraph.backends.cpu.evaluation import compiled
from tensorgraph.backends.cpu.kernel import MESSAGES, Call, Ref, lay_out
from tensorgraph.backends.cpu.places import Output, Place, Places, root
from tensorgraph.backends.cuda import launches
from tensorgraph.backends.cuda.launches import Launch, OperandKey, Part, Recipe, Template, Written, write
from tensorgraph.backends.cuda.runtime import LaunchOf, Memory
from tensorgraph.backends.cuda.spread import WARP
from tensorgraph.backends.cuda.tables import DeviceTable
from tensorgraph.device import Part as PlanPart
from tensorgraph.device import Run, Values
from tensorgraph.dims import Extent, Symbol, evaluate
from tensorgraph.errors import InputError, StateError, UnsupportedError
from tensorgraph.graph import Node

if TYPE_CHECKING:
    from tensorgraph.backends.cuda.device import CudaDevice

Found = dict[tuple[str, Any], Any]
STATUS_BYTES = 64
MOST_SEQUENCES = 16
"""For which there is room in tables at first."""
MOST_MIRRORED = 1 << 16
"""Bytes of an input that is written along with the others; larger ones are written for themselves, as long as they are."""


class Program(Places):
    """A part of a plan on the device. Calling it computes the part.

    Before a run, what differs between runs is written to one piece of memory: what kernels that refuse their input leave, and
    counters (zeros), extents, the tables of streams, and inputs but for large ones.
    """

    def __init__(self, device: CudaDevice, part: PlanPart) -> None:
        super().__init__(part)
        self.device = device
        self._numbers: dict[Extent, int] = {}  # of each extent that changes, its place in the table of extents
        self._given: dict[Call, Found] = {}  # what a call's parameters are made of
        self._recipes: dict[Call, Recipe] = {}
        self._blocks: dict[Call, tuple[Extent, int]] = {}  # items, and those of a block
        for call in self.calls:
            self._describe(call)
        device.require(part.memory.peak_bytes)
        self.outputs = [self.output(n) for n in part.keep if n.op not in ("input", "constant") and not self.stays(n)]
        self.evaluate: Callable[[Mapping[str, int]], tuple[int, ...]] = compiled(list(self._numbers))
        self._dims = {d.name: d.max for e in (*self._numbers, *self._items()) if isinstance(e, Symbol) for d in e.dims()}
        self._large: dict[Node, Memory] = {}
        self.tables: dict[str, DeviceTable] = {}
        self._room = MOST_SEQUENCES
        self._lay_out()
        self._runs: dict[tuple[tuple[bool, ...], tuple[int, ...]], Callable[[], None]] = {}
        self._seen: Any = None
        self._store: Any = None

    def _items(self) -> list[Extent]:
        return [items for items, _ in self._blocks.values()]

    def _lay_out(self) -> None:
        """Where what is written before a run lies."""
        counters = max((call.emit.counters for call in self.calls if isinstance(call.emit, Template)), default=0)
        rooms = {"status": STATUS_BYTES, "counters": 4 * counters, "extents": 8 * len(self._numbers)}
        rooms |= {f"table {name}": 8 * (8 + 8 * self._room) for name in self.tables}
        small = [node for node, buffer in self.external.items() if buffer.nbytes <= MOST_MIRRORED]
        rooms |= {f"input {i}": self.external[node].nbytes for i, node in enumerate(small)}
        self._large = {n: self.device.runtime.take(b.nbytes) for n, b in self.external.items() if b.nbytes > MOST_MIRRORED}
        at, size_bytes = lay_out(rooms)
        self.mirror = self.device.runtime.mirror(size_bytes)
        host = self.mirror.host
        self._at = at | {node: at[f"input {i}"] for i, node in enumerate(small)}
        self._extents = host[at["extents"] : at["extents"] + rooms["extents"]].view(np.int64)
        self._tables = {n: host[at[f"table {n}"] : at[f"table {n}"] + rooms[f"table {n}"]].view(np.int64) for n in self.tables}
        for node in small:
            buffer = self.external[node]
            self.external[node] = host[self._at[node] : self._at[node] + buffer.nbytes].view(buffer.dtype)

    # What a run does.

    def __call__(self, values: Values, run: Run) -> None:
        dims, device = run.dims, self.device
        if self.checks:
            self.check(dims)
        if self.streams:
            self._bind_streams(run)
        self._extents[:] = self.evaluate(dims)
        for node, buffer in self.external.items():
            given = values[node]
            buffer[: given.size] = given if given.ndim == 1 else given.reshape(-1)
            if node in self._large and given.size:
                device.runtime.write(self._large[node].address, buffer[: given.size])
        holds, wide = self.holds(dims), self._class_of(dims)
        if self._seen != (device.version, self._store):
            self._runs.clear()
            self._seen = device.version, self._store
        key = holds, tuple(wide.values())
        if key not in self._runs:
            launches = self._launches(holds, wide)
            if device.version != self._seen[0]:  # making them has moved memory, of which the others do not know
                self._runs.clear()
            self._runs[key] = device.runtime.recorded(self.mirror, launches)
            self._seen = device.version, self._store
        self._runs[key]()
        self._finish(values, dims)

    def _class_of(self, dims: Mapping[str, int]) -> dict[str, int]:
        """The largest extents of runs for which the same launches are made as for these: grids hold for all of them."""
        return {name: min(1 << max(dims[name] - 1, 0).bit_length(), most) for name, most in self._dims.items()}

    def _finish(self, values: Values, dims: Mapping[str, int]) -> None:
        """Read the outputs, and what kernels that refused their input left."""
        arena = self.device.arena.address
        places = [(self.mirror.memory.address + self._at["status"], STATUS_BYTES)]
        seen: list[tuple[Output, int]] = []
        for output in self.outputs:
            if output.buffer is not None:
                values[output.node] = output.array(output.buffer, dims)
                continue
            at, n_bytes = output.offset, int(np.prod(output.shape(dims))) * output.dtype.itemsize
            if output.where is not None:
                buffer = self.part.memory.buffers[root(output.node, self.part.taken)]
                at, n_bytes = buffer.offset, buffer.size_bytes
            places.append((arena + at, n_bytes))
            seen.append((output, at))
        status, *found = self.device.runtime.read(places)
        self._refuse(status.view(np.int64))
        for (output, at), content in zip(seen, found, strict=True):
            values[output.node] = output._replace(shift_bytes=-at).array(content, dims)

    def _refuse(self, status: np.ndarray) -> None:
        if status[0]:
            raise InputError(MESSAGES[int(status[0])].format(*status[1:4].tolist()))

    def _launches(self, holds: tuple[bool, ...], dims: Mapping[str, int]) -> list[LaunchOf]:
        """What is started, for runs of these extents or less."""
        calls = [call for call in self.calls if self.makes(call, holds)]
        written = [self._write(call) for call in calls]
        kernels = self.device.kernels(written)
        self.device.scratch_for(max((self._scratch_bytes(call) for call in calls), default=0))
        launches = []
        for call, each in zip(calls, written, strict=True):
            (items, of_block), recipe = self._blocks[call], self._recipes[call]
            blocks = min(-(-evaluate(items, dims) // of_block), self.device.runtime.most_blocks)
            if blocks > 0:
                args = [self._argument(call, param.kind, param.name, param.part) for param in each.params]
                shared_bytes = self._shared_bytes(call)
                launches.append(LaunchOf(kernels[each.name], blocks, recipe.threads, shared_bytes, np.array(args, np.int64)))
        return launches

    def _write(self, call: Call) -> Written:
        """A call's kernel; as one of a warp for each item where a block's is too much to ask."""
        try:
            return write(self._recipes[call])
        except UnsupportedError:
            recipe = self._recipes[call]
            if recipe.lanes <= WARP:
                raise
            self._set_team(call, recipe, WARP, launches.BLOCK)
            return write(self._recipes[call])

    def _argument(self, call: Call, kind: str, name: str, part: Any) -> int:
        given = self.mirror.memory.address
        if kind == "status":
            return given + self._at["status"]
        if kind == "scratch":
            return self.device.scratch.address
        if kind == "counters":
            return given + self._at["counters"]
        found = self._given[call][name, "place" if kind == "table" else part]
        if kind == "number":
            return int(found)
        if kind == "extent":
            return given + self._at["extents"] + 8 * int(found)
        if kind == "table":
            return given + self._at[f"table {self._store[0].specs[found.of].stream_class.name}"]
        place: Place = self._given[call][name, "place"]
        if place.kind == "external":
            large = self._large.get(place.of)
            return int(found) + (large.address if large is not None else given + self._at[place.of])
        if place.kind == "stream":
            return int(found) + self.device.pages_at(self._store[0].pages(place.of))
        return int(found) + (self.device.arena.address if place.kind == "arena" else int(place.of))

    def _scratch_bytes(self, call: Call) -> int:
        """Of all teams, where it does not fit into shared memory."""
        recipe = self._recipes[call]
        if isinstance(call, Launch) or recipe.shared:
            return 0
        return self.device.runtime.most_blocks * (recipe.threads // recipe.lanes) * (-(-call.scratch_bytes // 64) * 64)

    def _bind_streams(self, run: Run) -> None:
        step: Any = run.state
        if step is None:
            name = next(iter(self.streams))
            raise StateError(f"[run] the plan uses the stream {name!r}; wanted the step of a state store; got none")
        store, runtime = step.store, self.device.runtime
        if self._store != (store, store.moved):
            for name, wanted in self.streams.items():
                if store.layouts[name] != wanted or store.page_rows != 16:
                    got = f"{store.page_rows}, {store.layouts[name]}"
                    raise StateError(f"[run] wanted pages of 16 rows held as {wanted} for {name!r}; got {got}")
            self._store = store, store.moved
            classes = {cls.name: cls for cls in (store.specs[name].stream_class for name in self.streams)}
            if self.tables.keys() != classes.keys():
                self.tables = {name: DeviceTable(cls, runtime) for name, cls in classes.items()}
                self._lay_out()
                self._runs.clear()
        n = len(next(iter(step.classes.values())).tables)
        if n > self._room:
            self._room = 2 * n
            self._lay_out()
            self._runs.clear()
        for name, table in self.tables.items():
            numbers = table.numbers(step.classes[table.stream_class])
            self._tables[name][: len(numbers)] = numbers

    # Building.

    def output(self, node: Node) -> Output:
        """How a node's value is seen after a run: of a constant, which other devices may want, a copy that is made here."""
        found, held = super().output(node), self.part.constants.get(root(node, self.part.taken))
        return found if held is None else found._replace(buffer=self.device.download(held, node.base.dtype))

    def _describe(self, call: Call) -> None:
        given = self._given[call] = {}
        keys = tuple(None if ref is None else self._operand(name, ref, given) for name, ref in call.operands.items())
        attrs = tuple(sorted(call.attrs.items()))
        recipe = Recipe(call.emit, tuple(call.operands), keys, attrs, 0, 0, call.scratch_bytes, True)
        if isinstance(call, Launch):
            self._recipes[call] = recipe._replace(threads=call.threads)
            self._blocks[call] = call.items, call.grain
        else:
            self._set_team(call, recipe, *launches.team(call))

    def _set_team(self, call: Call, recipe: Recipe, lanes: int, threads: int) -> None:
        shared = call.scratch_bytes * (threads // lanes) <= launches.SHARED_BYTES
        self._recipes[call] = recipe._replace(lanes=lanes, threads=threads, shared=shared)
        self._blocks[call] = call.items, threads // lanes

    def _shared_bytes(self, call: Call) -> int:
        if isinstance(call, Launch):
            return call.shared_bytes
        recipe = self._recipes[call]
        return -(-call.scratch_bytes // 64) * 64 * (recipe.threads // recipe.lanes) if recipe.shared else 0

    def _operand(self, name: str, ref: Ref, given: Found) -> OperandKey:
        def part(extent: Extent, known: bool, which: tuple[str, int]) -> Part:
            if isinstance(extent, int):
                given[name, which] = extent
                return extent if known else "n"
            given[name, which] = self._numbers.setdefault(extent, len(self._numbers))
            return "d"

        if isinstance(ref.of, (int, Symbol)):
            return OperandKey(name, "i64", "number", (part(ref.of, False, ("shape", 0)),), (), False)
        place = self.place(ref)
        index_map = place.index_map
        item = 4 if place.dtype.is_block else place.dtype.block_bytes
        dense, static = place.layout == "dense", isinstance(index_map.offset, int)
        given[name, "place"] = place
        given[name, None] = place.offset_bytes + (index_map.offset * item if isinstance(index_map.offset, int) else 0)
        if not static:
            part(index_map.offset, False, ("offset", 0))
        shape = tuple(part(e, ref.known or not dense, ("shape", i)) for i, e in enumerate(index_map.shape))
        last = len(index_map.strides) - 1
        strides = index_map.strides if dense else ()
        written = tuple(part(s, ref.known or (i == last and s in (0, 1)), ("strides", i)) for i, s in enumerate(strides))
        return OperandKey(name, place.dtype.name, place.layout, shape, written, not static)
