"""Rows that are chosen late in a graph are chosen as early as that gives the same: what follows is computed for them alone."""

from __future__ import annotations

from dataclasses import replace

from tensorgraph import registry
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.passes import rewrite


def choose_early(graph: Graph, ids: str = "out_ids") -> Graph:
    """`get_rows(f(x), ids)` -> `f(get_rows(x, ids))`, f being all ops before that compute each row by itself.

    Rows of matrices only. `x` is the last value from which alone f goes out, so that nothing is chosen twice. The graph's outputs
    stay as they are.

    Args:
        ids: the input that numbers rows; it must not hold -1, whose row would be f of zeros instead of zeros.
    """
    for chosen in graph.nodes:
        if chosen.op == "get_rows" and _is_input(chosen.inputs[1], ids):
            start, moved = _start(graph, chosen)
            if moved:
                return choose_early(_moved(graph, chosen, start, moved), ids)
    return graph


def _is_input(node: Node, name: str) -> bool:
    return node.op == "input" and node.attrs["name"] == name


def _start(graph: Graph, chosen: Node) -> tuple[Node, frozenset[Node]]:
    """Where rows can be chosen, and the nodes that come after it then."""
    held = {*graph.outputs.values(), *graph.effects}
    before, after = {chosen.inputs[0]}, {chosen}
    found = chosen.inputs[0], frozenset[Node]()
    while True:
        last = max(before, key=lambda node: graph.number[node])  # so that all its users have been looked at
        if len(before) == 1:
            found = last, frozenset(after - {chosen})
        rows = _rows_of(last)
        if not rows or last in held or not after.issuperset(graph.users[last]):
            return found
        before = before - {last} | rows
        after.add(last)


def _rows_of(node: Node) -> set[Node]:
    """The inputs whose rows make the node's; none where a row takes more than one of each."""
    if node.op in STRUCTURAL or node.ndim != 2:
        return set()
    names = registry.ops.get(node.op).row_inputs
    inputs = dict(zip(node.slots, node.inputs, strict=True))
    rows = {x for slot, x in inputs.items() if slot in names and x.ndim == 2 and x.shape[0] == node.shape[0]}
    return rows if all(x.dtype.name == "f32" for x in rows) else set()  # as which rows are chosen


def _moved(graph: Graph, chosen: Node, start: Node, moved: frozenset[Node]) -> Graph:
    """The graph with rows of `start` chosen, and the nodes after it computed for these."""
    few: dict[Node, Node] = {}

    def replacement(now: Node, node: Node) -> Node | None:
        if node is start:
            few[node] = replace(registry.ops.get("get_rows")(now, chosen.inputs[1]), where=chosen.where)
        elif node in moved:
            inputs = (few.get(old, new) for old, new in zip(node.inputs, now.inputs, strict=True))
            built = registry.ops.get(node.op).apply(dict(zip(node.slots, inputs, strict=True)), node.attrs, name=node.name)
            few[node] = replace(built, where=node.where)
        elif node is chosen:
            return replace(few[chosen.inputs[0]], name=node.name or few[chosen.inputs[0]].name)
        return None

    return rewrite(graph, replacement)
