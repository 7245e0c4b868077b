"""What a backend offers: devices that say which nodes they run, hold values, and compile parts of a plan."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from tensorgraph import registry
from tensorgraph.dtypes import DType
from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Graph, Node
from tensorgraph.memory import Group, MemoryPlan
from tensorgraph.state import Layout, StateSpec

if TYPE_CHECKING:
    from tensorgraph.compiler import CompileOptions

Values = MutableMapping[Node, Any]


class StateAccess(Protocol):
    """What a running step needs of a state store."""

    def append(self, stream: str, rows: np.ndarray) -> None: ...

    def read(self, stream: str) -> np.ndarray: ...


@dataclass
class Run:
    """One run of a plan: the values of its Dims, and its access to state."""

    dims: Mapping[str, int]
    state: StateAccess | None = None


@dataclass(frozen=True)
class Part:
    """A run of nodes that one device computes without leaving it."""

    nodes: tuple[Node, ...]  # in order; views and choices among them, constants and inputs not
    keep: frozenset[Node]  # those whose values are needed after this part
    taken: Mapping[Node, int] = field(default_factory=dict)  # for each choice, the number of the form whose value it has
    groups: tuple[Group, ...] = ()  # the nodes as `Device.groups` joined them
    memory: MemoryPlan = field(default_factory=MemoryPlan)  # of the whole plan, on this device
    constants: Mapping[Node, Any] = field(default_factory=dict)  # uploaded
    options: Any = None  # what the compilation was told


@dataclass
class Traffic:
    """Copies onto a device, counted: how many, and their bytes."""

    copies: int = 0
    size_bytes: int = field(default=0)


class Device(ABC):
    """A place that holds values and runs nodes."""

    name: str
    zeros: Any = staticmethod(np.zeros)  # pages of a stream: an array, or what stands for one in this device's memory
    takes_constants = True  # whether programs find constants among their values, too, not only in their part

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.lock = threading.RLock()  # held while a plan runs: a device has one arena

    @property
    def key(self) -> str:
        """What plans made for this device depend on: its name, and its kind where that is not all."""
        return self.name

    @abstractmethod
    def supports(self, node: Node) -> bool:
        """Whether this device has a kernel for a node, with its dtypes and strides."""

    def set_threads(self, threads: int | Literal["auto"]) -> None:  # noqa: B027 (a device may have no threads)
        """How many threads compute: a number, or "auto"."""

    def constant_layout(self, constant: Node, graph: Graph) -> str:
        """How a constant is to be held that nodes of a graph read."""
        return "dense"

    def stream_layout(self, spec: StateSpec, users: Sequence[tuple[Node, str]]) -> Layout:
        """How a stream is to be held whose rows these users read, each in one slot."""
        return "rows"

    def groups(self, nodes: Sequence[Node], graph: Graph, options: CompileOptions) -> Sequence[Group]:
        """The nodes of a split joined into what is computed in one go."""
        return [Group.of(node) for node in nodes]

    @abstractmethod
    def upload(self, array: np.ndarray, dtype: DType, *, constant: bool = False, layout: str = "dense") -> Any:
        """A value on this device; block types come as `uint8 [..., row_bytes]`, constants stay for the plan's life."""

    @abstractmethod
    def download(self, value: Any, dtype: DType) -> np.ndarray:
        """A value as an array of the dtype's NumPy type (block types: decoded, f32)."""

    @abstractmethod
    def compile(self, part: Part) -> Callable[[Values, Run], None]:
        """A function that computes a part's nodes, reading and writing values by node."""


def readers(graph: Graph, node: Node) -> list[tuple[Node, str]]:
    """Who reads a node, and in which slot: also through dense views that leave its first axis as it is."""
    found = []
    for user in graph.users[node]:
        same = user.op == "view" and user.index_map.is_dense and user.shape[:1] == node.shape[:1]
        if same and user not in graph.outputs.values():
            found += readers(graph, user)
        else:
            slots = user.slots if len(user.slots) == len(user.inputs) else ("",) * len(user.inputs)
            found += [(user, slot) for slot, i in zip(slots, user.inputs, strict=True) if i is node]
    return found


def stream_layouts(graph: Graph, specs: Mapping[str, StateSpec], devices: Sequence[Device]) -> dict[str, Layout]:
    """The streams that are not held as rows, chosen from all that read them; by row where several devices might."""
    if len(devices) > 1:
        return {}
    chosen = {name: devices[0].stream_layout(specs[name], readers(graph, node)) for name, node in graph.streams.items()}
    return {name: layout for name, layout in chosen.items() if layout != "rows"}


def get_devices(names: str | Device | Sequence[str | Device]) -> tuple[Device, ...]:
    """Devices by name: a backend's (`"reference"`), or one of several of a backend (`"reference:1"`); in order of preference."""
    listed = names.split(",") if isinstance(names, str) else [names] if isinstance(names, Device) else list(names)
    devices = tuple(d if isinstance(d, Device) else registry.backends.get(d.partition(":")[0].strip())(d.strip()) for d in listed)
    if not devices or len({d.name for d in devices}) != len(devices):
        raise UnsupportedError(f"[devices] wanted at least one, each once; got {', '.join(d.name for d in devices) or 'none'}")
    return devices
