"""Plans: a compiled graph that any weights, state and inputs of its topology can be bound to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from tensorgraph.device import Device, Part, Run, StateAccess, Values
from tensorgraph.dims import Bindings, Dim, shape_text, unify
from tensorgraph.dtypes import DType
from tensorgraph.errors import InputError, UnknownNameError
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.memory import Group, MemoryPlan, plan_memory
from tensorgraph.op import node_bytes
from tensorgraph.registry import ops
from tensorgraph.schedule import Schedule, schedule
from tensorgraph.text import node_text

WeightSource = Callable[[str], np.ndarray]
Weights = WeightSource | Mapping[str, np.ndarray] | None
Compute = Callable[[Values, Run], None]
Program = tuple[Device, Compute, Values, tuple[tuple[str, Node], ...]]


@dataclass(frozen=True)
class PlanReport:
    """What one step of given extents costs, without running it. Units: bytes, operations."""

    nodes: int
    kernels: int
    splits: int
    copies: int
    copy_bytes: int
    arena_bytes: Mapping[str, int]
    weight_bytes: int
    read_write_bytes: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """The result of compiling: a scheduled graph, an arena's layout per device, and a prologue for folded constants.

    A plan holds no weights: `bind` attaches them. `print(plan)` shows it.
    """

    key: str
    scheduled: Schedule
    devices: tuple[Device, ...]
    memory: Mapping[str, MemoryPlan]
    prologue: Graph | None
    literals: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: tuple[tuple[Group, ...], ...] = ()  # of each split, as its device joined its nodes
    options: Any = None

    @property
    def graph(self) -> Graph:
        return self.scheduled.graph

    @cached_property
    def choices(self) -> tuple[Node, ...]:
        return tuple(n for n in self.graph.nodes if n.op == "choose")

    def choose(self, dims: Bindings) -> tuple[int, ...]:
        """Which form of each choice a step of these extents takes."""
        if not self.choices:
            return ()
        return tuple(next(i for i, guard in enumerate(node.attrs["guards"]) if guard.holds(dims)) for node in self.choices)

    def active(self, choice: Sequence[int]) -> frozenset[Node]:
        """The nodes that a step computes when its choices fall so."""
        taken = dict(zip(self.choices, choice, strict=True))
        found: set[Node] = set()
        stack = [*self.graph.effects, *self.graph.outputs.values()]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            stack.extend((node.inputs[taken[node]],) if node.op == "choose" else node.inputs)
        return frozenset(found)

    def bind(self, weights: Weights = None, *, uploaded: MutableMapping[tuple[str, str], Any] | None = None) -> Executable:
        """Attach weights by name (a mapping or a function); literals come with the graph.

        `uploaded` holds the values on devices, by device and name: plans of one model that share it hold weights once.

        Raises:
            UnknownNameError: a weight is missing.
            InputError: one has another shape.
        """
        return Executable(self, weights, {} if uploaded is None else uploaded)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run once with literals only; `bind` first where a plan is run often."""
        return self.bind().run(inputs)

    def report(self, dims: Bindings) -> PlanReport:
        """Cost of a step of the given extents."""
        computed = self.active(self.choose(dims))
        active = [n for n in self.graph.nodes if n in computed]
        kernels = [n for n in active if n.op not in STRUCTURAL]
        costs = [ops.get(n.op).cost(n, dims) for n in kernels]
        return PlanReport(
            nodes=len(active),
            kernels=sum(g.kernels(dims) for split in self.groups for g in split if not computed.isdisjoint(g.nodes)),
            splits=len(self.scheduled.splits),
            copies=sum(n.op == "copy" for n in active),
            copy_bytes=sum(node_bytes(n, dims) for n in active if n.op == "copy"),
            arena_bytes={device: memory.peak_bytes for device, memory in self.memory.items()},
            weight_bytes=sum(node_bytes(n) for n in active if n.op == "constant"),
            read_write_bytes=sum(c.size_bytes for c in costs),
            flops=sum(c.flops for c in costs),
        )

    def __str__(self) -> str:
        number = self.graph.number
        given = [n for n in self.graph.nodes if n.op in ("input", "constant")]
        lines = [f"plan {self.key}", *(f"  {node_text(n, number)}" for n in given)]
        for i, split in enumerate(self.scheduled.splits):
            lines.append(f"split {i} on {split.device}")
            buffers = self.memory[split.device].buffers
            for group in self.groups[i]:
                joined = len(group.nodes) > 1
                if joined:
                    scratch = "".join(f", {thing} @{buffers[thing].offset}+{n}" for thing, n in group.scratch.items())
                    lines.append(f"  together{scratch}:")
                for node in group.nodes:
                    buffer = buffers.get(node)
                    at = f" @{buffer.offset}+{buffer.size_bytes}" if buffer else ""
                    lines.append(f"{'    ' if joined else '  '}{node_text(node, number)}{at}")
        for device, memory in self.memory.items():
            lines.append(f"arena {device}: {memory.peak_bytes} bytes ({memory.total_bytes} without sharing)")
        for node, wanted, got in self.scheduled.moved:
            lines.append(f"moved %{number.get(node, '?')} {node.op}: {wanted} does not support it, runs on {got}")
        return "\n".join(lines)


