"""What a saved graph may ask for: its own inputs, weights and rows, and no more memory than its file warrants."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tensorgraph.dims import Bindings, evaluate_shape
from tensorgraph.errors import FormatError
from tensorgraph.graph import Graph, Node
from tensorgraph.op import node_bytes
from tensorgraph.state import StateSpec
from tensorgraph.tools.testing.cuts import needed
from tensorgraph.tools.testing.side import Arrays
from tensorgraph.verify import verify

MOST_BYTES = 1 << 28
MOST_TIMES = 64
"""How many times as large as its file what is in it may be, besides."""
MOST_PLANNED = 1 << 34
"""What a plan may set aside for the largest extents; most of it is never written."""
ELEMENT_BYTES = 8
PAGES_ROWS = 256  # a store begins with so many
TOKEN_BYTES = 64  # of vectors that a step of a sequence makes


def limit_bytes(file_bytes: int) -> int:
    """The most that a file of this size may take when it is read, and again when it is computed."""
    return MOST_BYTES + MOST_TIMES * file_bytes


def check_graph(graph: Graph, dims: Bindings, most_bytes: int) -> None:
    """Whether a graph is well formed, and small at these extents.

    Raises: FormatError, TensorGraphError: it is not.
    """
    verify(graph)
    for name, dim in graph.dims.items():
        if not 0 <= dims.get(name, -1) <= dim.max:
            raise FormatError(f"[graph] wanted the extent {name} from 0 to {dim.max}; got {dims.get(name)}")
    total = planned = 0
    computed = needed([*graph.effects, *graph.outputs.values()], (), dims)
    for node in (n for n in graph.nodes if n in computed):
        shape = evaluate_shape(node.shape, dims)
        if node.op == "copy" or min(shape, default=0) < 0:
            raise FormatError(f"[graph] wanted nodes as models write them; got {node!r}, here {list(shape)}")
        if node.op == "view":
            _check_view(node, dims)
        elif node.op != "choose":
            total += math.prod(shape) * ELEMENT_BYTES
            planned += node_bytes(node)
            if planned > MOST_PLANNED + most_bytes:
                raise FormatError(f"[graph] wanted a plan of {MOST_PLANNED} bytes at most; got more, with {node!r} at most")
            if total > most_bytes:
                raise FormatError(
                    f"[graph] wanted values of {most_bytes} bytes at most; got more, with {node!r} as {list(shape)}"
                )


def _check_view(node: Node, dims: Bindings) -> None:
    shape, strides, offset = node.index_map.resolve(dims)
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    first, last = offset + sum(min(r, 0) for r in reach), offset + sum(max(r, 0) for r in reach)
    inside = 0 <= first <= last < math.prod(evaluate_shape(node.base.shape, dims))
    if 0 not in shape and not inside or any(e.evaluate(dims) < 0 for e in node.index_map.within):
        raise FormatError(f"[graph] wanted a view within its base; got {node!r}")


def check_arrays(wanted: Mapping[str, Node], arrays: Arrays, dims: Bindings) -> None:
    """Whether all inputs, or all constants, are there, as their nodes say.

    Raises: FormatError: they are not.
    """
    if wanted.keys() != arrays.keys():
        raise FormatError(f"[reproduction] wanted the arrays {', '.join(wanted)}; got {', '.join(arrays)}")
    for name, node in wanted.items():
        shape, dtype, array = evaluate_shape(node.shape, dims), node.dtype, arrays[name]
        if dtype.is_block and shape:
            shape = (*shape[:-1], dtype.size_bytes(shape[-1]))
        if array.shape != shape or array.dtype != (dtype.numpy or np.uint8):
            raise FormatError(f"[reproduction] wanted {name} as {dtype}{list(shape)}; got {array.dtype}{list(array.shape)}")


def check_state(graph: Graph, states: Mapping[str, StateSpec], rows: Arrays, length: int, n_tokens: int, most_bytes: int) -> None:
    """Whether a graph's streams are those that are declared, with rows of that shape, and small.

    Raises: FormatError: they are not.
    """
    if states.keys() != graph.streams.keys() or rows.keys() != (states.keys() if length else rows.keys() & states.keys()):
        raise FormatError(f"[reproduction] wanted the streams {', '.join(graph.streams)}; got {', '.join(states)}")
    total = 0
    for name, spec in states.items():
        node, dtype = graph.streams[name], spec.dtype
        if node.shape[1:] != spec.row_shape or dtype != node.dtype or (name in rows and rows[name].shape[1:] != spec.row_shape):
            raise FormatError(f"[reproduction] wanted rows of {name} as {node!r}; got {dtype}{list(spec.row_shape)}")
        total += (PAGES_ROWS + length + n_tokens) * (math.prod(spec.row_shape) * ELEMENT_BYTES + TOKEN_BYTES)
    if total > most_bytes:
        raise FormatError(f"[reproduction] wanted state of {most_bytes} bytes at most; got {length} tokens in {total} bytes")
