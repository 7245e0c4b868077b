"""What is to be said about a wrong value: whether its node is wrong by itself, with which others, and due to which pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tensorgraph.compiler import PASSES
from tensorgraph.errors import TensorGraphError
from tensorgraph.graph import Graph, Node
from tensorgraph.tools.testing.cuts import STATE, apart, kept, kept_name, label, sources, values
from tensorgraph.tools.testing.difference import Statistics, difference
from tensorgraph.tools.testing.pair import Pair
from tensorgraph.tools.testing.region import Region
from tensorgraph.tools.testing.report import Described, Fault, InputValue
from tensorgraph.tools.testing.reproduction import Reproduction
from tensorgraph.tools.testing.side import Arrays, Given, Side

GROUPING = "grouping"
"""A device's own joining of nodes, which is left out as passes are."""
MOST_STEPS = 4


@dataclass(frozen=True, eq=False)
class Alone:
    """A region taken out of its graph, and run.

    Attributes:
        opened: those of its nodes that are outputs, too.
        got, wanted: what both sides gave for the same inputs.
        wrong: whether its end is wrong there.
    """

    graph: Graph
    opened: tuple[Node, ...]
    got: Arrays
    wanted: Arrays
    wrong: bool


def blame(pair: Pair, given: Given, region: Region, step: int, folder: Path | None) -> Fault:
    """The fault that a region is; with a folder, a reproduction is saved there."""
    suspect, end = region.suspect, region.nodes[-1]
    alone = take_out(pair, given, region)
    if not alone.wrong and len(region.nodes) == 1 and end.op not in STATE:
        region, alone = _with_others(pair, given, region, alone)

    def comes_right(side: Side) -> bool:
        if alone.wrong:
            return not take_out(pair, given, region, alone.opened, side).wrong
        return pair.first_wrong(given, region.opened, [end], got=side, limit=_limit(pair, region)) is None

    slots = pair.inputs_of(end, suspect.seen, given)
    fault = Fault(
        node=Described.of(end),
        number=pair.graph.number[end],
        extents=suspect.compared.got.shape,
        together=tuple(map(Described.of, region.nodes)),
        difference=suspect.compared.difference,
        inputs=tuple(InputValue(s, Described.of(i), Statistics.of(slots[s])) for s, i in zip(end.slots, end.inputs, strict=True)),
        alone=alone.wrong,
        passes=tuple(_passes(pair.got, comes_right)),
        step=step,
        length=pair.got.length,
        exact=pair.limits.exact,
    )
    if folder is None:
        return fault
    name = f"{step}-{end.op}-{pair.graph.number[end]}.npz"
    try:
        return replace(fault, reproduction=str(_saved(pair, given, region, alone, tuple(fault.lines()), folder / name)))
    except TensorGraphError as error:  # what was found counts more
        return replace(fault, unsaved=str(error))


def _limit(pair: Pair, region: Region) -> Callable[[Node], float]:
    return pair.limits.of_node if len(region.nodes) == 1 else pair.limits.of_region


def take_out(pair: Pair, given: Given, region: Region, opened: tuple[Node, ...] = (), side: Side | None = None) -> Alone:
    """A region's nodes alone on the side that is looked at, some of them laid open."""
    seen, end = region.suspect.seen, region.nodes[-1]
    known = pair.known(seen) - set(region.nodes)
    graph = apart(pair.graph, [*opened, end], known, given.dims)
    got, wanted = (s.run(graph, given, seen).outputs for s in (side or pair.got, pair.wanted))
    name, judged = label(pair.graph, end), wanted
    if opened:
        judged = pair.wanted.run(apart(pair.graph, [end], known.union(opened), given.dims), given, {**seen, **got}).outputs
    found, limits = difference(got[name], judged[name]), pair.limits
    wrong = limits.is_far(end, found) if len(region.nodes) == 1 else found.beyond(limits.of_region(end))
    return Alone(graph, opened, got, wanted, wrong)


def _with_others(pair: Pair, given: Given, region: Region, alone: Alone) -> tuple[Region, Alone]:
    """A node that is right by itself, with as few of those before it as make it wrong; as it was where none do.

    State among them is read where it lies, not given as an input.
    """
    computed = set(values(pair.graph, given.dims))
    nodes: tuple[Node, ...] = region.nodes
    end = nodes[-1]
    for _ in range(MOST_STEPS):
        more = {n for node in nodes for n in sources(node, computed, given.dims)}
        nodes = (*(n for n in values(pair.graph, given.dims) if n in more.union(nodes) and n is not end), end)
        found = _opened(pair, given, region, nodes)
        if found.wrong:
            for node in nodes[:-1]:
                fewer = tuple(n for n in nodes if n is not node)
                again = _opened(pair, given, region, fewer)
                nodes, found = (fewer, again) if again.wrong else (nodes, found)
            return replace(region, nodes=nodes), found
    return region, alone


def _opened(pair: Pair, given: Given, region: Region, nodes: tuple[Node, ...]) -> Alone:
    """More nodes alone, those laid open that a run does not show in any case."""
    return take_out(pair, given, replace(region, nodes=nodes), tuple(n for n in nodes[:-1] if n.op not in STATE))


def _passes(got: Side, comes_right: Callable[[Side], bool]) -> Iterator[str]:
    """The passes without which a value comes right."""
    options = got.options
    for name in PASSES:
        if name not in options.without:
            try:
                if comes_right(got.but(without=(*options.without, name))):
                    yield name
            except TensorGraphError:  # what is compiled needs the pass
                continue
    plain = got.but(without=(*options.without, "fuse_declared"))
    if options.fuse and comes_right(got.but(fuse=False)) and not comes_right(plain):
        yield GROUPING


def _saved(pair: Pair, given: Given, region: Region, alone: Alone, about: tuple[str, ...], path: Path) -> Path:
    graph, got = alone.graph, pair.got
    known = {**given.inputs, **region.suspect.seen}
    streams = list(graph.streams)
    specs = got.store.specs if got.store is not None else {}
    return Reproduction(
        graph=kept(graph),
        given=Given({kept_name(name): known[name] for name in graph.inputs}, given.dims, given.n_tokens if streams else 0),
        weights={name: got.weight(name, graph) for name in graph.constants},
        got={kept_name(name): x for name, x in alone.got.items()},
        wanted={kept_name(name): x for name, x in alone.wanted.items()},
        backend=got.label,
        options=replace(got.options, layouts={k: v for k, v in got.options.layouts.items() if k in streams}),
        states={stream: specs[stream] for stream in streams},
        rows=got.rows(streams),
        length=got.length if streams else 0,
        about=about,
        **({"kv_dtype": got.store.kv_dtype} if got.store is not None else {}),
    ).save(path)
