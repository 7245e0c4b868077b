"""flash_attn on kernels of CUDA's over state streams, which it reads where they lie in the device's pages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Graph, append, input
from tensorgraph.ops.attention import Segment, flash_attn
from tensorgraph.plan import Executable
from tensorgraph.state_store import StateStore
from tests.backends.cpu import attention_streams
from tests.backends.cpu.attention_streams import Attention, History, Stream
from tests.backends.cpu.test_attention_streams import CASES as STREAMS
from tests.backends.cuda import where
from tests.backends.cuda.test_attention import EXACT, UNIT, device, executable, rounded

pytestmark = pytest.mark.usefixtures("machine")


class Steps(History):
    """Steps in both ways, of numbers that rounding does not change; pages are the device's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        specs, kv_dtype = self.attention.specs, as_dtype(self.attention.dtype)
        self.store = StateStore(specs, kv_dtype=kv_dtype, slack=16, initial_pages=1, zeros=dict.fromkeys(specs, device().zeros))
        self.seqs = [self.store.new() for _ in range(2)]

    def step(self, counts: Mapping[int, int]) -> None:
        with self.store.begin(list(counts.items())) as step:
            given, dims = self.attention.inputs(step, self.rng)
            dtype = self.attention.dtype
            inputs = {name: rounded(x, dtype) if x.dtype == np.float32 else x for name, x in given.items()}
            found = {exact: of_streams(self.attention, exact).run(inputs, state=step, dims=dims)["y"] for exact in (False, True)}
            held = {name: np.array(step.read(name)) for name in self.store.specs}
            wanted = attention_streams.executable(self.attention, "reference").run(inputs, state=step, dims=dims)["y"]
            for name, rows in held.items():
                np.testing.assert_array_equal(rows, step.read(name), err_msg=name)
            most = max((float(np.abs(rows.astype(float)).max(initial=0)) for rows in held.values()), default=0)
            for exact, y in found.items():
                bound = (EXACT if exact else UNIT[dtype] + EXACT) * most
                np.testing.assert_allclose(y, wanted, rtol=0, atol=bound, err_msg=f"{exact=} {dict(counts)}")
            step.commit()


@cache
def of_streams(attention: Attention, exact: bool) -> Executable:
    return executable(attention.graph(), exact)


@pytest.mark.parametrize("name", ["segments", "latent", "heads and values", "groups"])
def test_streams(name: str) -> None:
    attention = STREAMS[name] if name != "groups" else Attention((Stream("kv", window=20),), d_k=64, d_v=64, heads=6)
    device().set_threads(1)
    Steps(attention, where.NAME, np.random.default_rng(4)).go(7)


def test_rows_are_read_in_place() -> None:
    """Then positions and sequences of rows follow from the store's tables: the inputs are not read."""
    run = of_streams(STREAMS["segments"], False)
    assert run.needed and not [name for name in run.needed if name.startswith("rows.")]


@pytest.mark.parametrize("kept", [False, True])
def test_rows_of_all_sequences(kept: bool) -> None:
    """What is not told apart by a stream's own positions and sequences: each row is looked for, in a copy where keys are kept."""
    attention = Attention((Stream("kv"),), d_k=40, d_v=24, heads=4, kv_heads=2)
    tokens, n_rows, shapes = Dim("T", 64), Dim("S", 192), {name: spec.row_shape for name, spec in attention.specs.items()}
    rows = [append(name, input(f"new.{name}", (tokens, *row)), n_rows, as_dtype("f16")) for name, row in shapes.items()]
    mask, q = input("mask", (tokens, n_rows)), input("q", (tokens, 4, 40))
    y = flash_attn(q, Segment(*rows, mask=mask), Segment(*rows, ids=input("ids", (tokens, 5), "i32")), scale=0.1)
    graph, rng = Graph(y=y, **({"k": rows[0]} if kept else {})), np.random.default_rng(0)
    device().set_threads(0)
    history = Steps(attention, where.NAME, rng)
    history.seqs += [history.store.new() for _ in range(3)]
    runs = [executable(graph, exact) for exact in (False, True)]
    wanted = compile(graph, "reference", CompileOptions(fuse=False)).bind()
    for counts in ((17, 3, 16, 0, 1), (1, 0, 1, 5, 16)):
        with history.store.begin([*zip(history.seqs, counts, strict=True)]) as step:
            n, total = len(step.positions), len(step.classes[attention.specs["kv.k"].stream_class].seen)
            given = {f"new.{name}": rounded(rng.standard_normal((n, *row)), "f16") for name, row in shapes.items()}
            given["q"] = rounded(rng.standard_normal((n, 4, 40)), "f16")
            given["ids"] = rng.integers(-1, total, (n, 5)).astype(np.int32)
            given["mask"] = np.where(rng.random((n, total)) < 0.4, -np.inf, 0).astype(np.float32)
            found = [run.run(given, state=step, dims={"T": n, "S": total})["y"] for run in runs]
            y = wanted.run(given, state=step, dims={"T": n, "S": total})["y"]
            step.commit()
        np.testing.assert_allclose(found[0], y, rtol=0, atol=5 * (UNIT["f16"] + EXACT))
        np.testing.assert_allclose(found[1], y, rtol=0, atol=5 * EXACT)


@pytest.mark.parametrize("name", ["segments", "latent"])
def test_a_sequence_that_is_not_in_the_batch_sees_nothing(name: str) -> None:
    attention = STREAMS[name]
    history = Steps(attention, where.NAME, np.random.default_rng(1))
    with history.store.begin([(seq, 20) for seq in history.seqs]) as step:
        inputs, dims = attention.inputs(step, history.rng)
        inputs["seqs"] = inputs["seqs"].copy()
        inputs["seqs"][[3, 21, 39]] = -1, 2, 1 << 30
        for exact in (False, True):
            y = of_streams(attention, exact).run(inputs, state=step, dims=dims)["y"]
            assert not y[[3, 21, 39]].any() and y[[4, 20, 38]].any(axis=(1, 2)).all()