def lay_out(
    key: str,
    scheduled: Schedule,
    devices: Sequence[Device],
    options: Any,
    prologue: Graph | None = None,
    literals: Mapping[str, np.ndarray] | None = None,
) -> Plan:
    """The plan of a scheduled graph: its nodes in groups, as its devices join them, and a place in memory for what is stored."""
    named = {d.name: d for d in devices}
    groups = tuple(tuple(named[s.device].groups(s.nodes, scheduled.graph, options)) for s in scheduled.splits)
    order = [group for split in groups for group in split]
    outputs = list(scheduled.graph.outputs.values())
    memory = {
        device: plan_memory(order, outputs, {n for s in scheduled.splits if s.device == device for n in s.nodes})
        for device in dict.fromkeys(s.device for s in scheduled.splits)
    }
    return Plan(key, scheduled, tuple(devices), memory, prologue, literals or {}, groups, options)


class Executable:
    """A plan with its weights: `run` computes the outputs of one step."""

    def __init__(self, plan: Plan, weights: Weights, uploaded: MutableMapping[tuple[str, str], Any]) -> None:
        self.plan, self._uploaded = plan, uploaded
        self._devices = {d.name: d for d in plan.devices}
        # expressions last: they are checked once their Dims are bound
        self._inputs = sorted(plan.graph.inputs.items(), key=lambda i: any(not isinstance(e, (int, Dim)) for e in i[1].shape))
        self._programs: dict[tuple[int, ...], list[Program]] = {}
        self._constants: dict[str, dict[Node, Any]] = {name: {} for name in self._devices}
        self._outputs = tuple(plan.graph.outputs.items())
        self._locks = tuple(d.lock for d in sorted(plan.devices, key=lambda d: d.name))  # always taken in the same order
        self._attach(weights)

    def _attach(self, weights: Weights) -> None:
        plan = self.plan
        source = weights if callable(weights) else _from_mapping(weights or {})
        wanted: dict[Node, set[str]] = {}
        for split in plan.scheduled.splits:
            for node in (i for n in split.nodes for i in n.inputs if i.op == "constant"):
                wanted.setdefault(node, set()).add(split.device)
        for node in plan.graph.outputs.values():
            if node.op == "constant":
                wanted.setdefault(node, set()).add(plan.scheduled.device[node])
        computed = plan.prologue.outputs if plan.prologue else {}
        for node, devices in wanted.items():
            name = node.attrs["name"]
            part = Graph({"y": computed[name]}) if name in computed else None
            local = name in plan.literals or (part is not None and not plan.literals.keys().isdisjoint(part.constants))
            held = {} if local else self._uploaded
            label = f"fold {part.key}" if part is not None else name  # the same in all plans of a model, unlike fold:N
            for device in devices:
                layout = self._devices[device].constant_layout(node, plan.graph)
                key = device, label if layout == "dense" else f"{label} {layout}"
                if key not in held:
                    array = self._fold(part, weights) if part else plan.literals[name] if local else np.asarray(source(name))
                    _check_array("weight", name, node, array)
                    held[key] = self._devices[device].upload(array, node.dtype, constant=True, layout=layout)
                self._constants[device][node] = held[key]

    def _fold(self, part: Graph, weights: Weights) -> np.ndarray:
        """A constant that is computed from others."""
        plan = self.plan
        prologue = lay_out(plan.key, schedule(part, plan.devices), plan.devices, plan.options, None, plan.literals)
        return Executable(prologue, weights, {}).run({})["y"]

    def run(
        self, inputs: Mapping[str, np.ndarray], *, state: StateAccess | None = None, dims: Bindings | None = None
    ) -> dict[str, np.ndarray]:
        """Compute the outputs from inputs by name.

        Dims take their values from the arrays' shapes; `dims` gives those that no input has.

        Raises: InputError: an input is missing, unknown, or does not fit its shape or dtype.
        """
        return self.step(inputs, self._bind_dims(inputs, dims or {}), state)

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The names of the inputs whose values are read at all."""
        read = {r.base for split in self.plan.groups for group in split for r in group.reads}
        read |= {n.base for n in self.plan.graph.outputs.values()}
        return tuple(name for name, node in self.plan.graph.inputs.items() if node in read)

    @cached_property
    def by_token(self) -> frozenset[str]:
        """The outputs that have a row for each new token, or for each whose logits are wanted."""
        outputs = self.plan.graph.outputs.items()
        return frozenset(name for name, n in outputs if n.ndim and isinstance(n.shape[0], Dim) and n.shape[0].name in ("T", "O"))

    def step(self, inputs: Mapping[str, np.ndarray], dims: Bindings, state: StateAccess | None) -> dict[str, np.ndarray]:
        """`run` unchecked: of the inputs, those that are `needed`, in their dtype; the values of all Dims."""
        with ExitStack() as held:
            list(map(held.enter_context, self._locks))
            values: Values = {}
            run = Run(dims, state)
            for device, program, fixed, needs in self._program(self.plan.choose(dims)):
                for name, node in needs:
                    values[node] = device.upload(inputs[name], node.dtype)
                if fixed:
                    values.update(fixed)
                program(values, run)
            return {name: self._result(node, values, inputs) for name, node in self._outputs}

    def replay(
        self, runs: Sequence[tuple[Mapping[str, np.ndarray], Bindings, StateAccess]], varying: str
    ) -> Callable[[int, Any], np.ndarray | None] | None:
        """Several steps prepared at once, of one plan with one output; `replay(i, x)` is the output's only row in the i-th, x
        being the only element of the input `varying`, or None where something else ran in between. None where no device can."""
        choices = {self.plan.choose(dims) for _, dims, _ in runs}
        with ExitStack() as held:
            list(map(held.enter_context, self._locks))
            programs = self._program(choices.pop()) if len(choices) == 1 else []
        if len(programs) != 1 or len(self._outputs) != 1 or not hasattr(programs[0][1], "replay"):
            return None
        _, program, fixed, needs = programs[0]
        given = [({node: inputs[name] for name, node in needs}, Run(dims, state)) for inputs, dims, state in runs]
        prepare: Callable[..., Callable[[int, Any], np.ndarray | None] | None] = getattr(program, "replay")  # noqa: B009
        return prepare(given, self.plan.graph.inputs[varying])

    def _result(self, node: Node, values: Values, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        device = self._devices[self.plan.scheduled.device[node]]
        if node.op == "input":
            return device.download(device.upload(np.asarray(inputs[node.attrs["name"]]), node.dtype), node.dtype)
        return device.download(self._constants[device.name][node] if node.op == "constant" else values[node], node.dtype)

    def _bind_dims(self, inputs: Mapping[str, np.ndarray], given: Bindings) -> dict[str, int]:
        wanted = self.plan.graph.inputs
        unknown = [name for name in inputs if name not in wanted]
        missing = [name for name in wanted if name not in inputs]
        if unknown or missing:
            raise InputError(
                f"[run] wanted the inputs {', '.join(wanted) or 'none'}; missing: {', '.join(missing) or 'none'}, "
                f"unknown: {', '.join(unknown) or 'none'}"
            )
        bound = dict(given)
        for name, node in self._inputs:
            array, dtype = np.asarray(inputs[name]), node.dtype.numpy
            if dtype is not None and array.dtype != dtype and not np.can_cast(array.dtype, dtype, "same_kind"):
                raise InputError(f"[run] {name} must be {node.dtype}; got {array.dtype}")
            if array.ndim != node.ndim or not all(map(partial(unify, bound), node.shape, array.shape)):
                dims = dict.fromkeys(d for e in node.shape if not isinstance(e, int) for d in e.dims())
                limits = "".join(f", {d} <= {d.max}" for d in dims)
                known = "".join(f"; {d} is {bound[d.name]}" for d in dims if d.name in bound)
                raise InputError(f"[run] {name} must be {shape_text(node.shape)}{limits}; got {list(array.shape)}{known}")
        unbound = [name for name in self.plan.graph.dims if name not in bound]
        wrong = [f"{d} = {bound[d.name]}" for d in self.plan.graph.dims.values() if not 0 <= bound.get(d.name, 0) <= d.max]
        if wrong:
            limits = ", ".join(f"{d} <= {d.max}" for d in self.plan.graph.dims.values())
            raise InputError(f"[run] wanted the extents {limits}; got {', '.join(wrong)}")
        if unbound:
            raise InputError(f"[run] no input gives the extents {', '.join(unbound)}; pass them as dims")
        return bound

    def _program(self, choice: tuple[int, ...]) -> list[Program]:
        if choice not in self._programs:
            self._programs[choice] = [*self._compile(choice)]
        return self._programs[choice]

    def _compile(self, choice: tuple[int, ...]) -> Iterator[Program]:
        active = self.plan.active(choice)
        taken = dict(zip(self.plan.choices, choice, strict=True))
        outputs = set(self.plan.graph.outputs.values())
        used_by: dict[Node, set[int]] = {}
        for i, split in enumerate(self.plan.scheduled.splits):
            for node in split.nodes:
                for source in node.inputs:
                    used_by.setdefault(source, set()).add(i)
        for i, split in enumerate(self.plan.scheduled.splits):
            nodes = tuple(n for n in split.nodes if n in active)
            if not nodes:
                continue
            keep = frozenset(n for n in nodes if n.op != "copy" and (n in outputs or any(u > i for u in used_by.get(n, ()))))
            device = self._devices[split.device]
            copies = [(n, self._devices[self.plan.scheduled.device[n.inputs[0]]]) for n in nodes if n.op == "copy"]
            groups = tuple(g for g in self.plan.groups[i] if not active.isdisjoint(g.nodes))
            held, memory = self._constants[device.name], self.plan.memory[device.name]
            part = Part(tuple(n for n in nodes if n.op != "copy"), keep, taken, groups, memory, held, self.plan.options)
            read = dict.fromkeys([*(r.base for group in groups for r in group.reads), *(n.base for n in keep)])
            needs = tuple((n.attrs["name"], n) for n in read if n.op == "input")
            fixed = {n: held[n] for n in read if n.op == "constant" and device.takes_constants}
            yield device, _after_copies(device, copies, device.compile(part)), fixed, needs


def _after_copies(device: Device, copies: Sequence[tuple[Node, Device]], compute: Compute) -> Compute:
    """A split's program: bring what other devices computed, then compute."""
    if not copies:
        return compute

    def run(values: Values, step: Run) -> None:
        for node, source in copies:
            array = source.download(values[node.inputs[0]], node.dtype)
            device.traffic.copies += 1
            device.traffic.size_bytes += array.nbytes
            values[node] = device.upload(array, node.dtype)
        compute(values, step)

    return run


def _from_mapping(weights: Mapping[str, np.ndarray]) -> WeightSource:
    def find(name: str) -> np.ndarray:
        if name not in weights:
            raise UnknownNameError(f"[bind] the weight {name!r} is missing; given: {', '.join(list(weights)[:20]) or 'none'}")
        return weights[name]

    return find


def _check_array(kind: str, name: str, node: Node, array: np.ndarray) -> None:
    dtype: DType = node.dtype
    wanted = list(node.shape)
    if dtype.is_block:
        wanted[-1] = dtype.size_bytes(int(wanted[-1]))  # type: ignore[arg-type]
    if list(array.shape) != wanted or (not dtype.is_block and array.dtype != dtype.numpy):
        raise InputError(f"[bind] the {kind} {name!r} must be {dtype}{wanted}; got {array.dtype}{list(array.shape)}")
