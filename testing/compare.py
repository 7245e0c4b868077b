"""The checks themselves: a graph on two sides, and a model over a few steps of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tensorgraph.compiler import CompileOptions
from tensorgraph.dtypes import DType, as_dtype, f16
from tensorgraph.engine import LOGITS, Engine, GraphModel
from tensorgraph.errors import InputError
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.graph import Graph, Node
from tensorgraph.plan import Weights
from tensorgraph.session import Session
from tensorgraph.state import StateSpec
from tensorgraph.testing.blame import blame
from tensorgraph.testing.cuts import STATE
from tensorgraph.testing.difference import REGION_NMSE, Difference, Limits, difference
from tensorgraph.testing.pair import Compared, Pair, Suspect
from tensorgraph.testing.region import Region, smallest_region
from tensorgraph.testing.report import Described, Fault, Report, Worst
from tensorgraph.testing.reproduction import Reproduction
from tensorgraph.testing.side import AS_WRITTEN, Array, Arrays, Backend, Given, Side
from tensorgraph.testing.source_lines import shared_files_shown

Say = Callable[[str], None]

BACKENDS: tuple[Backend, Backend] = ("reference", "cpu")
LIMIT_BYTES = 1 << 32
SESSION = "logits of a session"


def _quiet(_: str) -> None: ...


@dataclass
class Check:
    """A pair gone through step by step, and what was found so far.

    With `whole_first`, only where the steps as they are differ are nodes looked at.
    """

    pair: Pair
    folder: Path | None = None
    say: Say = _quiet
    whole_first: bool = False
    steps: int = 0
    nodes: int = 0
    worst: dict[str, Compared] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    amplified: dict[Node, None] = field(default_factory=dict)

    def step(self, given: Given) -> tuple[Fault | None, Arrays]:
        """Compare a step, and make both sequences longer by what the side that is looked at computed; its outputs."""
        alike = self.whole_first and not any(apart.beyond(REGION_NMSE) for _, apart in self._whole(given))
        region = None if alike else self._node_by_node(given) or self._together(given)
        if region is not None:
            self.say("looking for what is wrong")
            return blame(self.pair, given, region, self.steps, self.folder), {}
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

    def _together(self, given: Given) -> Region | None:
        """As it is compiled: between the nodes that have names, and with nothing laid open."""
        pair, limits = self.pair, self.pair.limits
        self.say(f"step {self.steps}: as it is compiled")
        named = [n for cut in pair.cuts(given) for n in cut.nodes if n.name and n.op not in STATE]
        search = smallest_region(pair, given, named, limits.of_region)
        if search.region is None:
            if any(apart.beyond(limits.of_whole) for _, apart in self._whole(given)):
                self.say(f"step {self.steps}: where it comes to differ")
                self._note(search.amplified)
                search = smallest_region(pair, given, (), lambda _: limits.of_whole)
        self._note(search.amplified)
        return search.region

    def _whole(self, given: Given) -> list[tuple[str, Difference]]:
        found = self.pair.whole(given)
        for name, apart in found:
            self.whole[name] = max(self.whole.get(name, 0.0), apart.nmse)
        return found

    def session(self, model: GraphModel, fed: Sequence[tuple[Array, Array]], kv_dtype: DType) -> Fault | None:
        """The same tokens in a session, which steps on prepared plans, beside the logits that were compared."""
        self.say("as a session steps")
        side, logits = self.pair.got, self.pair.graph.outputs[LOGITS]
        engine = Engine(model, side.devices, kv_dtype=kv_dtype, options=replace(side.options, layouts={}))
        engine._uploaded = side.held  # weights are held once
        with Session(engine, context=side.length, step_tokens=len(fed[0][0])) as session:
            for number, (tokens, wanted) in enumerate(fed):
                length = session.length
                found = difference(session.eval(tokens.tolist()), wanted[-1])
                self.whole[SESSION] = max(self.whole.get(SESSION, 0.0), found.nmse)
                if found.beyond(self.pair.limits.of_whole):
                    return Fault(
                        node=Described.of(logits),
                        number=self.pair.graph.number[logits],
                        extents=wanted[-1].shape,
                        together=(),
                        difference=found,
                        inputs=(),
                        alone=False,
                        passes=(),
                        step=number,
                        length=length,
                        exact=self.pair.limits.exact,
                        session=True,
                    )
        return None

    def _note(self, amplified: Sequence[Suspect]) -> None:
        self.amplified.update(dict.fromkeys(suspect.compared.node for suspect in amplified))

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
            first=first,
        )


@dataclass(frozen=True)
class Terms:
    """How two sides are compared.

    Args:
        backends: the trusted one, and the one that is looked at.
        options: what the second is compiled with; the first computes each node as it is written.
        without: passes that are left out on the first, which is compiled with `options` then: with and without a pass. Nodes
            are looked at only where that makes a difference.
        limits: how far values may be apart; None is what `options` allow.
        folder: where reproductions of wrong nodes are saved; None is nowhere.
        limit_bytes: most that values and weights of nodes compared at once may take.
        say: told what is done, for a line of progress.
    """

    backends: tuple[Backend, Backend] = BACKENDS
    options: CompileOptions = field(default_factory=lambda: CompileOptions(exact=True))
    without: str | Sequence[str] | None = None
    limits: Limits | None = None
    folder: str | Path | None = None
    limit_bytes: int = LIMIT_BYTES
    say: Say = _quiet

    def check(
        self,
        graph: Graph,
        weights: Weights,
        states: Mapping[str, StateSpec] | None = None,
        kv_dtype: DType | None = None,
    ) -> Check:
        """A graph's sides, not yet compared."""
        wanted = AS_WRITTEN
        if self.without is not None:
            left_out = (self.without,) if isinstance(self.without, str) else tuple(self.without)
            wanted = replace(self.options, without=left_out)
        first, second = (
            Side(backend, options, weights, graph=graph, states=states, kv_dtype=kv_dtype or f16)
            for backend, options in zip(self.backends, (wanted, self.options), strict=True)
        )
        limits = self.limits or Limits(exact=self.options.exact)
        folder = Path(self.folder) if self.folder is not None else None
        return Check(Pair(graph, first, second, limits, self.limit_bytes), folder, self.say, self.without is not None)


