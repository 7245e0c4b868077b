"""The verifier: what must hold for every graph, at each point of the one-way street."""

from __future__ import annotations

from tensorgraph import registry
from tensorgraph.errors import GraphError, TensorGraphError
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.text import node_text


def verify(graph: Graph) -> Graph:
    """Check a graph and give it back.

    Raises:
        GraphError: inputs after their users, slots and inputs that differ in number, a view that is not of a base, a shape
            or dtype that the op would not infer, a stream appended twice or read beside its append, or a dim, input or
            constant declared twice.
    """
    if not isinstance(graph, Graph):
        raise GraphError(f"[compile] wanted a Graph; got {graph!r}: name the outputs, Graph(y=...)")
    seen: set[Node] = set()
    appended: set[str] = set()
    for node in graph.nodes:
        if any(i not in seen for i in node.inputs):
            raise _error(graph, node, "an input comes after its user")
        if len(node.slots) != len(node.inputs):
            raise _error(graph, node, f"wanted one slot an input; got {node.slots}")
        if node.op == "view":
            _check_view(graph, node)
        if node.op == "choose" and any((i.shape, i.dtype) != (node.shape, node.dtype) for i in node.inputs):
            raise _error(graph, node, "the forms differ in shape or dtype")
        if node.op == "append":
            if node.attrs["stream"] in appended:
                raise _error(graph, node, f"the stream {node.attrs['stream']!r} is appended twice in a step")
            appended.add(node.attrs["stream"])
        if node.op not in STRUCTURAL:
            _check_inference(graph, node)
        seen.add(node)
    for node in graph.nodes:
        if node.op == "read" and node.attrs["stream"] in appended:
            raise _error(graph, node, f"the stream {node.name!r} is read beside its append; use what the append returns")
    _ = graph.inputs, graph.constants, graph.streams, graph.dims
    return graph


def _check_view(graph: Graph, node: Node) -> None:
    base, index_map = node.base, node.index_map
    if base.op == "view" or index_map.shape != node.shape or base.dtype != node.dtype:
        raise _error(graph, node, "wanted a view of a base, of its map's shape and its base's dtype")
    numbers = (*index_map.shape, *index_map.strides, index_map.offset, base.size)
    if all(isinstance(e, int) for e in numbers) and 0 not in node.shape:
        shape, strides, offset = index_map.resolve({})
        if not 0 <= offset <= offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) < base.size:
            raise _error(graph, node, f"the view reaches outside its base {base!r}")


def _check_inference(graph: Graph, node: Node) -> None:
    op = registry.ops.get(node.op)
    try:
        inferred = op.infer(dict(zip(node.slots, node.inputs, strict=True)), op.check_attrs(node.attrs))
    except TensorGraphError as error:
        raise _error(graph, node, str(error)) from error
    if inferred != (node.shape, node.dtype):
        raise _error(graph, node, f"the op infers {inferred[1]}{list(inferred[0])}")


def _error(graph: Graph, node: Node, problem: str) -> GraphError:
    number = {n: i for i, n in enumerate(graph.nodes)}
    return GraphError(f"[verify] {problem}: {node_text(node, number)}")
