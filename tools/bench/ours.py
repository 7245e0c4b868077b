"""Our side: a model in this process, and what its decoding reads."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions
from tensorgraph.extents import Extents
from tensorgraph.graph import STRUCTURAL
from tensorgraph.models.architecture import Model, WeightFile
from tensorgraph.models.text.model import TextModel, TextSession, load
from tensorgraph.op import node_bytes
from tensorgraph.ops.attention.flash_attn import unread
from tensorgraph.plan import Plan
from tensorgraph.session import SessionSnapshot
from tensorgraph.state import StateSpec
from tensorgraph.tools.bench.cases import Case, Kind
from tensorgraph.tools.bench.peer import wait_until_quiet
from tensorgraph.tools.bench.rounds import Round
from tensorgraph.tools.lowerings import checked
from tensorgraph.tools.plan import step_dims

FILLED = 2048
"""Tokens whose rows are drawn at once."""


def open_model(
    path: str,
    backend: str,
    threads: int | None,
    kv_type: str,
    exact: bool,
    packed_cache: bool = False,
    lowerings: Sequence[str] = (),
) -> TextModel:
    """The model as it is measured, with so many threads (None: as many as the backend likes).

    The reference backend is always exact, and takes its threads from NumPy's BLAS, which was told before it was imported.
    """
    how = CompileOptions(exact=exact, lowerings=tuple(lowerings))
    model = load(path, backend=backend, kv_type=kv_type, options=how, threads=threads or "auto", packed_cache=packed_cache)
    return checked(model)


class Ours:
    """Rounds of sessions of one store.

    Args:
        context: most tokens of a sequence.
        fill: whether the rows of what comes before are random, not computed.
    """

    def __init__(self, model: TextModel, context: int, fill: bool = False) -> None:
        self._session: TextSession = model.session(context=context)
        self._prefix: SessionSnapshot = self._session.snapshot()
        self._fill = fill

    def begin(self, ids: Sequence[int]) -> None:
        """Make `ids` what later rounds come after."""
        self._prefix.release()
        self._session.trim(0)
        if ids and self._fill:
            fill_randomly(self._session, ids)
        elif ids:
            self._session.eval(ids)
        self._prefix = self._session.snapshot()

    def warm_up(self, kind: Kind, ids: Sequence[int]) -> str:
        """A round that does not count: plans are compiled, weights and pages are there afterwards."""
        self.run(kind, ids)
        return ""

    def run(self, kind: Kind, ids: Sequence[int]) -> Round:
        """One round after the prefix."""
        session = self._session
        session.restore(self._prefix)
        began = time.perf_counter()
        if kind == "pp":
            session.eval(ids)
        else:
            for token in ids:
                session.eval([token])
        return Round(time.perf_counter() - began, wait_until_quiet())

    def token_bytes(self, case: Case) -> int:
        """Bytes that a step of one token reads at least, in the middle of a case: weights, and rows of state.

        Of a table its row and of experts those that are chosen; of a stream all rows that the step sees, once, or those listed.
        """
        weights, streams = read_bytes(self._session.plan, self._session.model.model, case.depth + (case.tokens + 1) // 2, 1)
        return weights + sum(streams.values())

    def close(self) -> None:
        """Give the pages back."""
        self._prefix.release()
        self._session.close()


def read_bytes(plan: Plan, model: Model, context: int, tokens: int) -> tuple[int, dict[str, int]]:
    """Bytes that the last step of a context reads at least, of so many tokens: of weights, and of each stream."""
    dims = step_dims(model, Extents(context=context), tokens)
    weights = 0
    streams: dict[str, int] = {}
    for node in plan.active(plan.choose(dims)):
        if node.op in STRUCTURAL:
            continue
        touched = registry.ops.get(node.op).cost(node, dims).size_bytes
        passing = sum(node_bytes(i, dims) for i in (node, *node.inputs) if i.base.op != "constant")
        left = {rows.base: n for rows, n in (unread(node, dims) if node.op == "flash_attn" else {}).items()}
        for stream in {i.base for i in node.inputs if i.base.op in ("read", "append")}:
            name = str(stream.attrs["stream"])
            streams[name] = max(streams.get(name, 0), node_bytes(stream, dims) - left.get(stream, 0))
        if any(i.base.op == "constant" for i in node.inputs):
            weights += max(0, touched + sum(left.values()) - passing)
    return weights, streams


def fill_randomly(session: TextSession, ids: Sequence[int]) -> None:
    """Append tokens with rows of normally distributed numbers: the same ones each time."""
    rng = np.random.default_rng(0)

    def rows(stream: str, spec: StateSpec, n: int) -> np.ndarray:
        return rng.standard_normal((n, *spec.row_shape), np.float32)

    for at in range(0, len(ids), FILLED):
        session.fill(ids[at : at + FILLED], rows)


def describe(model: TextModel) -> dict[str, Any]:
    """Size and parameters of the file, and its main type."""
    assert model.model.file is not None
    tensors = model.model.file.tensors.values()
    return {
        "architecture": model.model.architecture.name,
        "type": most_bytes(model.model.file),
        "size_bytes": sum(tensor.size_bytes for tensor in tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
    }


def most_bytes(file: WeightFile) -> str:
    """The element type that most of a file's bytes are of."""
    by_type: dict[str, int] = {}
    for tensor in file.tensors.values():
        by_type[str(tensor.dtype)] = by_type.get(str(tensor.dtype), 0) + tensor.size_bytes
    return max(by_type, key=lambda name: by_type[name])