def compare(
    graph: Graph, inputs: Arrays, constants: Weights = None, *, dims: Mapping[str, int] | None = None, terms: Terms | None = None
) -> Report:
    """Run a graph on two sides and find the first node that differs although its inputs agree.

    `dims` gives extents that no input has.

    Raises: InputError: an input is missing or does not fit, or the graph has state: see `compare_model`.
    """
    if graph.streams:
        raise InputError(f"[compare] wanted a graph without state, or compare_model; got the streams {', '.join(graph.streams)}")
    check = (terms or Terms()).check(graph, constants)
    fault, _ = check.step(Given.of(graph, inputs, dims))
    return check.report(fault)


def compare_model(
    model: GraphModel, ids: Sequence[int] | Array, *, decode: int = 2, kv_type: DType | str = "f16", terms: Terms | None = None
) -> Report:
    """Evaluate token ids in one step and then so many tokens one by one, each the likeliest, on two sides.

    Both sides see the same rows of state: those that the side that is looked at appended, once they were compared.

    Raises: InputError: no ids, or one outside the vocabulary.
    """
    tokens = np.asarray(ids)
    fits = tokens.ndim == 1 and len(tokens) > 0 and tokens.dtype.kind in "iu"
    if not fits or tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise InputError(f"[compare] wanted token ids below {model.vocab_size}; got {ids!r:.60}")
    kv_dtype = as_dtype(kv_type)
    extents = Extents(len(tokens), len(tokens) + decode)
    graph = model.graph(extents, kv_dtype)
    check = (terms or Terms()).check(graph, model.weight, model.states(), kv_dtype)
    make_inputs, fed = StepInputs(tuple(graph.inputs)), list[tuple[Array, Array]]()
    for _ in range(1 + decode):
        with check.pair.got.begin(len(tokens)) as step:
            assert step is not None
            given = Given(*make_inputs(step, tokens.astype(np.int32), np.array([len(tokens) - 1], np.int32)), len(tokens))
        fault, outputs = check.step(given)
        if fault is not None:
            with shared_files_shown():
                block = model.graph(extents, kv_dtype).nodes[fault.number].where
            return check.report(replace(fault, block="" if block == fault.node.where else block))
        fed.append((tokens, outputs[LOGITS]))
        tokens = np.array([np.argmax(outputs[LOGITS][-1])])
    return check.report(check.session(model, fed, kv_dtype))


def rerun(reproduction: Reproduction, backend: str | None = None, terms: Terms | None = None) -> Report:
    """Compare a saved reproduction again, on the backend that it was wrong on or on another one."""
    on = backend or reproduction.backend
    terms = terms or Terms()
    pair = Pair(
        reproduction.graph,
        reproduction.side(terms.backends[0], AS_WRITTEN),
        reproduction.side(on, reproduction.options),
        terms.limits or Limits(exact=reproduction.options.exact),
        terms.limit_bytes,
    )
    check = Check(pair, None, terms.say)
    fault, _ = check.step(reproduction.given)
    return check.report(fault)
