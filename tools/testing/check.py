"""A check gone through step by step: node by node, as it is compiled, and as a session steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tensorgraph.dtypes import DType
from tensorgraph.engine import LOGITS, Engine, GraphModel
from tensorgraph.graph import Node
from tensorgraph.session import Session
from tensorgraph.tools.testing.blame import blame
from tensorgraph.tools.testing.cuts import STATE
from tensorgraph.tools.testing.difference import REGION_NMSE, Difference, difference
from tensorgraph.tools.testing.pair import Compared, Pair
from tensorgraph.tools.testing.region import Region, Search, smallest_region
from tensorgraph.tools.testing.report import Described, Fault, Report, Stage, Worst
from tensorgraph.tools.testing.side import Array, Arrays, Given

Say = Callable[[str], None]

SESSION = "logits of a session"


def quiet(_: str) -> None: ...


@dataclass
class Check:
    """A pair gone through step by step, and what was found so far.

    Attributes:
        folder: where reproductions are saved.
        whole_first: nodes are looked at only where the steps as they are differ.
    """

    pair: Pair
    folder: Path | None = None
    say: Say = quiet
    whole_first: bool = False
    steps: int = 0
    nodes: int = 0
    worst: dict[str, Compared] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    amplified: dict[Node, None] = field(default_factory=dict)
    ended: bool = False

    def step(self, given: Given) -> tuple[Fault | None, Arrays]:
        """Compare a step, and make both sequences longer by what the side that is looked at computed; its outputs."""
        alike = self.whole_first and not any(apart.beyond(REGION_NMSE) for _, apart in self._whole(given))
        found = None if alike else self._node_by_node(given) or self._together(given)
        if isinstance(found, Region):
            self.say("looking for what is wrong")
            found = blame(self.pair, given, found, self.steps, self.folder)
        if found is not None:
            return found, {}
        run = self.pair.got.run(self.pair.graph, given, keep=True)
        appended = {n.attrs["stream"] for n in self.pair.graph.nodes if n.op == "append"}
        self.pair.wanted.keep_rows({stream: rows for stream, rows in run.rows.items() if stream in appended}, given.n_tokens)
        self.steps += 1
        return None, run.outputs

    def _node_by_node(self, given: Given) -> Region | None:
        self.say(f"step {self.steps}: node by node")
        cuts, self.nodes = self.pair.cuts(given), 0
        for compared, suspect in self.pair.node_by_node(given):
            if suspect is not None:
                cut = next(cut for cut in cuts if compared.node in cut.nodes)
                opened = tuple(n for n in (*cut.sources, *cut.nodes) if n.op not in STATE)
                return Region((compared.node,), suspect, opened)
            self.nodes += 1
            held = self.worst.get(compared.node.op)
            if held is None or compared.difference.nmse > held.difference.nmse:
                nothing = np.zeros(0)  # not the values
                self.worst[compared.node.op] = replace(compared, got=nothing, wanted=nothing)
        return None

    def _together(self, given: Given) -> Region | Fault | None:
        """As it is compiled: between nodes that have names or select, with nothing laid open, beside the model as written."""
        pair, limits = self.pair, self.pair.limits
        self.say(f"step {self.steps}: as it is compiled")
        nodes = [n for cut in pair.cuts(given) for n in cut.nodes if n.op not in STATE]
        opened = [n for n in nodes if n.name or not n.dtype.is_float]
        search = smallest_region(pair, given, opened, limits.of_region)
        if search.region is None:
            differing = [(name, apart) for name, apart in self._whole(given) if apart.beyond(limits.of_whole)]
            if differing and opened:
                self.say(f"step {self.steps}: where it comes to differ")
                self._note(search)
                search = smallest_region(pair, given, (), lambda _: limits.of_whole)
            if differing and search.region is None and pair.is_rewritten(given):
                return self._end(*differing[-1], "graph", self.steps, pair.got.length)
        self._note(search)
        return search.region

    def _whole(self, given: Given) -> list[tuple[str, Difference]]:
        found = self.pair.whole(given)
        for name, apart in found:
            self.whole[name] = max(self.whole.get(name, 0.0), apart.nmse)
        return found

    def session(self, model: GraphModel, fed: Sequence[tuple[Array, Array]], kv_dtype: DType) -> Fault | None:
        """The same tokens in a session, which steps on prepared plans, beside the logits that were compared."""
        self.say("as a session steps")
        side = self.pair.got
        engine = Engine(model, side.devices, kv_dtype=kv_dtype, options=replace(side.options, layouts={}))
        engine._uploaded = side.held  # weights are held once
        with Session(engine, context=side.length, step_tokens=len(fed[0][0])) as session:
            for number, (tokens, wanted) in enumerate(fed):
                length = session.length
                found = difference(session.eval(tokens.tolist()), wanted[-1])
                self.whole[SESSION] = max(self.whole.get(SESSION, 0.0), found.nmse)
                if found.beyond(self.pair.limits.of_whole):
                    return self._end(LOGITS, found, "session", number, length)
        return None

    def _end(self, name: str, found: Difference, stage: Stage, step: int, length: int) -> Fault:
        """What is wrong as a whole, while each of its nodes is right."""
        graph = self.pair.graph
        node = graph.outputs[name] if name in graph.outputs else graph.streams[name]
        return Fault(
            node=Described.of(node),
            number=graph.number[node],
            extents=(),
            together=(),
            difference=found,
            inputs=(),
            alone=False,
            passes=(),
            step=step,
            length=length,
            exact=self.pair.limits.exact,
            stage=stage,
        )

    def _note(self, search: Search) -> None:
        self.amplified.update(dict.fromkeys(suspect.compared.node for suspect in search.amplified))
        self.ended |= search.ended

    def report(self, first: Fault | None = None) -> Report:
        """All of it."""
        return Report(
            wanted=self.pair.wanted.label,
            got=self.pair.got.label,
            exact=self.pair.limits.exact,
            steps=self.steps + (first is not None),
            nodes=self.nodes,
            worst={op: Worst(Described.of(c.node), c.difference.nmse) for op, c in sorted(self.worst.items())},
            whole=dict(self.whole),
            amplified=tuple(map(Described.of, self.amplified)),
            ended=self.ended,
            first=first,
        )
