"""index_top_k over state streams on the CPU, which reads neither positions nor sequences of their rows, against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dtypes import as_dtype
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.graph import Graph, append, input
from tensorgraph.ops.attention import index_top_k
from tensorgraph.plan import Executable
from tensorgraph.state import StateSpec
from tensorgraph.state_store import StateStore

EXTENTS = Extents(tokens=96, context=4096, sequences=4)
BACKENDS = ("cpu", "cpu:avx2", "cpu:baseline")


@dataclass(frozen=True)
class Index:
    """Keys [Di] of a stream with a row every so many tokens, and how many of its rows each token is to get."""

    heads: int
    width: int
    top_k: int
    every: int = 1
    dtype: str = "f16"

    @property
    def spec(self) -> StateSpec:
        return StateSpec((self.width,), as_dtype(self.dtype), self.every)

    def graph(self) -> Graph:
        cls, n_tokens = self.spec.stream_class, EXTENTS.new_tokens
        new = input("new", (EXTENTS.new_rows(cls), self.width))
        k = append("keys", new, EXTENTS.seen_rows(cls), as_dtype(self.dtype))
        rows = [input(f"rows.{cls.name}.{what}", (k.shape[0],), "i32") for what in ("pos", "seq")]
        own = [input(name, (n_tokens,), "i32") for name in ("positions", "seqs")]
        q, w = input("q", (n_tokens, self.heads, self.width)), input("w", (n_tokens, self.heads))
        return Graph({"y": index_top_k(q, k, w, *own, *rows, top_k=self.top_k, every=self.every)}, effects=[k])


CASES = {
    "one head": Index(1, 32, 5),
    "some heads": Index(5, 33, 9, dtype="f32"),
    "blocks of four": Index(16, 64, 7, every=4, dtype="bf16"),
    "many heads": Index(64, 128, 20),
    "coded": Index(9, 64, 6, every=4, dtype="q8_0"),
}


@cache
def executable(index: Index, backend: str) -> Executable:
    return compile(index.graph(), backend, CompileOptions(fuse=False)).bind()


def both(index: Index, store: StateStore, counts: dict[int, int], rng: np.random.Generator, backend: str, strange: bool) -> None:
    """A step of both backends, which must select the same rows; `strange`: some tokens' sequences are not in the batch."""
    with store.begin(list(counts.items())) as step:
        n_tokens = len(step.positions)
        names = [n for n in executable(index, "reference").plan.graph.inputs if n.split(".")[0] in ("rows", "positions", "seqs")]
        given, dims = StepInputs(names)(step, np.zeros(n_tokens, np.int32), np.zeros(0, np.int32))
        # whole numbers: products are exact in any order, and ties are many
        given["q"] = rng.integers(-2, 3, (n_tokens, index.heads, index.width)).astype(np.float32)
        given["w"] = rng.integers(-1, 4, (n_tokens, index.heads)).astype(np.float32)
        given["new"] = rng.integers(-1, 2, (len(step.classes[index.spec.stream_class].new), index.width)).astype(np.float32)
        if index.dtype == "q8_0":  # so that its scale is a power of two
            given["new"][:, ::32] = 127 / 128
        if strange:
            given["seqs"] = given["seqs"].copy()
            given["seqs"][::3] = rng.choice([-1, len(counts), 1 << 30], len(given["seqs"][::3]))
        got, wanted = (executable(index, b).run(given, state=step, dims=dims)["y"] for b in (backend, "reference"))
        np.testing.assert_array_equal(got, wanted, err_msg=f"{counts}")
        assert strange or (got >= 0).sum() >= min(index.top_k, max(step.positions + 1) // index.every)
        step.commit()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_same_rows(name: str, backend: str) -> None:
    """Few tokens and many, one sequence and several, from the first token on; top_k is far below the number of rows."""
    index, rng = CASES[name], np.random.default_rng(sorted(CASES).index(name))
    store = StateStore({"keys": index.spec}, kv_dtype=as_dtype("f16"), initial_pages=1)
    a, b, c = store.new(), store.new(), store.new()
    batches = ({a: 1}, {a: 1, b: 2}, {a: 90}, {c: 3, a: 7, b: 80}, {b: 1}, {a: 1, b: 1, c: 1}, {c: 96})
    for turn, counts in enumerate((*batches, *batches)):
        both(index, store, counts, rng, backend, strange=turn in (5, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_are_scored_at_once(backend: str) -> None:
    index, rng = Index(4, 16, 40), np.random.default_rng(1)
    store = StateStore({"keys": index.spec}, kv_dtype=as_dtype("f16"), initial_pages=1)
    a, b = store.new(), store.new()
    for counts in (*[{a: 96}, {b: 96}] * 15, {a: 5, b: 3}, {a: 70}, {b: 1}):
        both(index, store, counts, rng, backend, strange=False)


def test_positions_and_sequences_of_rows_are_not_read() -> None:
    index = CASES["many heads"]
    assert not [name for name in executable(index, "cpu").needed if name.startswith("rows.")]
    assert [name for name in executable(index, "reference").needed if name.startswith("rows.")]
