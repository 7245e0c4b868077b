"""Programs: the calls of a part of a plan as launches, and what is written to the device before a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorgraph.backends.cpu.evaluation import compiled
from tensorgraph.backends.cpu.kernel import MESSAGES, Call, Ref, lay_out
from tensorgraph.backends.cpu.places import Output, Place, Places, root
from tensorgraph.backends.cuda import launches
from tensorgraph.backends.cuda.launches import Launch, OperandKey, Part, Recipe, Template, Written, write
from tensorgraph.backends.cuda.replay import Given, Prepared, Replay, prepare
from tensorgraph.backends.cuda.runtime import Bytes, LaunchOf, Reads
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
Recorded = Callable[[], list[Bytes]]
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
        items = [items for items, _ in self._blocks.values()]
        self.widest = {d.name: d.max for e in (*self._numbers, *items) if isinstance(e, Symbol) for d in e.dims()}
        self._runs: dict[tuple[tuple[bool, ...], tuple[int, ...], tuple[tuple[int, int], ...]], Recorded] = {}
        self._seen: Any = None  # the state of memory in which recorded runs hold
        self.owner: Replay | None = None  # whose numbers stand in the mirror, if they are not those of a run
        self._store: Callable[[], Any] = lambda: None  # whose pages are read; it may be gone before this is
        self._moved = self._bound = 0  # how often its pages had moved, and how often others have come in their place
        self._pages: dict[str, int] = {}  # the address of each stream's
        self._class_of_stream: dict[str, str] = {}
        self._lay_out({}, MOST_SEQUENCES)

    def _lay_out(self, tables: dict[str, DeviceTable], room: int) -> None:
        """Where what is written before a run lies, with tables for so many sequences.

        Raises: OutOfMemoryError: all is as it was.
        """
        counters = max((call.emit.counters for call in self.calls if isinstance(call.emit, Template)), default=0)
        rooms = {"status": STATUS_BYTES, "counters": 4 * counters, "extents": 8 * len(self._numbers)}
        rooms |= {f"table {name}": 8 * (8 + 8 * room) for name in tables}
        small = [node for node, buffer in self.external.items() if buffer.nbytes <= MOST_MIRRORED]
        rooms |= {f"input {i}": self.external[node].nbytes for i, node in enumerate(small)}
        at, size_bytes = lay_out(rooms)
        large = {n: self.device.runtime.take(b.nbytes) for n, b in self.external.items() if b.nbytes > MOST_MIRRORED}
        mirror = self.device.runtime.mirror(size_bytes)
        self._runs.clear()
        self.owner, self.large, self.mirror, self.tables, self._room = None, large, mirror, tables, room
        self._at = at | {node: at[f"input {i}"] for i, node in enumerate(small)}
        host = mirror.host
        self.extents = host[at["extents"] : at["extents"] + rooms["extents"]].view(np.int64)
        self.table_rows = {n: host[at[f"table {n}"] : at[f"table {n}"] + rooms[f"table {n}"]].view(np.int64) for n in tables}
        for node in small:
            buffer = self.external[node]
            self.external[node] = host[self._at[node] : self._at[node] + buffer.nbytes].view(buffer.dtype)

    # What a run does.

    def __call__(self, values: Values, run: Run) -> None:
        dims, device = run.dims, self.device
        if self.checks:
            self.check(dims)
        self.owner = None
        if self.streams:
            self.bind_streams(run.state)
        self.extents[:] = self.evaluate(dims)
        for node, buffer in self.external.items():
            given = values[node]
            buffer[: given.size] = given if given.ndim == 1 else given.reshape(-1)
            if node in self.large and given.size:
                device.runtime.write(self.large[node].address, buffer[: given.size])
        self.recorded(self.holds(dims), dims)()
        self._finish(values, dims)

    def recorded(self, holds: tuple[bool, ...], dims: Mapping[str, int], places: Reads = ()) -> Recorded:
        """What makes a run of these extents once the mirror is written, and reads places."""
        device, wide = self.device, self._class_of(dims)
        if self._seen != (device.version, self._bound):
            self._runs.clear()
            self._seen = device.version, self._bound
        key = holds, tuple(wide.values()), tuple(places)
        if key not in self._runs:
            made = self._launches(holds, wide)
            if device.version != self._seen[0]:  # making them has moved memory, of which the others do not know
                self._runs.clear()
            self._runs[key] = device.runtime.recorded(self.mirror, made, places)
            self._seen = device.version, self._bound
        return self._runs[key]

    def replay(self, runs: Sequence[Given], varying: Node) -> Prepared | None:
        """Several runs prepared at once, with one element of one input left open; None where they are not alike."""
        return prepare(self, runs, varying)

    def _class_of(self, dims: Mapping[str, int]) -> dict[str, int]:
        """The largest extents of runs for which the same launches are made as for these: grids hold for all of them."""
        return {name: self.widths(name, (dims[name],))[0] for name in self.widest}

    def widths(self, name: str, values: Iterable[int]) -> list[int]:
        """The classes of an extent's values: the next power of two, or the most that it may be."""
        most = self.widest[name]
        return [min(1 << max(n - 1, 0).bit_length(), most) for n in values]

    def _finish(self, values: Values, dims: Mapping[str, int]) -> None:
        """Read the outputs, and what kernels that refused their input left."""
        for output in self.outputs:
            if output.buffer is not None:
                values[output.node] = output.array(output.buffer, dims)
        places, seen = self.places_of(dims)
        status, *found = self.device.runtime.read(places)
        self.refuse(status)
        for (output, at), content in zip(seen, found, strict=True):
            values[output.node] = output._replace(shift_bytes=-at).array(content, dims)

    def places_of(self, dims: Mapping[str, int]) -> tuple[Reads, Sequence[tuple[Output, int]]]:
        """Where kernels say why they refused their input, then the outputs that are not as they were given; these outputs,
        with where in the arena what is read of them begins."""
        arena = self.device.arena.address
        places = [(self.mirror.memory.address + self._at["status"], STATUS_BYTES)]
        seen: list[tuple[Output, int]] = []
        for output in (each for each in self.outputs if each.buffer is None):
            at, n_bytes = output.offset, int(np.prod(output.shape(dims))) * output.dtype.itemsize
            if output.where is not None:
                buffer = self.part.memory.buffers[root(output.node, self.part.taken)]
                at, n_bytes = buffer.offset, buffer.size_bytes
            places.append((arena + at, n_bytes))
            seen.append((output, at))
        return places, seen

    def refuse(self, status: Bytes) -> None:
        """Say what kernels left, if they left anything.

        Raises: InputError.
        """
        numbers = status.view(np.int64)
        if numbers[0]:
            raise InputError(MESSAGES[int(numbers[0])].format(*numbers[1:4].tolist()))

    def _launches(self, holds: tuple[bool, ...], dims: Mapping[str, int]) -> list[LaunchOf]:
        """What is started, for runs of these extents or less."""
        calls = [call for call in self.calls if self.makes(call, holds)]
        written = [self._write(call) for call in calls]
        kernels = self.device.kernels(written)
        self.device.scratch_for(max((self._scratch_bytes(call) for call in calls), default=0))
        made = []
        for call, each in zip(calls, written, strict=True):
            (items, of_block), recipe = self._blocks[call], self._recipes[call]
            if items != 0:  # one block at least: an extent that falls as others grow may be more than at their largest
                blocks = max(1, min(-(-evaluate(items, dims) // of_block), self.device.runtime.most_blocks))
                args = [self._argument(call, param.kind, param.name, param.part) for param in each.params]
                shared_bytes = self._shared_bytes(call)
                made.append(LaunchOf(kernels[each.name], blocks, recipe.threads, shared_bytes, np.array(args, np.int64)))
        return made

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
            return given + self._at[f"table {self._class_of_stream[found.of]}"]
        place: Place = self._given[call][name, "place"]
        if place.kind == "external":
            large = self.large.get(place.of)
            return int(found) + (large.address if large is not None else given + self._at[place.of])
        if place.kind == "stream":
            return int(found) + self._pages[place.of]
        return int(found) + (self.device.arena.address if place.kind == "arena" else int(place.of))

    def _scratch_bytes(self, call: Call) -> int:
        """Of all teams, where it does not fit into shared memory."""
        recipe = self._recipes[call]
        if isinstance(call, Launch) or recipe.shared:
            return 0
        return self.device.runtime.most_blocks * _of_teams(call, recipe)

    def bind_streams(self, step: Any) -> None:
        """Write the tables by which a step's rows are found.

        Raises: StateError.
        """
        if step is None:
            name = next(iter(self.streams))
            raise StateError(f"[run] the plan uses the stream {name!r}; wanted the step of a state store; got none")
        store = step.store
        if self._moved != store.moved or self._store() is not store:
            self._bind_pages(store)
        n = len(next(iter(step.classes.values())).tables)
        if n > self._room:
            self._lay_out(self.tables, 2 * n)
        for name, table in self.tables.items():
            numbers = table.numbers(step.classes[table.stream_class])
            self.table_rows[name][: len(numbers)] = numbers

    def _bind_pages(self, store: Any) -> None:
        for name, wanted in self.streams.items():
            if store.layouts[name] != wanted or store.page_rows != 16:
                got = f"{store.page_rows}, {store.layouts[name]}"
                raise StateError(f"[run] wanted pages of 16 rows held as {wanted} for {name!r}; got {got}")
        classes = {cls.name: cls for cls in (store.specs[name].stream_class for name in self.streams)}
        if self.tables.keys() != classes.keys():
            self._lay_out({name: DeviceTable(cls, self.device.runtime) for name, cls in classes.items()}, self._room)
        self._class_of_stream = {name: store.specs[name].stream_class.name for name in self.streams}
        self._pages = {name: int(store.pages(name).memory.address) for name in self.streams}
        self._store, self._moved, self._bound = weakref.ref(store), store.moved, self._bound + 1

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
        return _of_teams(call, recipe) if recipe.shared else 0

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


def _of_teams(call: Call, recipe: Recipe) -> int:
    """Bytes of scratch of a block's teams."""
    return lay_out({"scratch": call.scratch_bytes})[1] * (recipe.threads // recipe.lanes)
