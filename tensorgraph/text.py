"""Graphs as readable text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensorgraph.dims import shape_text

if TYPE_CHECKING:
    from tensorgraph.graph import Graph, Node


def attr_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple) and value and not hasattr(value, "_fields"):
        return "(" + ", ".join(map(attr_text, value)) + ")"
    return str(value)


def node_text(node: Node, number: Mapping[Node, int]) -> str:
    """One line: `%3 f32[T, 64] = rms_norm(x=%1) eps=1e-05  # "blk.0.attn_norm" llama.py:31`."""
    inputs = ", ".join(f"{slot}=%{number[i]}" for slot, i in zip(node.slots, node.inputs, strict=False))
    if node.op == "choose":
        forms = zip(node.slots, node.inputs, node.attrs["guards"], strict=True)
        inputs = ", ".join(f"{slot}=%{number[i]} if {guard}" for slot, i, guard in forms)
    attrs = "".join(f" {k}={attr_text(v)}" for k, v in node.attrs.items() if v is not None and k != "guards")
    if node.op == "view":
        index_map = node.attrs["map"]
        offset = f" offset={index_map.offset}" if index_map.offset != 0 else ""
        attrs = "" if index_map.is_dense else f" strides={shape_text(index_map.strides)}{offset}"
    name = f' "{node.name}"' if node.name and node.op not in ("input", "constant", "append", "read") else ""
    where = f" {node.where}" if node.where else ""
    comment = f"  #{name}{where}" if name or where else ""
    return f"%{number[node]} {node.dtype}{shape_text(node.shape)} = {node.op}({inputs}){attrs}{comment}"


def graph_text(graph: Graph) -> str:
    """All nodes in order, then the outputs."""
    lines = [node_text(node, graph.number) for node in graph.nodes]
    lines += [f"output {name} = %{graph.number[node]}" for name, node in graph.outputs.items()]
    return "\n".join(lines)
