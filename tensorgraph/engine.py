"""Engines: a model on devices, with its plans and its weights there."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tensorgraph.compiler import CompileOptions, PlanCache
from tensorgraph.device import Device, get_devices, stream_layouts
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.graph import Graph
from tensorgraph.plan import Executable
from tensorgraph.state import Layout, StateSpec
from tensorgraph.state_store import StateStore

LOGITS = "logits"


class GraphModel(Protocol):
    """What a session needs of a model."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int: ...

    def states(self) -> Mapping[str, StateSpec]: ...

    def graph(self, extents: Extents, kv_dtype: DType, outputs: Sequence[str] = (LOGITS,)) -> Graph:
        """One step: inputs as `extents.StepInputs` gives them; outputs: `logits` [O, V], or the names of nodes."""

    def weight(self, name: str) -> np.ndarray: ...


@dataclass(slots=True)
class Stats:
    """Counted since an engine was made; of the steps, those that were prepared in advance took no plan from the cache."""

    steps: int = 0
    prepared: int = 0
    tokens: int = 0
    run_s: float = 0.0


class Engine:
    """A model on devices: its plans, its weights there, and counters; shared by the model's sessions.

    One step at a time: threads that step sessions of one engine wait for each other.
    """

    def __init__(
        self,
        model: GraphModel,
        backend: str | Device | Sequence[str | Device] = "reference",
        *,
        kv_dtype: DType | str = "f16",
        options: CompileOptions | None = None,
        cache: PlanCache | None = None,
    ) -> None:
        self.model, self.devices, self.options = model, get_devices(backend), options or CompileOptions()
        self.kv_dtype, self.vocab_size = as_dtype(kv_dtype), model.vocab_size
        self.cache = cache if cache is not None else PlanCache()
        self.stats = Stats()
        self.lock = threading.RLock()
        self._graphs: dict[tuple[Extents, tuple[str, ...]], Graph] = {}
        self._bound: dict[str, Executable] = {}
        self._ready: dict[tuple[Extents, tuple[str, ...]], tuple[Executable, StepInputs]] = {}
        self._uploaded: dict[tuple[str, str], Any] = {}
        self._layouts: dict[str, Layout] | None = None

    def graph(self, extents: Extents, outputs: tuple[str, ...] = (LOGITS,)) -> Graph:
        """The model's graph with the wanted outputs: `logits` or the names of nodes.

        Raises: UnknownNameError: no node has a wanted name.
        """
        key = (extents, outputs)
        if key not in self._graphs:
            self._graphs[key] = self.model.graph(extents, self.kv_dtype, outputs)
        return self._graphs[key]

    def executable(self, extents: Extents, outputs: tuple[str, ...] = (LOGITS,)) -> Executable:
        """The plan of a step, compiled or found, with the model's weights attached."""
        return self.ready(extents, outputs)[0]

    def ready(self, extents: Extents, outputs: tuple[str, ...] = (LOGITS,)) -> tuple[Executable, StepInputs]:
        """What `executable` gives, and what makes the inputs that it reads."""
        found = self._ready.get((extents, outputs))
        if found is not None:
            self.cache.hits += 1
            return found
        plan = self.cache.get(self.graph(extents, outputs), self.devices, replace(self.options, layouts=self.layouts(extents)))
        if plan.key not in self._bound:
            self._bound[plan.key] = plan.bind(self.model.weight, uploaded=self._uploaded)
        executable = self._bound[plan.key]
        self._ready[extents, outputs] = executable, StepInputs(executable.needed)
        return self._ready[extents, outputs]

    def layouts(self, extents: Extents) -> dict[str, Layout]:
        """The streams that are not held as rows: the same for steps of any extents."""
        with self.lock:  # sessions are made by any thread
            if self._layouts is None:
                self._layouts = stream_layouts(self.graph(extents), specs, self.devices) if (specs := self.model.states()) else {}
            return self._layouts

    def store(self, extents: Extents) -> StateStore:
        """A store of the model's streams: in the layouts of `layouts`, on the devices that append to them."""
        zeros = dict.fromkeys(specs := self.model.states(), self.devices[0].zeros)
        if specs and len(self.devices) > 1:
            with self.lock:
                plan, named = self.executable(extents).plan, {device.name: device for device in self.devices}
                zeros = {name: named[plan.scheduled.device[node]].zeros for name, node in plan.graph.streams.items()}
        return StateStore(specs, kv_dtype=self.kv_dtype, layouts=self.layouts(extents), zeros=zeros)
