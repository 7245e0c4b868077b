"""The checks that users call: a graph on two sides, a model over a few steps of a sequence, a saved reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tensorgraph.compiler import CompileOptions
from tensorgraph.dtypes import DType, as_dtype, f16
from tensorgraph.engine import LOGITS, GraphModel
from tensorgraph.errors import InputError
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.graph import Graph
from tensorgraph.plan import Weights
from tensorgraph.state import StateSpec
from tensorgraph.tools.testing.check import Check, Say, quiet
from tensorgraph.tools.testing.difference import Limits
from tensorgraph.tools.testing.pair import Pair
from tensorgraph.tools.testing.report import Report
from tensorgraph.tools.testing.reproduction import Reproduction
from tensorgraph.tools.testing.side import AS_WRITTEN, Array, Arrays, Backend, Given, Side
from tensorgraph.tools.testing.source_lines import shared_files_shown

BACKENDS: tuple[Backend, Backend] = ("reference", "cpu")
LIMIT_BYTES = 1 << 32


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
    say: Say = quiet

    def __post_init__(self) -> None:
        given: Any = self.backends
        if not isinstance(given, tuple | list) or len(given) != 2:
            wanted = 'two backends, as in backends=("reference", "cpu")'
            raise InputError(f"[compare] wanted {wanted}; got {given!r:.60}")

    def check(
        self,
        graph: Graph,
        weights: Weights,
        states: Mapping[str, StateSpec] | None = None,
        kv_dtype: DType | None = None,
        written: Graph | None = None,
    ) -> Check:
        """A graph's sides, not yet compared; `written` is the graph before the model's own passes."""
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
        return Check(Pair(graph, first, second, limits, self.limit_bytes, written), folder, self.say, self.without is not None)


def compare(
    graph: Graph, inputs: Arrays, constants: Weights = None, *, dims: Mapping[str, int] | None = None, terms: Terms | None = None
) -> Report:
    """Run a graph on two sides and find the first node that differs although its inputs agree.

    `dims` gives extents that no input has.

    Raises: InputError: an input is missing, unknown or does not fit, or the graph has state: see `compare_model`.
    """
    if not isinstance(graph, Graph):
        raise InputError(f"[compare] wanted a Graph; got {graph!r:.60}: name the outputs, Graph(y=...)")
    for what, known, named in (("inputs", graph.inputs, inputs), ("dims", graph.dims, dims or {})):
        if unknown := [name for name in named if name not in known]:
            raise InputError(f"[compare] there are no {what} {', '.join(map(str, unknown))}; known: {', '.join(known) or 'none'}")
    if graph.streams:
        raise InputError(f"[compare] wanted a graph without state, or compare_model; got the streams {', '.join(graph.streams)}")
    check = (terms or Terms()).check(graph, constants)
    fault, _ = check.step(Given.of(graph, inputs, dims))
    return check.report(fault)


def compare_model(
    model: GraphModel, ids: Sequence[int] | Array, *, decode: int = 2, kv_type: DType | str = "f16", terms: Terms | None = None
) -> Report:
    """Evaluate token ids in one step and then so many tokens one by one, each the likeliest, on two sides.

    Both sides see the same rows of state: those that the side that is looked at appended, once they were compared. Of a model
    that gives no logits, an encoder, one step is compared, and the rows of all tokens.

    Raises: InputError: no ids, one outside the vocabulary, or more than the model's context holds, with the steps.
    """
    if not isinstance(decode, int) or decode < 0:
        raise InputError(f"[compare] wanted decode as a number of steps >= 0; got {decode!r:.60}")
    tokens = np.asarray(ids)
    fits = tokens.ndim == 1 and len(tokens) > 0 and tokens.dtype.kind in "iu"
    if not fits or tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise InputError(f"[compare] wanted token ids below {model.vocab_size}; got {ids!r:.60}")
    kv_dtype = as_dtype(kv_type)
    extents = Extents(len(tokens), max(len(tokens), min(len(tokens) + decode, model.context)))
    graph = model.graph(extents, kv_dtype)
    generates = LOGITS in graph.outputs
    steps = decode if generates else 0
    if len(tokens) + steps > model.context:
        raise InputError(f"[compare] wanted at most {model.context} tokens with the steps; got {len(tokens)} and {steps} steps")
    as_written = getattr(model, "graph_as_written", None)  # not every GraphModel rewrites its graph
    written = None if as_written is None else as_written(extents, kv_dtype)
    check = (terms or Terms()).check(graph, model.weight, model.states(), kv_dtype, written)
    make_inputs, fed = StepInputs(tuple(graph.inputs)), list[tuple[Array, Array]]()
    for _ in range(1 + steps):
        out_ids = np.arange(len(tokens), dtype=np.int32)
        with check.pair.got.begin(len(tokens)) as step:
            assert step is not None
            given = Given(*make_inputs(step, tokens.astype(np.int32), out_ids[-1:] if generates else out_ids), len(tokens))
        fault, outputs = check.step(given)
        if fault is not None:
            with shared_files_shown():
                block = model.graph(extents, kv_dtype).nodes[fault.number].where
            return check.report(replace(fault, block="" if block == fault.node.where else block))
        if generates:
            fed.append((tokens, outputs[LOGITS]))
            tokens = np.array([np.argmax(outputs[LOGITS][-1])])
    return check.report(check.session(model, fed, kv_dtype) if generates else None)


def rerun(reproduction: Reproduction, backend: str | None = None, terms: Terms | None = None) -> Report:
    """Compare a saved reproduction again, on the backend that it was wrong on or on another one.

    Raises: InputError: there is not enough memory for it.
    """
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
    try:
        fault, _ = check.step(reproduction.given)
    except MemoryError as error:
        raise InputError(f"[reproduction] wanted a graph that this machine has the memory for; {error}") from error
    return check.report(fault)
