"""From a graph to a plan, the cache that finds a finished plan by topology, and one op run on arrays."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.device import Device, get_devices
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Graph, Node, input
from tensorgraph.passes import EliminateCommon, ExpandFused, FoldConstants, Folded, LowerGuarded
from tensorgraph.patterns import fuse_declared
from tensorgraph.plan import Plan, lay_out
from tensorgraph.schedule import schedule
from tensorgraph.state import Layout
from tensorgraph.verify import verify

PASSES = ("eliminate_common", "fuse_declared", "lower_guarded", "expand_fused", "fold_constants")


@dataclass(frozen=True)
class CompileOptions:
    """What a compilation may be told; part of the plan's key."""

    placement: Mapping[str, str] = field(default_factory=dict)  # name patterns of weights, streams and nodes to device names
    scratch_bytes: int = 1 << 31  # the most that one guarded form's intermediates may take
    lowerings: tuple[str, ...] = ()  # forms to take wherever they exist, whatever their guards
    fuse: bool = True  # join nodes: replace plain ops by the fused ops that they expand, compute several in one go
    exact: bool = False  # products take numbers as they are
    layouts: Mapping[str, Layout] = field(default_factory=dict)  # of streams that are not held as rows
    without: tuple[str, ...] = ()  # passes to leave out, of `PASSES`, to see what is due to them
    verify_passes: bool = False  # check the graph after every pass (tests do)

    @property
    def key(self) -> str:
        named = sorted(self.placement.items()), sorted(self.layouts.items())
        return repr((*named, self.scratch_bytes, self.lowerings, self.fuse, self.exact, self.without))


def compile(
    graph: Graph, backend: str | Device | Sequence[str | Device] = "reference", options: CompileOptions | None = None
) -> Plan:
    """Compile a graph for a backend, or for several devices in order of preference.

    Raises:
        GraphError: the graph is not well formed.
        UnsupportedError: no device supports a node.
    """
    devices, options = get_devices(backend), options or CompileOptions()
    verify(graph)

    def supported(node: Node) -> bool:
        return any(d.supports(node) for d in devices)

    made: dict[str, Callable[[Graph], Graph]] = {"eliminate_common": EliminateCommon(), "fuse_declared": fuse_declared(supported)}
    made |= {"lower_guarded": LowerGuarded(options.scratch_bytes, options.lowerings), "expand_fused": ExpandFused(supported)}
    checked: Callable[[Graph], Graph] = verify if options.verify_passes else lambda graph: graph
    left_out = {*options.without, *(() if options.fuse else ("fuse_declared",))}
    lowered = graph
    for name in (*made, "eliminate_common"):
        if name not in left_out:
            lowered = checked(made[name](lowered))
    folded = Folded(lowered, None) if "fold_constants" in left_out else FoldConstants()(lowered)
    scheduled = schedule(checked(folded.graph), devices, options.placement)
    return lay_out(plan_key(graph, devices, options), scheduled, devices, options, folded.prologue, graph.literals)


def plan_key(graph: Graph, devices: Sequence[Device], options: CompileOptions) -> str:
    """The topology key: the graph's structure, the devices and the options; no value, no pointer."""
    placed = [node.name for node in graph.nodes] if options.placement else []  # names count where placement goes by them
    text = f"{graph.key}|{','.join(d.key for d in devices)}|{options.key}|{placed}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(slots=True)
class PlanCache:
    """Finished plans by topology. One that is found gets the literals of the graph, and the devices, that asked."""

    hits: int = 0
    misses: int = 0
    compile_s: float = 0.0
    _plans: dict[str, Plan] = field(default_factory=dict, repr=False)

    def get(
        self, graph: Graph, backend: str | Device | Sequence[str | Device] = "reference", options: CompileOptions | None = None
    ) -> Plan:
        """The plan of a graph's topology, compiled if it is not there."""
        devices, options = get_devices(backend), options or CompileOptions()
        key = plan_key(graph, devices, options)
        if key in self._plans:
            self.hits += 1
            found = self._plans[key]
            same = found.literals is graph.literals and found.devices == devices
            return found if same else replace(found, literals=graph.literals, devices=devices)
        self.misses += 1
        began = time.perf_counter()
        self._plans[key] = self.make(key, graph, devices, options)
        self.compile_s += time.perf_counter() - began
        return self._plans[key]

    def make(self, key: str, graph: Graph, devices: Sequence[Device], options: CompileOptions) -> Plan:
        """The plan of a topology that is not there: compiled."""
        return compile(graph, devices, options)

    def __len__(self) -> int:
        return len(self._plans)


def run_op(name: str, *arrays: Any, backend: str | Device | Sequence[str | Device] = "reference", **attrs: Any) -> np.ndarray:
    """Apply one op to arrays on a backend.

    Inputs stand in the op's order or by name (None where an optional one is absent); tuples of arrays, such as attention's
    segments, are taken apart.

    Raises: ShapeError, DTypeError, AttributeValueError: as when the op builds a node of a graph.
    """
    given: dict[str, np.ndarray] = {}

    def lift(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            label = f"in{len(given)}"
            given[label] = array
            return input(label, array.shape, as_dtype(array.dtype))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(lift, value))
        return value

    node: Node = registry.ops.get(name)(*map(lift, arrays), **{k: lift(v) for k, v in attrs.items()})
    plan = compile(Graph(y=node), backend, CompileOptions(fuse=False))
    used = plan.graph.inputs
    return plan.bind().run({k: v for k, v in given.items() if k in used})["y"]
