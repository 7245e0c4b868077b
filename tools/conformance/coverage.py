"""Which backend runs which op: asked of the devices themselves, for sample nodes of every op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tensorgraph import registry
from tensorgraph.device import Device, get_devices
from tensorgraph.errors import TensorGraphError
from tensorgraph.graph import Graph, Node
from tensorgraph.op import Op
from tensorgraph.passes import ExpandFused
from tensorgraph.tools.conformance.case import draw_any
from tensorgraph.tools.conformance.check import hypothesis, run_drawn

How = Literal["yes", "partly", "by expansion", "no", "absent"]


@dataclass(frozen=True)
class Support:
    """How a backend runs an op: by a kernel of its own for all sample nodes or some, in other ops, or not; or it is not here."""

    op: str
    backend: str
    how: How
    supported: int = 0
    samples: int = 0

    def __str__(self) -> str:
        return f"{self.supported} of {self.samples}" if self.how == "partly" else self.how


def coverage(ops: Sequence[str], backends: Sequence[str], *, samples: int = 20, seed: int = 0) -> list[Support]:
    """Each op on each backend, in that order.

    Raises: UnknownNameError, InputError: as `check`.
    """
    devices = devices_of(backends)
    found = []
    for name in ops:
        nodes = sample_nodes(registry.ops.get(name), samples, seed)
        found += [_support(name, backend, device, nodes) for backend, device in devices.items()]
    return found


@dataclass(frozen=True)
class Tested:
    """What stands behind an op's tests: its laws, and how many of some drawn cases read an input in strides of its own.

    `lacks` is what should be there and is not, in words.
    """

    op: str
    laws: int
    strided: int
    samples: int
    lacks: tuple[str, ...]


def tested(found: Sequence[Support], *, samples: int = 20, seed: int = 0) -> list[Tested]:
    """Of each op whose support was found, in order."""
    by_op: dict[str, list[Support]] = {}
    for support in found:
        by_op.setdefault(support.op, []).append(support)
    return [
        _tested(registry.ops.get(name), its, sample_nodes(registry.ops.get(name), samples, seed)) for name, its in by_op.items()
    ]


def _tested(op: Op, found: Sequence[Support], nodes: Sequence[Node]) -> Tested:
    strided = sum(any(i.op == "view" and not i.index_map.is_dense for i in node.inputs) for node in nodes)
    takes_inputs = any(node.inputs for node in nodes)
    lacks = [f"a kernel on {s.backend}" for s in found if s.how == "no"]
    lacks += ["a law"] * (not op.laws) + ["strided cases"] * (takes_inputs and not strided)
    return Tested(op.name, len(op.laws), strided, len(nodes), tuple(lacks))


def devices_of(backends: Sequence[str]) -> dict[str, Device | None]:
    """Devices by name; None where there is no such hardware on this machine.

    Raises: UnknownNameError: there is no such backend.
    """
    devices: dict[str, Device | None] = {}
    for name in backends:
        registry.backends.get(name.partition(":")[0])
        try:
            (devices[name],) = get_devices(name)
        except TensorGraphError:
            devices[name] = None
    return devices


def sample_nodes(op: Op, count: int, seed: int) -> list[Node]:
    """Nodes of an op as `check` draws them."""
    nodes: list[Node] = []

    def one(data: Any) -> None:
        case, _ = draw_any(op, data.draw)
        nodes.append(case.node)

    run_drawn(hypothesis(), one, count, seed)
    return nodes


def _support(op: str, backend: str, device: Device | None, nodes: Sequence[Node]) -> Support:
    if device is None:
        return Support(op, backend, "absent")
    own = sum(device.supports(node) for node in nodes)
    if own == len(nodes):
        return Support(op, backend, "yes", own, len(nodes))
    supported = sum(runs_expanded(node, device) for node in nodes)
    how: How = "by expansion" if supported == len(nodes) else "partly" if supported else "no"
    return Support(op, backend, how, supported, len(nodes))


def runs_expanded(node: Node, device: Device) -> bool:
    """Whether a device runs a node, or all that it expands into."""
    expanded = ExpandFused(device.supports)(Graph(y=node))
    return all(device.supports(n) for n in expanded.nodes if n.op not in ("input", "constant"))
