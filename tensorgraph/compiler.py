"""From a graph to a plan, and the cache that finds a finished plan by topology."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tensorgraph.device import Device, get_devices
from tensorgraph.graph import Graph
from tensorgraph.memory import plan_memory
from tensorgraph.passes import EliminateCommon, ExpandFused, FoldConstants, LowerGuarded
from tensorgraph.patterns import fuse_declared
from tensorgraph.plan import Plan
from tensorgraph.schedule import schedule
from tensorgraph.verify import verify


@dataclass(frozen=True)
class CompileOptions:
    """What a compilation may be told; part of the plan's key.

    Attributes:
        placement: name patterns of weights, streams and nodes to device names.
        scratch_bytes: the most that one guarded form's intermediates may take.
        lowerings: forms to take wherever they exist, whatever their guards.
        fuse: replace plain ops by the fused ops that they expand.
        verify_passes: check the graph after every pass (tests do).
    """

    placement: Mapping[str, str] = field(default_factory=dict)
    scratch_bytes: int = 1 << 31
    lowerings: tuple[str, ...] = ()
    fuse: bool = True
    verify_passes: bool = False

    @property
    def key(self) -> str:
        return repr((sorted(self.placement.items()), self.scratch_bytes, self.lowerings, self.fuse))


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

    def supported(node: object) -> bool:
        return any(d.supports(node) for d in devices)  # type: ignore[arg-type]

    passes: list[Callable[[Graph], Graph]] = [EliminateCommon()]
    if options.fuse:
        passes.append(fuse_declared(supported))
    passes += [LowerGuarded(options.scratch_bytes, options.lowerings), ExpandFused(supported), EliminateCommon()]
    lowered = graph
    for apply in passes:
        lowered = apply(lowered)
        if options.verify_passes:
            verify(lowered)
    folded = FoldConstants()(lowered)
    scheduled = schedule(folded.graph, devices, options.placement)
    outputs = list(scheduled.graph.outputs.values())
    order = [n for s in scheduled.splits for n in s.nodes]
    memory = {
        device: plan_memory(order, outputs, {n for n in order if scheduled.device[n] == device})
        for device in dict.fromkeys(s.device for s in scheduled.splits)
    }
    literals = {n.attrs["name"]: n.data for n in graph.constants.values() if n.data is not None}
    return Plan(plan_key(graph, devices, options), scheduled, devices, memory, folded.prologue, literals)


def plan_key(graph: Graph, devices: Sequence[Device], options: CompileOptions) -> str:
    """The topology key: the graph's structure, the devices and the options; no value, no pointer."""
    text = f"{graph.key}|{','.join(d.name for d in devices)}|{options.key}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class PlanCache:
    """Finished plans by topology. Literals are values, so a plan that is found gets those of the graph that asked.

    Attributes:
        hits, misses: since it was made.
        compile_s: seconds spent compiling.
    """

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
            literals = {n.attrs["name"]: n.data for n in graph.constants.values() if n.data is not None}
            return replace(self._plans[key], literals=literals)
        self.misses += 1
        began = time.perf_counter()
        self._plans[key] = compile(graph, devices, options)
        self.compile_s += time.perf_counter() - began
        return self._plans[key]

    def __len__(self) -> int:
        return len(self._plans)
