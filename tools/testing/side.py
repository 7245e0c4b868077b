"""One way to compute graphs: devices, options and passes, with weights and the state of one sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from tensorgraph.compiler import PASSES, CompileOptions, compile
from tensorgraph.device import Device, get_devices, stream_layouts
from tensorgraph.dims import unify
from tensorgraph.dtypes import DType, f16
from tensorgraph.errors import InputError, UnknownNameError
from tensorgraph.graph import Graph
from tensorgraph.plan import Executable, Weights
from tensorgraph.state import Layout, StateSpec
from tensorgraph.state_step import Step
from tensorgraph.state_store import StateStore

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Backend = str | Device | Sequence[str | Device]

NEEDED = "expand_fused"
AS_WRITTEN = CompileOptions(fuse=False, exact=True, without=tuple(name for name in PASSES if name != NEEDED))
"""Each node by itself and none rewritten, but for those that a device cannot run."""


@dataclass(frozen=True)
class Given:
    """What a step takes: inputs by name, the values of Dims, and how many tokens it adds to the sequence."""

    inputs: Arrays
    dims: Mapping[str, int]
    n_tokens: int = 0

    @staticmethod
    def of(graph: Graph, inputs: Arrays, dims: Mapping[str, int] | None = None) -> Given:
        """Dims take their values from the arrays' shapes, as when a plan is run.

        Raises: InputError: an input is missing.
        """
        bound = dict(dims or {})
        missing = [name for name in graph.inputs if name not in inputs]
        if missing:
            raise InputError(f"[compare] wanted the inputs {', '.join(graph.inputs)}; missing: {', '.join(missing)}")
        for name, node in graph.inputs.items():
            for extent, value in zip(node.shape, np.shape(inputs[name]), strict=False):
                unify(bound, extent, value)
        return Given({name: np.asarray(inputs[name]) for name in graph.inputs}, bound)


@dataclass(frozen=True)
class Values:
    """What a run gave: outputs by name, and the visible rows of each stream that the graph uses, after it."""

    outputs: Arrays
    rows: Arrays = field(default_factory=dict)


class Side:
    """Runs graphs over the same weights and the same sequence; what a run appends counts only once it is kept.

    Attributes:
        label: what reports call it: the devices' names.
        devices, options: what graphs are compiled with.
        store: the sequence's state; None where there is no sequence.
    """

    def __init__(
        self,
        backend: Backend,
        options: CompileOptions,
        weights: Weights = None,
        *,
        graph: Graph | None = None,
        states: Mapping[str, StateSpec] | None = None,
        kv_dtype: DType = f16,
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        unknown = [name for name in options.without if name not in PASSES]
        if unknown:
            raise UnknownNameError(f"[compare] there is no pass {', '.join(unknown)}. Known: {', '.join(PASSES)}")
        self.devices, self.weights = get_devices(backend), weights
        self.label = ",".join(device.name for device in self.devices)
        if layouts is None:
            layouts = stream_layouts(graph, states, self.devices) if graph is not None and states else {}
        self.options = replace(options, layouts=layouts)
        self.store = StateStore(states, kv_dtype=kv_dtype, layouts=layouts) if states is not None else None
        self._sequence = self.store.new() if self.store is not None else 0
        self.held: dict[tuple[str, str], Any] = {}  # weights on devices, as engines hold them
        self._bound: WeakKeyDictionary[Graph, Executable] = WeakKeyDictionary()

    def but(self, **options: Any) -> Side:
        """The same with other options, over the same weights and sequence."""
        other = copy(self)
        other.options, other._bound = replace(self.options, **options), WeakKeyDictionary()
        return other

    def forget(self) -> None:
        """Let go of weights and plans: they are made again when they are wanted."""
        self.held.clear()
        self._bound.clear()

    def run(self, graph: Graph, given: Given, more: Arrays | None = None, *, keep: bool = False) -> Values:
        """One step; `more` are inputs besides those of `given`. With `keep` the sequence is longer afterwards."""
        bound = self._bound.get(graph)
        if bound is None:
            bound = compile(graph, self.devices, self.options).bind(self.weights, uploaded=self.held)
            self._bound[graph] = bound
        named = {**given.inputs, **(more or {})}
        with self.begin(given.n_tokens) as state:
            outputs = bound.run({name: named[name] for name in bound.plan.graph.inputs}, state=state, dims=given.dims)
            rows = {stream: state.read(stream) for stream in graph.streams} if state is not None else {}
            if keep and state is not None:
                state.commit()
        return Values(outputs, rows)

    def weight(self, name: str, graph: Graph) -> Array:
        """A constant of a graph as it is bound."""
        if name in graph.literals:
            return graph.literals[name]
        return np.asarray(self.weights(name) if callable(self.weights) else (self.weights or {})[name])

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return self.store.length(self._sequence) if self.store is not None else 0

    def rows(self, streams: Iterable[str]) -> dict[str, Array]:
        """The visible rows of streams as they are."""
        with self.begin(0) as state:
            return {stream: np.array(state.read(stream)) for stream in streams} if state is not None else {}

    def keep_rows(self, rows: Arrays, n_tokens: int) -> None:
        """Make the sequence longer by rows that another side computed: the last ones of those that are visible.

        Where fewer are given than so many tokens make, those before are zeros.
        """
        with self.begin(n_tokens) as state:
            if state is None:
                return
            for stream, visible in rows.items():
                n_new = len(state.classes[state.store.specs[stream].stream_class].new)
                new = np.zeros((n_new, *visible.shape[1:]), visible.dtype)
                given = visible[max(0, len(visible) - n_new) :]
                new[n_new - len(given) :] = given
                state.append(stream, new)
            state.commit()

    @contextmanager
    def begin(self, n_tokens: int) -> Iterator[Step | None]:
        """A step of the sequence, taken back unless it is committed; None where there is no state."""
        if self.store is None:
            yield None
            return
        with self.store.begin([(self._sequence, n_tokens)]) as step:
            yield step
