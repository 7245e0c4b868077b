"""Graphs of attention over state streams, and random histories of a store to run them in, on two backends side by side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import CannotTrim
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.graph import Graph, Node, append, input
from tensorgraph.ops.attention import Segment, flash_attn
from tensorgraph.plan import Executable
from tensorgraph.state import Layout, StateSpec
from tensorgraph.state_step import Step
from tensorgraph.state_store import StateStore

Array = np.ndarray[Any, Any]
EXTENTS = Extents(tokens=64, context=192, sequences=4)


@dataclass(frozen=True)
class Stream:
    """One segment: a stream of keys, and one of values unless these are the first channels of the keys.

    `window` also bounds what is kept; `n_ids` row numbers are listed for every token where it is not 0.
    """

    name: str
    every: int = 1
    window: int | None = None
    own_values: bool = True
    n_ids: int = 0
    flat: bool = False  # rows [Dk] that are seen through a view as [1, Dk], as latents are

    @property
    def parts(self) -> tuple[str, ...]:
        return (f"{self.name}.k", f"{self.name}.v") if self.own_values else (f"{self.name}.k",)


@dataclass(frozen=True)
class Attention:
    """One flash_attn over streams; its streams are held as `layouts` (pairs of a stream and its layout) says."""

    streams: tuple[Stream, ...]
    d_k: int = 32
    d_v: int = 32
    heads: int = 4
    kv_heads: int = 2
    dtype: str = "f16"
    sinks: bool = False
    softcap: float = 0.0
    layouts: tuple[tuple[str, Layout], ...] = ()

    @property
    def specs(self) -> dict[str, StateSpec]:
        found = {}
        for stream in self.streams:
            for part in stream.parts:
                width = self.d_k if part.endswith(".k") else self.d_v
                row = (width,) if stream.flat else (self.kv_heads, width)
                found[part] = StateSpec(row, as_dtype(self.dtype), stream.every, stream.window)
        return found

    def graph(self) -> Graph:
        """Inputs: `q` [T, H, Dk], `new.STREAM` [N, *row], `ids.NAME` [T, n_ids], `sinks` [H], and those of `StepInputs`."""
        n_tokens, specs = EXTENTS.new_tokens, self.specs
        segments = []
        for stream in self.streams:
            cls = specs[stream.parts[0]].stream_class
            n_rows, rows = EXTENTS.seen_rows(cls), []
            for part in stream.parts:
                new = input(f"new.{part}", (EXTENTS.new_rows(cls), *specs[part].row_shape))
                node: Node = append(part, new, n_rows, as_dtype(self.dtype))
                rows.append(node.reshape(n_rows, 1, -1) if stream.flat else node)
            pos, seq = (input(f"rows.{cls.name}.{what}", (n_rows,), "i32") for what in ("pos", "seq"))
            ids = input(f"ids.{stream.name}", (n_tokens, stream.n_ids), "i32") if stream.n_ids else None
            segments.append(Segment(*rows, pos=pos, seq=seq, window=stream.window, every=stream.every, ids=ids))
        y = flash_attn(
            input("q", (n_tokens, self.heads, self.d_k)),
            *segments,
            scale=self.d_k**-0.5,
            softcap=self.softcap,
            sinks=input("sinks", (self.heads,)) if self.sinks else None,
            pos=input("positions", (n_tokens,), "i32"),
            seq=input("seqs", (n_tokens,), "i32"),
            d_v=self.d_v,
        )
        return Graph(y=y)

    def store(self, slack: int = 16) -> StateStore:
        layouts = dict(self.layouts)
        return StateStore(self.specs, kv_dtype=as_dtype(self.dtype), slack=slack, layouts=layouts, initial_pages=1)

    def inputs(self, step: Step, rng: np.random.Generator) -> tuple[dict[str, Array], dict[str, int]]:
        """Random inputs of a step, and its extents. Listed rows are any of the batch, some twice, some places empty."""
        n_tokens = len(step.positions)
        names = [name for name in executable(self, "reference").plan.graph.inputs if name.split(".")[0] in GIVEN]
        given, dims = StepInputs(names)(step, np.zeros(n_tokens, np.int32), np.zeros(0, np.int32))
        given["q"] = rng.standard_normal((n_tokens, self.heads, self.d_k), np.float32) * 2
        if self.sinks:
            given["sinks"] = rng.standard_normal(self.heads, np.float32)
        for name, spec in self.specs.items():
            rows = len(step.classes[spec.stream_class].new)
            given[f"new.{name}"] = rng.standard_normal((rows, *spec.row_shape), np.float32)
        for stream in self.streams:
            if stream.n_ids:
                n_rows = len(step.classes[self.specs[stream.parts[0]].stream_class].seen)
                given[f"ids.{stream.name}"] = rng.integers(-1, n_rows, (n_tokens, stream.n_ids)).astype(np.int32)
        return given, dims


GIVEN = ("rows", "positions", "seqs")


@cache
def executable(attention: Attention, backend: str) -> Executable:
    return compile(attention.graph(), backend, CompileOptions(fuse=False, layouts=dict(attention.layouts))).bind()


@dataclass
class History:
    """Sequences of a store that grow in ragged batches, and are forked and trimmed on the way."""

    attention: Attention
    backend: str
    rng: np.random.Generator
    store: StateStore = field(init=False)
    seqs: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.store = self.attention.store()
        self.seqs = [self.store.new() for _ in range(2)]

    def go(self, n_steps: int) -> None:
        for _ in range(n_steps):
            change = self.rng.integers(0, 4)
            seq = self.rng.choice(self.seqs)
            if change == 0 and len(self.seqs) < 4:
                self.seqs.append(self.store.fork(seq))
            if change == 1:
                with suppress(CannotTrim):  # trimmed again and again, it is soon as short as what is kept allows
                    self.store.trim(seq, max(0, self.store.length(seq) - int(self.rng.integers(0, 16))))
            chosen = self.rng.permutation(self.seqs)[: self.rng.integers(1, 4)]
            room = EXTENTS.context - 1
            self.step({int(s): min(int(self.rng.integers(1, 21)), room - self.store.length(s)) for s in chosen})

    def step(self, counts: Mapping[int, int]) -> None:
        """Both backends compute one step; the one under test first, so that what it reads is what it wrote itself."""
        with self.store.begin(list(counts.items())) as step:
            inputs, dims = self.attention.inputs(step, self.rng)
            got = executable(self.attention, self.backend).run(inputs, state=step, dims=dims)["y"]
            held = {name: step.read(name) for name in self.store.specs}
            wanted = executable(self.attention, "reference").run(inputs, state=step, dims=dims)["y"]
            for name, rows in held.items():
                np.testing.assert_array_equal(rows, step.read(name), err_msg=name)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5, err_msg=f"{dict(counts)}")
            step.commit()
