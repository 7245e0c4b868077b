"""What copying a row takes beside what queries do with it, measured once on a machine: which form of sparse attention is best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.measured import keep, kept
from tensorgraph.backends.cpu.target import Target, can_run, host
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dtypes import as_dtype
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.graph import Graph, append, input
from tensorgraph.ops.attention.candidates_cpu import SCALE, RowCosts
from tensorgraph.ops.attention.flash_attn import Segment, flash_attn
from tensorgraph.plan import Executable
from tensorgraph.state import StateSpec
from tensorgraph.state_store import StateStore

FEW_HEADS, MANY_HEADS = 12, 48
"""Whole groups of queries on every target, one tile of one token."""
ROUNDS = 11
MOST = 3000
NAME = "row-costs"
USUAL = RowCosts(700, 400)


@dataclass(frozen=True)
class Trial:
    """Attention of so many tokens, each to its own listed rows of as many as there are, of latents as DeepSeek's are (f16).

    `shared`: part of the rows that are listed for all tokens alike.
    """

    heads: int
    tokens: int
    rows: int
    listed: int
    shared: float = 0.0
    width: int = 576
    d_v: int = 512

    def prepare(self, backend: Any, forms: Sequence[str | None]) -> list[Callable[[], None]]:
        """What runs it once in each of some forms (`candidates_cpu.FORMS`; None: as the costs say), all on the same rows."""
        extents, f16 = Extents(self.tokens, self.rows), as_dtype("f16")
        spec = StateSpec((self.width,), f16)
        n_tokens, n_rows = extents.new_tokens, extents.seen_rows(spec.stream_class)
        new = input("new", (extents.new_rows(spec.stream_class), self.width))
        k = append("latent", new, n_rows, f16).reshape(n_rows, 1, self.width)
        pos, seq = (input(f"rows.{spec.stream_class.name}.{what}", (n_rows,), "i32") for what in ("pos", "seq"))
        own_pos, own_seq = (input(name, (n_tokens,), "i32") for name in ("positions", "seqs"))
        segment = Segment(k, pos=pos, seq=seq, ids=input("ids", (n_tokens, self.listed), "i32"))
        q = input("q", (n_tokens, self.heads, self.width))
        graph = Graph(y=flash_attn(q, segment, scale=self.width**-0.5, d_v=self.d_v, pos=own_pos, seq=own_seq))
        options = [CompileOptions(lowerings=() if form is None else (form,)) for form in forms]
        executables = [compile(graph, backend, how).bind() for how in options]

        rng = np.random.default_rng(0)
        store = StateStore({"latent": spec}, kv_dtype=f16)
        sequence = store.new()
        with store.begin([(sequence, self.rows - self.tokens)]) as step:
            step.append("latent", rng.standard_normal((self.rows - self.tokens, self.width), np.float32))
            step.commit()
        step = store.begin([(sequence, self.tokens)])
        given, dims = StepInputs(name for name in graph.inputs if name not in ("q", "new", "ids"))(
            step, np.zeros(self.tokens, np.int32), np.zeros(0, np.int32)
        )
        given["q"] = rng.standard_normal((self.tokens, self.heads, self.width), np.float32)
        given["new"] = rng.standard_normal((self.tokens, self.width), np.float32)
        given["ids"] = self._ids(rng)

        def run(executable: Executable) -> None:
            executable.run(given, state=step, dims=dims)

        return [partial(run, executable) for executable in executables]

    def _ids(self, rng: np.random.Generator) -> np.ndarray:
        seen = self.rows - self.tokens
        n_shared = int(self.listed * self.shared)
        common = rng.permutation(seen)
        own = [rng.choice(common[n_shared:], self.listed - n_shared, replace=False) for _ in range(self.tokens)]
        return np.array([np.r_[common[:n_shared], ids] for ids in own], np.int32)


TRIALS = {
    "listed": ("gather", Trial(0, tokens=4, rows=8192, listed=512)),
    "next": ("masked", Trial(0, tokens=4, rows=2048, listed=2040)),
}
"""By the field of `RowCosts` that they show: rows here and there of many, and nearly all of few."""


def measure(backend: Any) -> RowCosts:
    """The costs of a device, which takes about half a second."""
    runs = {}
    for name, (form, trial) in TRIALS.items():
        for heads in (FEW_HEADS, MANY_HEADS):
            (runs[name, heads],) = replace(trial, heads=heads).prepare(backend, [form])
    found: dict[str, list[int]] = {name: [] for name in TRIALS}
    for turn in range(ROUNDS + 1):
        took = {}
        for key, run in runs.items():
            began = time.perf_counter()
            run()
            took[key] = time.perf_counter() - began
        for name in TRIALS if turn else ():
            found[name].append(cost(took[name, FEW_HEADS], took[name, MANY_HEADS]))
    return RowCosts(**{name: int(np.median(costs)) for name, costs in found.items()})


def cost(few_s: float, many_s: float) -> int:
    """What a row takes beside its queries, which take `(many_s - few_s) / (MANY_HEADS - FEW_HEADS)` each."""
    query_s = max(many_s - few_s, few_s / FEW_HEADS / 4) / (MANY_HEADS - FEW_HEADS)
    return max(0, min(round(SCALE * (few_s / query_s - FEW_HEADS)), MOST))


_KNOWN: dict[Target, RowCosts] = {}


def row_costs(target: Target) -> RowCosts:
    """The costs of a target on this machine: as they were measured before, or measured now and kept in the cache folder. Of one
    that does not run here, those of no machine in particular."""
    if target not in _KNOWN:
        found = kept(NAME, target, RowCosts._fields, MOST) if runs_here(target) else USUAL._asdict()
        _KNOWN[target] = RowCosts(**found) if found is not None else measure_again(target)
    return _KNOWN[target]


def measure_again(target: Target) -> RowCosts:
    """Measure, and keep that from now on; plans that are bound already stay as they are.

    Raises: UnsupportedError: the target does not run here.
    """
    found = _KNOWN[target] = measure(device_of(target))
    keep(NAME, target, found._asdict())
    return found


def runs_here(target: Target) -> bool:
    return target == host() or can_run(target)


def device_of(target: Target) -> CpuDevice:
    """With one thread."""
    device = CpuDevice("cpu" if target == host() else f"cpu:{target.name}")
    device.set_threads(1)
    return device
