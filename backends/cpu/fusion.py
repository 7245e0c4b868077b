"""Fusions: finders that join nodes of a split into groups that a few calls compute."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from tensorgraph.backends.cpu.kernel import Context
from tensorgraph.graph import Graph, Node
from tensorgraph.memory import Group

Condition = frozenset[tuple[Node, int]]


@dataclass
class Scope:
    """What a finder sees.

    Attributes:
        nodes: those of the split, in order.
        kept: the nodes whose values are outputs; no group may leave them out.
        condition: for each node, the forms of choices that must be taken for it to be computed; groups have one condition.
        taken: the nodes that are in some group already.
    """

    nodes: Sequence[Node]
    graph: Graph
    context: Context
    kept: frozenset[Node]
    condition: Mapping[Node, Condition]
    taken: set[Node] = field(default_factory=set)

    def users(self, node: Node) -> tuple[Node, ...]:
        return self.graph.users[node]

    def sole_user(self, node: Node) -> tuple[Node, ...]:
        """The one node that uses this one, behind the views in the same order of elements that it is seen through; nothing where
        there are several, where the value is wanted otherwise, or where the user belongs elsewhere."""
        condition, passed = self.condition[node], []
        while node not in self.kept and len(self.users(node)) == 1:
            (user,) = self.users(node)
            passed.append(user)
            if user.op != "view" or not user.index_map.is_dense:
                alone = sum(i is node for i in user.inputs) == 1
                return tuple(passed) if alone and user not in self.taken and self.condition.get(user) == condition else ()
            node = user
        return ()

    @cached_property
    def place(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}

    def needs(self, value: Node, any_of: Collection[Node]) -> bool:
        """Whether a value is one of these nodes of the split, or computed from one."""
        first = min(self.place[node] for node in any_of)
        seen: set[Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if node in any_of:
                return True
            if node not in seen and self.place.get(node, -1) > first:
                seen.add(node)
                stack.extend(node.inputs)
        return False


Finder = Callable[[Scope], Iterable[Group]]


@cache
def finders(backend: str) -> tuple[Finder, ...]:
    """Those of every family of ops: `find_groups` of its module `fusions_BACKEND`."""
    home = importlib.import_module("tensorgraph.ops")
    found = []
    for family in sorted(module.name for module in pkgutil.iter_modules(home.__path__) if module.ispkg):
        name = f"tensorgraph.ops.{family}.fusions_{backend}"
        if importlib.util.find_spec(name) is not None:
            found.append(importlib.import_module(name).find_groups)
    return tuple(found)


def conditions(graph: Graph) -> dict[Node, Condition]:
    """For each node, what all ways from it to an output or effect have in common of forms of choices."""
    found: dict[Node, Condition] = {n: frozenset() for n in (*graph.outputs.values(), *graph.effects)}
    for node in reversed(graph.nodes):
        if node in found:
            continue
        ways = []
        for user in graph.users[node]:
            above = found[user]
            if user.op == "choose":
                ways += [above | {(user, i)} for i, form in enumerate(user.inputs) if form is node]
            else:
                ways.append(above)
        found[node] = frozenset.intersection(*ways) if ways else frozenset()
    return found


def in_order(groups: Sequence[Group], graph: Graph) -> list[Group] | None:
    """The groups so that each comes after those that it reads, else as they stand; None where they go round in a circle."""
    owner = {node: group for group in groups for node in group.nodes}
    needs = {g: dict.fromkeys(owner[i] for n in g.nodes for i in n.inputs if i in owner and owner[i] is not g) for g in groups}
    done: dict[Group, None] = {}
    open_: set[Group] = set()
    for root in groups:
        stack = [(root, iter(needs[root]))] if root not in done else []
        open_.update(g for g, _ in stack)
        while stack:
            group, rest = stack[-1]
            following = next((g for g in rest if g not in done), None)
            if following is None:
                stack.pop()
                open_.discard(group)
                done[group] = None
            elif following in open_:
                return None
            else:
                open_.add(following)
                stack.append((following, iter(needs[following])))
    return list(done)
