"""Rows that are chosen late in a graph are chosen as early as that gives the same: what follows is computed for them alone."""

from __future__ import annotations

from collections.abc import Iterable
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
        rows = _row_slots(last)
        users = set(graph.users[last])
        whole = any(i is last and slot not in _row_slots(u) for u in users - {chosen} for slot, i in _inputs(u))
        if not rows or whole or last in held or not after.issuperset(users):
            return found
        before = before - {last} | {i for slot, i in _inputs(last) if slot in rows}
        after.add(last)


def _inputs(node: Node) -> Iterable[tuple[str, Node]]:
    return zip(node.slots, node.inputs, strict=True)


def _row_slots(node: Node) -> set[str]:
    """The inputs whose rows make the node's; none where a row takes more than one of each."""
    if node.op in STRUCTURAL or node.ndim != 2:
        return set()
    names = registry.ops.get(node.op).row_inputs
    rows = {slot: x for slot, x in _inputs(node) if slot in names and x.ndim == 2 and x.shape[0] == node.shape[0]}
    alike = all(x.dtype.name == "f32" for x in (node, *rows.values()))  # as which rows are chosen
    return set(rows) if alike else set()


def _moved(graph: Graph, chosen: Node, start: Node, moved: frozenset[Node]) -> Graph:
    """The graph with rows of `start` chosen, and the nodes after it computed for these."""
    few: dict[Node, Node] = {}

    def replacement(now: Node, node: Node) -> Node | None:
        if node is start:
            few[node] = replace(registry.ops.get("get_rows")(now, chosen.inputs[1]), where=chosen.where)
        elif node in moved:
            rows = _row_slots(node)
            given = {slot: new for (slot, _), new in zip(_inputs(node), now.inputs, strict=True)}
            given |= {slot: few[old] for slot, old in _inputs(node) if slot in rows}
            few[node] = replace(registry.ops.get(node.op).apply(given, node.attrs, name=node.name), where=node.where)
        elif node is chosen:
            return replace(few[chosen.inputs[0]], name=node.name or few[chosen.inputs[0]].name)
        return None

    return rewrite(graph, replacement)
