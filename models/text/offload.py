"""Which part of a model lies on which of two devices: as many layers on the first as fit, experts on the second if wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from tensorgraph.compiler import CompileOptions, PlanCache
from tensorgraph.device import Device
from tensorgraph.dtypes import DType
from tensorgraph.errors import InputError, UnsupportedError
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, Node
from tensorgraph.models.architecture import Model
from tensorgraph.op import node_bytes
from tensorgraph.plan import Plan

GpuLayers = int | Literal["auto"]
EXPERTS = "blk.*.ffn_*_exps.*"
"""Weights of experts that only some tokens need."""
SPARE_BYTES = 256 << 20
"""Left free: code, recorded steps, and what the driver needs."""
GROWTH = 2
"""A store that has no room left for pages takes twice as many as it has, stream by stream."""
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """What a model takes of the first device. Units: bytes; of each layer its weights, those of experts apart, and its state."""

    layers: Sequence[int]
    experts: Sequence[int]
    states: Sequence[int]
    rest: int  # weights of no layer, and what is there for a moment as pages of state move
    arena: int

    def taken(self, n_layers: int, cpu_experts: bool) -> int:
        """With the last n layers there; nothing without any."""
        if n_layers == 0:
            return 0
        first = len(self.layers) - n_layers
        parts = [self.layers, self.states, *([] if cpu_experts else [self.experts])]
        return self.rest + self.arena + sum(sum(part[first:]) for part in parts)


@dataclass(frozen=True)
class Parts:
    """What is to lie where.

    Attributes:
        gpu_layers: how many layers run on the first device, the last ones; "auto": as many as fit, by the plan's own numbers.
        cpu_experts: whether experts lie on the second.
        context: tokens of state for which there is to be room.
        step_tokens: of the largest step.
    """

    gpu_layers: GpuLayers = "auto"
    cpu_experts: bool = False
    context: int = 4096
    step_tokens: int = 512


def place(
    model: Model, devices: Sequence[Device], options: CompileOptions, kv_dtype: DType, cache: PlanCache, parts: Parts
) -> CompileOptions:
    """The options with which a model runs on two devices.

    Raises: InputError: there are not so many layers. UnsupportedError: there are no two devices to choose from.
    """
    if len(devices) != 2:
        given = ", ".join(device.name for device in devices)
        raise UnsupportedError(f"[place] --gpu-layers and --cpu-experts want two devices, such as cuda,cpu; got {given}")
    first, second = devices
    extents = Extents(parts.step_tokens, min(parts.context, model.context), 1)
    graph = model.graph(extents, kv_dtype)
    total = 1 + max((layer for node in graph.constants.values() if (layer := layer_of(node.name)) is not None), default=-1)
    n_layers = total
    if parts.gpu_layers != "auto":
        n_layers = parts.gpu_layers
        if not 0 <= n_layers <= total:
            raise InputError(f"[place] the model has {total} layers; got --gpu-layers {n_layers}")
    elif (free := getattr(first, "free_bytes", lambda: None)()) is not None:
        found = sizes(model, graph, cache.get(graph, first, options), extents, kv_dtype, total)
        fitting = [n for n in range(total + 1) if found.taken(n, parts.cpu_experts) + SPARE_BYTES <= free]
        n_layers = max(fitting, default=0)
    if n_layers == total and not parts.cpu_experts:
        return options
    if n_layers == 0:
        return replace(options, placement={**options.placement, "*": second.name})
    placed = {EXPERTS: second.name} if parts.cpu_experts else {}
    placed |= {f"blk.{i}.*": (second if i < total - n_layers else first).name for i in range(total)} | {"output*": first.name}
    return replace(options, placement={**options.placement, **placed})


def sizes(model: Model, graph: Graph, plan: Plan, extents: Extents, kv_dtype: DType, n_layers: int) -> Sizes:
    """What a plan for one device takes of it."""
    layers, experts, states, rest = [0] * n_layers, [0] * n_layers, [0] * n_layers, 0
    device = plan.devices[0]
    held = getattr(device, "constant_bytes", lambda node, graph: node_bytes(node))
    for name, node in plan.graph.constants.items():
        layer, size_bytes = _layer_of_constant(plan, name, node), held(node, plan.graph)
        if layer is None:
            rest += size_bytes
        else:
            (experts if "_exps." in name else layers)[layer] += size_bytes
    largest = 0
    for name, spec in model.states().items():
        (row, dtype), layer = spec.held_row(kv_dtype), layer_of(name)
        size_bytes = spec.stream_class.n_rows(extents.context) * prod(row) * dtype.itemsize
        states[layer or 0] += GROWTH * size_bytes
        largest = max(largest, size_bytes)
    return Sizes(layers, experts, states, rest + largest, plan.memory[device.name].peak_bytes)


def layer_of(name: str) -> int | None:
    """The layer that a weight, a stream or a node belongs to by its name."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _layer_of_constant(plan: Plan, name: str, node: Node) -> int | None:
    """Of a folded one, that of what it is made of."""
    made = plan.prologue.outputs.get(name) if plan.prologue is not None else None
    sources = Graph({"y": made}).constants if made is not None else {name: node}
    return next((layer for source in sources if (layer := layer_of(source)) is not None), None)
