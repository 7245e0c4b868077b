"""A small graph as JSON: nodes, attributes, runtime extents; no values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np

from tensorgraph.dims import Dim, Extent, FloorDiv, Guard, Poly, Shape, Symbol
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import FormatError
from tensorgraph.graph import Graph, Node
from tensorgraph.views import IndexMap

MOST = 1 << 62


def graph_as_json(graph: Graph) -> dict[str, Any]:
    """What `graph_from_json` makes the same graph of; literals' values are not in it."""
    nodes = [
        {
            "op": node.op,
            "inputs": [graph.number[i] for i in node.inputs],
            "slots": list(node.slots),
            "shape": [_encoded(e) for e in node.shape],
            "dtype": node.dtype.name,
            "attrs": {name: _encoded(value) for name, value in node.attrs.items()},
            "name": node.name,
            "where": node.where,
        }
        for node in graph.nodes
    ]
    outputs = {name: graph.number[node] for name, node in graph.outputs.items()}
    return {"nodes": nodes, "outputs": outputs, "effects": [graph.number[node] for node in graph.effects]}


def graph_from_json(found: Mapping[str, Any]) -> Graph:
    """The graph that was written.

    Raises: FormatError: it is not one.
    """
    try:
        nodes: list[Node] = []
        for n in found["nodes"]:
            inputs = tuple(nodes[_index(i, len(nodes))] for i in n["inputs"])
            shape = tuple(_extent(e) for e in n["shape"])
            attrs = {str(name): _decoded(value) for name, value in n["attrs"].items()}
            slots = tuple(map(str, n["slots"]))
            nodes.append(Node(str(n["op"]), inputs, shape, as_dtype(n["dtype"]), attrs, slots, str(n["name"]), str(n["where"])))
        outputs = {str(name): nodes[_index(i, len(nodes))] for name, i in found["outputs"].items()}
        return Graph(outputs, effects=[nodes[_index(i, len(nodes))] for i in found["effects"]])
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RecursionError) as error:
        wanted = "wanted nodes, outputs and effects, as `graph_as_json` writes them"
        raise FormatError(f"[graph] {wanted}; got {type(error).__name__}: {error}") from error


def _index(value: Any, length: int) -> int:
    if type(value) is not int or not 0 <= value < length:
        raise IndexError(f"node {value!r} of {length}")
    return value


def _encoded(value: Any) -> Any:
    """Numbers, texts and None as they are; others as an object with one key, which says what it is."""
    if isinstance(value, Dim):
        return {"dim": [value.name, value.max]}
    if isinstance(value, FloorDiv):
        return {"quotient": [_encoded(value.dividend), value.divisor]}
    if isinstance(value, Poly):
        return {"sum": [[factor, *map(_encoded, symbols)] for symbols, factor in value.terms]}
    if isinstance(value, DType):
        return {"dtype": value.name}
    if isinstance(value, IndexMap):
        return {"map": [_encoded(part) for part in (value.shape, value.strides, value.offset, value.within)]}
    if isinstance(value, Guard):
        return {"guard": [[_encoded(extent), low, high] for extent, low, high in value.bounds]}
    if isinstance(value, np.generic):
        return _encoded(value.item())
    if isinstance(value, tuple | list):
        return {"tuple": [_encoded(item) for item in value]}
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    raise FormatError(f"[graph] wanted an attribute that can be written; got {value!r}")


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"an attribute {value!r}")
    ((kind, content),) = value.items()
    if kind == "dim":
        return Dim(str(content[0]), _number(content[1]))
    if kind == "quotient":
        return _symbol(content[0]) // _number(content[1])
    if kind == "sum":
        return _sum([(_number(factor), [_factor(s) for s in symbols]) for factor, *symbols in content])
    if kind == "dtype":
        return as_dtype(content)
    if kind == "map":
        shape, strides, offset, within = content
        return IndexMap(_extents(shape), _extents(strides), _extent(offset), tuple(map(_symbol, within["tuple"])))
    if kind == "guard":
        return Guard(tuple((_symbol(extent), _bound(low), _bound(high)) for extent, low, high in content))
    if kind == "tuple":
        return tuple(_decoded(item) for item in content)
    raise ValueError(f"an attribute of kind {kind!r}")


def _number(value: Any) -> int:
    if type(value) is not int or abs(value) > MOST:
        raise ValueError(f"a number {value!r:.60}")
    return value


def _bound(value: Any) -> int | None:
    return None if value is None else _number(value)


def _extent(value: Any) -> Extent:
    return _symbol(value) if isinstance(value, dict) else _number(value)


def _extents(value: Any) -> Shape:
    return tuple(map(_extent, value["tuple"]))


def _symbol(value: Any) -> Symbol:
    found = _decoded(value)
    if not isinstance(found, Symbol):
        raise ValueError(f"an extent {value!r:.60}")
    return found


def _factor(value: Any) -> Symbol:
    """A symbol that is no sum, so that products stay small."""
    found = _symbol(value)
    if isinstance(found, Poly):
        raise ValueError(f"a factor {value!r:.60}")
    return found


def _sum(terms: Sequence[tuple[int, Sequence[Symbol]]]) -> Extent:
    total: Extent = 0
    for factor, symbols in terms:
        product: Extent = factor
        for symbol in symbols:
            product = symbol * product
        total = total + product
    return total
