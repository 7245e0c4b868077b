"""What a backend offers: devices that say which nodes they run, hold values, and compile parts of a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tensorgraph import registry
from tensorgraph.dtypes import DType
from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import Node

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


@dataclass
class Traffic:
    """Copies onto a device, counted: how many, and their bytes."""

    copies: int = 0
    size_bytes: int = field(default=0)


class Device(ABC):
    """A place that holds values and runs nodes."""

    name: str

    def __init__(self) -> None:
        self.traffic = Traffic()

    @abstractmethod
    def supports(self, node: Node) -> bool:
        """Whether this device has a kernel for a node, with its dtypes and strides."""

    @abstractmethod
    def upload(self, array: np.ndarray, dtype: DType, *, constant: bool = False) -> Any:
        """A value on this device; block types come as `uint8 [..., row_bytes]`, constants stay for the plan's life."""

    @abstractmethod
    def download(self, value: Any, dtype: DType) -> np.ndarray:
        """A value as an array of the dtype's NumPy type (block types: decoded, f32)."""

    @abstractmethod
    def compile(self, part: Part) -> Callable[[Values, Run], None]:
        """A function that computes a part's nodes, reading and writing values by node."""


def get_devices(names: str | Device | Sequence[str | Device]) -> tuple[Device, ...]:
    """Devices by name: a backend's (`"reference"`), or one of several of a backend (`"reference:1"`); in order of preference."""
    listed = names.split(",") if isinstance(names, str) else [names] if isinstance(names, Device) else list(names)
    devices = tuple(d if isinstance(d, Device) else registry.backends.get(d.partition(":")[0].strip())(d.strip()) for d in listed)
    if not devices or len({d.name for d in devices}) != len(devices):
        raise UnsupportedError(f"[devices] wanted at least one, each once; got {', '.join(d.name for d in devices) or 'none'}")
    return devices
