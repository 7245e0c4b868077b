"""One graph on two sides: value by value, each side given the same inputs; and the step as a whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass

from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, Node
from tensorgraph.tools.testing.cuts import STATE, Cut, apart, cuts, label, tapped, values
from tensorgraph.tools.testing.definition import conforms
from tensorgraph.tools.testing.difference import Array, Difference, Limits, difference
from tensorgraph.tools.testing.side import Arrays, Given, Side, Values

RECENT = 4


@dataclass(frozen=True, eq=False)
class Compared:
    """A node's value on both sides, computed from the same values of others."""

    node: Node
    difference: Difference
    got: Array
    wanted: Array


@dataclass(frozen=True, eq=False)
class Suspect:
    """A value that may be wrong, and the values by label that it was computed from."""

    compared: Compared
    seen: Arrays


class Pair:
    """A graph, the side that is trusted, and the side that is looked at.

    Args:
        limit_bytes: most that values and weights of nodes compared at once may take; more nodes take more runs.
        written: the graph that the trusted side computes as a whole, where `graph` was made of it.
    """

    def __init__(
        self, graph: Graph, wanted: Side, got: Side, limits: Limits, limit_bytes: int, written: Graph | None = None
    ) -> None:
        taken = [name for name in (*graph.inputs, *graph.outputs) if name.startswith("%")]
        if taken:
            raise InputError(f"[compare] wanted names of inputs and outputs that begin with no %; got {', '.join(taken)}")
        self.graph, self.wanted, self.got, self.limits, self.limit_bytes = graph, wanted, got, limits, limit_bytes
        self.written = graph if written is None else written
        self._cuts: dict[tuple[Node, ...], list[Cut]] = {}
        self._recent: dict[Hashable, Graph] = {}  # as each is compiled once

    def observed(self, run: Values, nodes: Iterable[Node]) -> dict[str, Array]:
        """What a run showed of nodes, by label."""
        named = {n: name for name, n in self.graph.outputs.items()}
        found = {}
        for node in nodes:
            name = label(self.graph, node)
            if node.op in STATE:
                found[name] = run.rows[node.attrs["stream"]]
            else:
                found[name] = run.outputs[name if name in run.outputs else named[node]]
        return found

    def cuts(self, given: Given, graph: Graph | None = None) -> list[Cut]:
        """All values of a step, in parts."""
        graph = graph or self.graph
        key = values(graph, given.dims)
        if key not in self._cuts:
            self._cuts[key] = cuts(graph, given.dims, self.limit_bytes)
        return self._cuts[key]

    def node_by_node(self, given: Given) -> Iterator[tuple[Compared, Suspect | None]]:
        """Every value of a step in order, laid open, and whether it is wrong for the values that it was computed from."""
        parts = self.cuts(given)
        for cut in parts:
            seen = self.observed(self.got.run(cut.tapped, given), (*cut.sources, *cut.nodes))
            wanted = self.wanted.run(cut.apart, given, seen).outputs
            for node in cut.nodes:
                name = label(self.graph, node)
                compared = Compared(node, difference(seen[name], wanted[name]), seen[name], wanted[name])
                suspect = Suspect(compared, seen)
                yield compared, suspect if self.is_wrong(suspect, given) else None
            if len(parts) > 1:
                self.wanted.forget()

    def is_wrong(self, suspect: Suspect, given: Given) -> bool:
        """Whether a node's value is farther off than rounding takes it, from the values that it was computed from."""
        compared = suspect.compared
        if not self.limits.is_far(compared.node, compared.difference):
            return False
        slots = self.inputs_of(compared.node, suspect.seen, given)
        exact, device = self.limits.exact, self.got.devices[0]
        return not conforms(compared.node, slots, compared.got, given.dims, device, exact=exact)

    def inputs_of(self, node: Node, seen: Arrays, given: Given) -> dict[str, Array]:
        """The values of a node's inputs by slot, views as what they show."""
        known = self.known(seen)
        rest = [i for i in node.inputs if i not in known]
        found = dict(seen)
        if rest:
            found.update(self.wanted.run(apart(self.graph, rest, known, given.dims), given, seen).outputs)
        return {slot: found[label(self.graph, i)] for slot, i in zip(node.slots, node.inputs, strict=True)}

    def known(self, seen: Arrays) -> frozenset[Node]:
        """The nodes whose values were seen."""
        return frozenset(n for n in self.graph.nodes if label(self.graph, n) in seen)

    def whole(self, given: Given) -> list[tuple[str, Difference]]:
        """The step as it is, on both sides: its outputs and the rows of its streams."""
        return self._ends(self.got.run(self.graph, given), self._wanted_whole(self.written, given))

    def is_rewritten(self, given: Given) -> bool:
        """Whether the graph as it is written gives something else, on the trusted side alone."""
        if self.written is self.graph:
            return False
        found = self._ends(self._wanted_whole(self.graph, given), self._wanted_whole(self.written, given))
        return any(apart.beyond(self.limits.of_whole) for _, apart in found)

    def _ends(self, got: Values, wanted: Values) -> list[tuple[str, Difference]]:
        outputs = [(name, difference(got.outputs[name], wanted.outputs[name])) for name in self.graph.outputs]
        return [*((stream, difference(got.rows[stream], wanted.rows[stream])) for stream in self.graph.streams), *outputs]

    def _wanted_whole(self, graph: Graph, given: Given) -> Values:
        """The trusted side's own step, in parts, so that it never needs all weights at once."""
        parts = self.cuts(given, graph)
        if len(parts) == 1:
            return self.wanted.run(graph, given)
        held: dict[str, Array] = {}
        known: set[Node] = set()
        ends = {node.base for node in graph.outputs.values()}
        for i, cut in enumerate(parts):
            later = ends.union(*(other.sources for other in parts[i + 1 :]))
            nodes = [n for n in cut.nodes if n in later or n.op in STATE]
            if nodes:
                held.update(self.wanted.run(apart(graph, nodes, known, given.dims), given, held).outputs)
            known.update(nodes)
            self.wanted.forget()
        rest = [node for node in graph.outputs.values() if node not in known]
        if rest:
            held.update(self.wanted.run(apart(graph, rest, known, given.dims), given, held).outputs)
        rows = {stream: held[label(graph, node)] for stream, node in graph.streams.items()}
        return Values({name: held[label(graph, node)] for name, node in graph.outputs.items()}, rows)

    def first_wrong(
        self,
        given: Given,
        opened: Collection[Node],
        targets: Collection[Node],
        *,
        got: Side | None = None,
        limit: Callable[[Node], float] | None = None,
    ) -> Suspect | None:
        """The first of `targets` whose value is wrong when `opened` alone are laid open, and the rest is compiled as ever."""
        allowed = limit or self.limits.of_region
        found = self.with_opened(given, opened, targets, got=got)
        return next((s for s in found if s.compared.difference.beyond(allowed(s.compared.node))), None)

    def with_opened(
        self, given: Given, opened: Collection[Node], targets: Collection[Node], *, got: Side | None = None
    ) -> list[Suspect]:
        """`targets` in order, on both sides, when `opened` alone are laid open, and the rest is compiled as ever.

        What the trusted side makes of the values laid open, and of rows of state, is what is wanted.
        """
        computed = values(self.graph, given.dims)
        state = [n for n in computed if n.op in STATE]
        shown = self._made(tuple(opened), lambda: tapped(self.graph, opened))
        run = (got or self.got).run(shown, given)
        seen = self.observed(run, dict.fromkeys([*state, *opened]))
        ends = self.observed(run, targets)
        known = self.known(seen)
        alone = self._made((tuple(targets), known, computed), lambda: apart(self.graph, targets, known, given.dims))
        wanted = self.wanted.run(alone, given, seen).outputs
        found = []
        for node in sorted(targets, key=self.graph.number.__getitem__):
            name = label(self.graph, node)
            compared = Compared(node, difference(ends[name], wanted[name]), ends[name], wanted[name])
            found.append(Suspect(compared, {k: v for k, v in seen.items() if k != name}))
        return found

    def _made(self, key: Hashable, make: Callable[[], Graph]) -> Graph:
        """A graph that an earlier step may have wanted, too."""
        if key not in self._recent:
            while len(self._recent) >= RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = make()
        return self._recent[key]
