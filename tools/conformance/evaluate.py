"""Building and running the graph of one op, by slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import Device
from tensorgraph.dims import Bindings
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import DTypeError, GraphError
from tensorgraph.graph import Graph, Node, input
from tensorgraph.op import Op
from tensorgraph.plan import Plan

Array = np.ndarray[Any, Any]

OPTIONS = CompileOptions(fuse=False, exact=True, without=("fold_constants",), verify_passes=True)
"""Each op by itself, and in the step that is looked at, also where all of its inputs are constants."""


def node_of(op: Op, slots: Mapping[str, Array], attrs: Mapping[str, Any]) -> Node:
    """A node of an op over inputs that are named as its slots."""
    return op.apply({slot: input(slot, x.shape, as_dtype(x.dtype)) for slot, x in slots.items()}, attrs)


def evaluate(
    node: Node,
    arrays: Mapping[str, Array],
    backend: str | Device = "reference",
    *,
    dims: Bindings | None = None,
) -> Array:
    """A node's value for inputs and constants by name; inputs that it does not need are left out."""
    graph = Graph(y=node)
    plan = compile(graph, backend, OPTIONS)
    constants = {k: v for k, v in arrays.items() if k in graph.constants}
    result: Array = plan.bind(constants).run(_taken(plan, arrays), dims=dims)["y"]
    return result


def _taken(plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {k: v for k, v in arrays.items() if k in plan.graph.inputs}


def runner(op: Op, backend: str | Device = "reference") -> Callable[..., Array]:
    """`run(*arrays, **attrs)` as an op's laws take it; an op without a signature takes one mapping of slots."""

    def run(*arrays: Any, **attrs: Any) -> Array:
        given = arrays[0] if op.signature is None else dict(zip((a.name for a in op.signature.inputs), arrays, strict=False))
        slots = {slot: np.asarray(x) for slot, x in given.items() if x is not None}
        return evaluate(node_of(op, slots, attrs), slots, backend)

    return run


@dataclass(frozen=True)
class Meaning:
    """What an op's result is for some inputs: by its reference, or by its expansion on the reference backend.

    `dtypes` are the inputs' own, which an expansion is given where the op wants just those; floats are f32 where it takes
    these. With `rounds`, what is computed in float32 is the expansion, over inputs of their own dtypes and rounded to its own
    after each op.
    """

    op: Op
    attrs: Mapping[str, Any]
    dtypes: Mapping[str, DType]
    expanded: bool = False
    rounds: bool = False

    def __call__(self, slots: Mapping[str, Array], kind: Any = np.float64) -> Array:
        """The result with floats computed in float64, or float32, and not rounded to the result's dtype."""
        given = {slot: x.astype(kind) if as_dtype(x.dtype).is_float else x for slot, x in slots.items()}
        if self.rounds and kind == np.float32:
            result = self._expand({slot: x.astype(self.dtypes[slot].numpy) for slot, x in slots.items()})
        elif not self.expanded and self.op.reference_fn is not None:
            with np.errstate(all="ignore"):
                result = np.asarray(self.op.compute(given, self.op.check_attrs(self.attrs)))
        else:
            result = self._expand(given)
        return result.astype(np.float64) if as_dtype(result.dtype).is_float else result

    def _expand(self, given: Mapping[str, Array]) -> Array:
        if self.op.expansion is None:
            raise GraphError(f"[{self.op.name}] wanted a reference or an expansion, to compare with; it has neither")
        own = {slot: x.astype(self.dtypes[slot].numpy) for slot, x in given.items()}
        wide = {slot: x.astype(np.float32) if as_dtype(x.dtype).is_float else x for slot, x in own.items()}  # rounds no result
        for values in (given, wide):
            with suppress(DTypeError):
                node = node_of(self.op, values, self.attrs)
                break
        else:
            values, node = own, node_of(self.op, own, self.attrs)
        return evaluate(self.op.rebuild(self.op.expansion, node), values)
