"""Building and running the graph of one op, by slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Graph, Node, input
from tensorgraph.op import Op

Array = np.ndarray[Any, Any]


def node_of(op: Op, slots: Mapping[str, Array], attrs: Mapping[str, Any]) -> Node:
    """A node of an op over inputs that are named as its slots."""
    return op.apply({slot: input(slot, x.shape, as_dtype(x.dtype)) for slot, x in slots.items()}, attrs)


def evaluate(node: Node, arrays: Mapping[str, Array], backend: str = "reference") -> Array:
    """A node's value for inputs and constants by name; inputs that it does not need are left out."""
    graph = Graph(y=node)
    plan = compile(graph, backend, CompileOptions(fuse=False, verify_passes=True))
    constants = {k: v for k, v in arrays.items() if k in graph.constants}
    inputs = {k: v for k, v in arrays.items() if k in plan.graph.inputs}
    result: Array = plan.bind(constants).run(inputs)["y"]
    return result


def runner(op: Op, backend: str = "reference") -> Callable[..., Array]:
    """`run(*arrays, **attrs)` as an op's laws take it; an op without a signature takes one mapping of slots."""

    def run(*arrays: Any, **attrs: Any) -> Array:
        given = arrays[0] if op.signature is None else dict(zip((a.name for a in op.signature.inputs), arrays, strict=False))
        slots = {slot: np.asarray(x) for slot, x in given.items() if x is not None}
        return evaluate(node_of(op, slots, attrs), slots, backend)

    return run
