"""Plans on disk: a graph that was compiled before, by the same code for the same machine, is not compiled again.

They lie beside the code that they call, in a folder that only its owner can write, and hold for the same source as that code
does (`recipes`). What cannot be written down, a plan with functions of another package say, is compiled at each start.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from tensorgraph.backends.cpu.code_cache import CodeCache
from tensorgraph.backends.cpu.group import PlainGroup
from tensorgraph.backends.cpu.kernel import Call
from tensorgraph.backends.cpu.recipes import PACKAGE, source_key
from tensorgraph.compiler import CompileOptions, PlanCache
from tensorgraph.device import Device
from tensorgraph.dims import Dim, FloorDiv, Guard, Poly
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.graph import Graph, Node
from tensorgraph.plan import Plan
from tensorgraph.views import IndexMap

_OTHERS = {("builtins", "frozenset"), ("functools", "partial")}
"""What plans are made of beside this package's own."""


class KeptPlans(PlanCache):
    """Plans by topology, those that were compiled for one device alone on disk, too.

    Args:
        measured: what the plan of a graph depends on beside it, as a text.
    """

    def __init__(self, disk: CodeCache, measured: Callable[[Graph], str] = lambda graph: "") -> None:
        super().__init__()
        self.disk, self.measured = disk, measured

    def make(self, key: str, graph: Graph, devices: Sequence[Device], options: CompileOptions) -> Plan:
        source = source_key() if len(devices) == 1 and not options.verify_passes else None
        if source is None:
            return super().make(key, graph, devices, options)

        def place() -> str:
            return hashlib.sha256(f"plan|{source}|{key}|{self.measured(graph)}".encode()).hexdigest()

        kept = read_plan(self.disk.get(place()))
        if kept is not None:
            return replace(kept, devices=tuple(devices), literals=graph.literals, options=options)
        plan = super().make(key, graph, devices, options)
        content = plan_content(plan)
        if content is not None:
            self.disk.put(place(), content)  # compiling may have measured something
        return plan


def plan_content(plan: Plan) -> bytes | None:
    """A plan without its devices, literals and options; None where it cannot be written down."""
    graphs = [plan.graph] + ([plan.prologue] if plan.prologue is not None else [])
    nodes = list(dict.fromkeys(node for graph in graphs for node in graph.nodes))
    stream = io.BytesIO()
    try:
        pickler = _Pickler(stream, 5)
        # nodes in order first, each after what it reads: no chain of them is as deep as a model
        pickler.dump((nodes, replace(plan, devices=(), literals={}, options=None)))
        return pickle.dumps(list(pickler.values), 5) + stream.getvalue()
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
        return None


def read_plan(content: bytes | None) -> Plan | None:
    """What `plan_content` gave; None where it is something else."""
    if content is None:
        return None
    try:
        stream = io.BytesIO(content)
        values = _Unpickler(stream).load()
        _, plan = _Unpickler(stream, values).load()
    except (pickle.UnpicklingError, AttributeError, ImportError, TypeError, ValueError, IndexError, EOFError):
        return None
    return plan if isinstance(plan, Plan) else None


@dataclass(frozen=True)
class _Made:
    """Calls of a group that were made before."""

    calls: Sequence[Call]

    def __call__(self) -> Sequence[Call]:
        return self.calls


_VALUES = (IndexMap, Dim, Poly, FloorDiv, Guard)
"""Of which there are few that differ: each is written once."""


class _Pickler(pickle.Pickler):
    """Writes a plan, but for values that are numbered.

    Attributes:
        values: their numbers.
    """

    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol)
        self.values: dict[Any, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        return self.values.setdefault(value, len(self.values)) if isinstance(value, _VALUES) else None

    def reducer_override(self, value: Any) -> Any:
        reduce = _REDUCERS.get(type(value))
        return reduce(value) if reduce is not None else NotImplemented


_REDUCERS: Mapping[type, Callable[[Any], Any]] = {
    MappingProxyType: lambda m: (_read_only, (dict(m),)),
    Node: lambda n: (Node, (n.op, n.inputs, n.shape, n.dtype, dict(n.attrs), n.slots, n.name, sys.intern(n.where))),
    Graph: lambda g: (_graph, (dict(g.outputs), g.effects)),
    DType: lambda d: (as_dtype, (d.name,)),
    PlainGroup: lambda g: (PlainGroup, (g.nodes, g.stored, dict(g.scratch), _Made(tuple(g.calls)))),
}


def _read_only(items: dict[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(items)


def _graph(outputs: Mapping[str, Node], effects: Sequence[Node]) -> Graph:
    return Graph(outputs, effects=effects)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, values: Sequence[Any] = ()) -> None:
        super().__init__(stream)
        self.persistent_load = values.__getitem__  # type: ignore[method-assign]

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(PACKAGE) or (module, name) in _OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plan")
