"""The smallest region of a graph that is wrong where its nodes are compiled together, each by itself being right."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from tensorgraph.dims import Bindings
from tensorgraph.graph import Graph, Node
from tensorgraph.tools.testing.cuts import STATE, apart, label, needed, values
from tensorgraph.tools.testing.definition import dithered, perturbed
from tensorgraph.tools.testing.difference import Limits, difference
from tensorgraph.tools.testing.pair import Pair, Suspect
from tensorgraph.tools.testing.side import Given

DRAWS = 4
AMPLIFIED = 256.0
"""How many times the squared error that rounding every value costs a difference may be: 16, squared."""
ROUNDING = 2.0**-24
LEFT = 16.0
"""The part of a difference that is left where its cause is: what adds up from node to node is halved instead."""
MOST_NODES = 64
MOST_EXCUSED = 16


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that give a wrong value between right ones.

    Attributes:
        nodes: in order; the last one's value is wrong.
        suspect: that value, and those that it is computed from.
        opened: what was laid open besides; the region's other nodes must not be, or it comes out right.
        grown: the value that what began here has grown to, where it was followed to where it is small.
    """

    nodes: tuple[Node, ...]
    suspect: Suspect
    opened: tuple[Node, ...]
    grown: Suspect | None = None


@dataclass(frozen=True, eq=False)
class Search:
    """What was found: a region, if any, and values that differ no more than rounding does, amplified.

    Attributes:
        ended: there were too many of these, and what differs besides was not looked at.
    """

    region: Region | None
    amplified: tuple[Suspect, ...]
    ended: bool = False


def between(graph: Graph, end: Node, known: Collection[Node], dims: Bindings) -> tuple[Node, ...]:
    """What computes `end` from known values, in order, itself included."""
    found = needed([end], known, dims)
    return (*(n for n in values(graph, dims) if n in found and n is not end), end)


def smallest_region(pair: Pair, given: Given, opened: Collection[Node], limit: Callable[[Node], float]) -> Search:
    """Find nodes that are wrong together: lay one more value open at a time, in the middle of what is left.

    Where what differs lies before it or behind, the rest is out of question. Where nothing differs any more, the value is one
    that must stay within, unless the trusted side itself makes as much of the small difference that it has: then it is followed
    to where it began. Values whose difference rounding explains are laid open and judged no more, the first few; of values that
    are laid open, selections are not judged: rounding chooses otherwise now and then, and what follows is judged by what was
    chosen.
    """
    computed = values(pair.graph, given.dims)
    base, amplified, excused = list(opened), list[Suspect](), set[Node]()
    while True:
        judged = [n for n in base if n.dtype.is_float]
        ends = dict.fromkeys([*(n for n in computed if n.op in STATE), *judged, *pair.graph.outputs.values()])
        targets = [n for n in ends if n not in excused]
        found = pair.first_wrong(given, base, targets, limit=limit) if targets else None
        if found is None or len(amplified) == MOST_EXCUSED:
            return Search(None, tuple(amplified), found is not None)
        region = _narrowed(pair, given, Region((), found, tuple(base)))
        if not _is_rounding(pair, given, region):
            return Search(region, tuple(amplified))
        amplified.append(region.grown or region.suspect)
        end = amplified[-1].compared.node
        excused.add(end)
        if end in computed and end not in base and end.op not in STATE:
            base.append(end)


def _narrowed(pair: Pair, given: Given, region: Region) -> Region:
    """The same with as few nodes as can be."""
    inside: set[Node] = set()  # those that must not be laid open
    while True:
        suspect, opened = region.suspect, region.opened
        end, size = suspect.compared.node, suspect.compared.difference.nmse
        nodes = between(pair.graph, end, pair.known(suspect.seen) - {end}, given.dims)
        open_to = [n for n in nodes[:-1] if n not in inside and n.op not in STATE and n not in opened]
        if not open_to:
            return replace(region, nodes=nodes)
        middle = open_to[len(open_to) // 2]
        at_middle, at_end = pair.with_opened(given, [*opened, middle], [middle, end])
        found = next((s for s in (at_middle, at_end) if _remains(pair.limits, s, size)), None)
        grown = region.grown
        if found is None and _grows(suspect, at_end, size):
            found, grown = at_middle, grown or suspect
        if found is None:
            inside.add(middle)
        else:
            region = Region((), found, (*opened, middle), grown)


def _grows(suspect: Suspect, now: Suspect, size: float) -> bool:
    """Whether the trusted side itself makes as much of the small difference of a value that was laid open."""
    return difference(now.compared.wanted, suspect.compared.wanted).nmse >= size / LEFT


def _remains(limits: Limits, suspect: Suspect, size: float) -> bool:
    """Whether a good part of a difference is left in a value."""
    compared = suspect.compared
    return compared.difference.beyond(max(size / LEFT, limits.of_node(compared.node)))


def _is_rounding(pair: Pair, given: Given, region: Region) -> bool:
    """Whether rounding each of a region's values, to f32 or as products of 8 bits do, moves its end as far as the difference."""
    graph, suspect = pair.graph, region.suspect
    if len(region.nodes) == 1:
        return not pair.is_wrong(suspect, given)
    if len(region.nodes) > MOST_NODES:
        return not suspect.compared.difference.beyond(pair.limits.of_region(suspect.compared.node))
    known = pair.known(suspect.seen) - set(region.nodes)
    alone = [apart(graph, [node], known.union(region.nodes[:i]), given.dims) for i, node in enumerate(region.nodes)]
    compared, moved = suspect.compared, 0.0
    for draw in range(DRAWS):
        held = dict(suspect.seen)
        for node, single in zip(region.nodes, alone, strict=True):
            value = pair.wanted.run(single, given, held).outputs[label(graph, node)]
            held[label(graph, node)] = value
            if node is not compared.node:
                rng = np.random.default_rng(draw)
                held[label(graph, node)] = perturbed(value, ROUNDING, rng) if pair.limits.exact else dithered(value, rng)
        moved = max(moved, difference(value, compared.wanted).nmse)
    return compared.difference.nmse <= AMPLIFIED * moved
