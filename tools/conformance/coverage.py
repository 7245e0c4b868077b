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
    devices: dict[str, Device | None] = {}
    for name in backends:
        registry.backends.get(name)
        try:
            (devices[name],) = get_devices(name)
        except TensorGraphError:  # no such hardware on this machine
            devices[name] = None
    found = []
    for name in ops:
        nodes = sample_nodes(registry.ops.get(name), samples, seed)
        found += [_support(name, backend, device, nodes) for backend, device in devices.items()]
    return found


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
    supported = sum(_runs_expanded(node, device) for node in nodes)
    how: How = "by expansion" if supported == len(nodes) else "partly" if supported else "no"
    return Support(op, backend, how, supported, len(nodes))


def _runs_expanded(node: Node, device: Device) -> bool:
    """Whether a device runs a node, or all that it expands into."""
    expanded = ExpandFused(device.supports)(Graph(y=node))
    return all(device.supports(n) for n in expanded.nodes if n.op not in ("input", "constant"))
