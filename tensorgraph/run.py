"""Running one op on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import Device
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Graph, Node, input


def run_op(name: str, *arrays: Any, backend: str | Device | Sequence[str | Device] = "reference", **attrs: Any) -> np.ndarray:
    """Apply one op to arrays on a backend.

    Inputs stand in the op's order or by name (None where an optional one is absent); tuples of arrays, such as attention's
    segments, are taken apart.

    Raises: ShapeError, DTypeError, AttributeValueError: as when the op builds a node of a graph.
    """
    given: dict[str, np.ndarray] = {}

    def lift(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            label = f"in{len(given)}"
            given[label] = array
            return input(label, array.shape, as_dtype(array.dtype))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(lift, value))
        return value

    node: Node = registry.ops.get(name)(*map(lift, arrays), **{k: lift(v) for k, v in attrs.items()})
    plan = compile(Graph(y=node), backend, CompileOptions(fuse=False))
    used = plan.graph.inputs
    return plan.bind().run({k: v for k, v in given.items() if k in used})["y"]
