"""Row programs that write streams and read them whole, that go over heads, and that take in their neighbours."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.backends.cpu.row_programs import emit_row_program
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError, StateError
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.graph import Graph, Node, append, constant, input
from tensorgraph.ops import block_pool, concat, fwht, l1_norm, mul_mat, rms_norm, rope_table, rotate, silu, soft_max, sum_rows
from tensorgraph.plan import Executable
from tensorgraph.state import StateSpec
from tensorgraph.state_store import StateStore
from tests.backends.cpu.test_row_programs import BACKENDS, Noted, assert_same, numbers, programs

Array = np.ndarray[Any, Any]
EXTENTS = Extents(tokens=64, context=256, sequences=3)
T = Dim("T", 300)
W = 32


@cache
def specs(dtype: str, every: int, overlap: bool) -> dict[str, StateSpec]:
    keep = every * (2 if overlap else 1)
    return {
        "near": StateSpec((W,), as_dtype(dtype), keep=16),
        "parts": StateSpec((2, 2 * W if overlap else W), as_dtype("f32"), keep=keep),
        "rows": StateSpec((W,), as_dtype(dtype), every=every),
    }


def compressor(dtype: str, every: int, overlap: bool, read: bool) -> Graph:
    """What DeepSeek V4's compressors do: a normed row and two vectors a token, and of each block a row. Where `read`, the rows of
    the window are also wanted in one piece."""
    held, wide = specs(dtype, every, overlap), 2 * W if overlap else W
    classes = {name: spec.stream_class for name, spec in held.items()}
    x = mul_mat(constant("mix", shape=(3 * wide, 16)), input("x", (EXTENTS.new_tokens, 16)))

    def rows(name: str, new: Node) -> Node:
        spec = held[name]
        return append(name, new, EXTENTS.seen_rows(classes[name]), spec.stored_dtype(as_dtype("f16")))

    near = rows("near", rms_norm(x[:, 2 * wide : 2 * wide + W], constant("norm", shape=(W,)), eps=1e-6))
    both = concat(silu(x[:, :wide]).reshape(-1, 1, wide), (x[:, wide : 2 * wide] * 2.0).reshape(-1, 1, wide), axis=1)
    seen = rows("parts", both)
    pos, seq = (input(f"rows.{classes['parts'].name}.{what}", (seen.shape[0],), "i32") for what in ("pos", "seq"))
    n_new = EXTENTS.new_rows(classes["rows"])
    new, of = (input(f"rows.{classes['rows'].name}.{what}", (n_new,), "i32") for what in ("new", "new_seq"))
    pooled = block_pool(seen, constant("bias", shape=(every, wide)), pos, seq, new, of, every=every, overlap=overlap)
    row = fwht(rms_norm(pooled, eps=1e-6))
    done = rows("rows", row)
    outputs = {"pooled": sum_rows(row)} | ({"near": near + 0.0} if read else {})
    return Graph(outputs, effects=[near, seen, done])


@cache
def executable(backend: str, *case: Any) -> Executable:
    wide = 2 * W if case[2] else W
    weights = {"norm": numbers(W, seed=5), "bias": numbers(case[1], wide, seed=6), "mix": numbers(3 * wide, 16, seed=7)}
    return compile(compressor(*case), backend).bind(weights.__getitem__)


@pytest.mark.parametrize(
    "case", [("f16", 4, True, False), ("f32", 4, True, True), ("bf16", 16, False, True), ("q8_0", 4, False, False)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compressed_rows(backend: str, case: tuple[str, int, bool, bool]) -> None:
    """Two calls, of tokens and of blocks; in ragged batches of sequences, block by block, all rows are the reference's."""
    device = Noted(backend)
    compile(compressor(*case), device)
    found = [[node.op for node in call.nodes] for call in device.calls if call.emit is emit_row_program]
    assert [sorted(ops) for ops in found] == [
        ["append", "append", "concat", "rms_norm", "scale", "silu"],
        ["append", "block_pool", "fwht", "rms_norm", "sum_rows"],
    ]
    held, rng = specs(*case[:3]), np.random.default_rng(len(backend) + case[1])
    store = StateStore(held, kv_dtype=as_dtype("f16"), slack=16, initial_pages=1)
    seqs = [store.new() for _ in range(3)]
    for turn in range(14):
        chosen = rng.permutation(seqs)[: rng.integers(1, 4)]
        with store.begin([(int(s), int(rng.integers(1, 12))) for s in chosen]) as step:
            n = len(step.positions)
            inputs = StepInputs(executable("reference", *case).plan.graph.inputs)
            given, dims = inputs(step, np.zeros(n, np.int32), np.zeros(0, np.int32))
            given["x"] = numbers(n, 16, seed=turn)
            got = executable(backend, *case).run(given, state=step, dims=dims)
            kept = {name: step.read(name) for name in held}
            wanted = executable("reference", *case).run(given, state=step, dims=dims)
            for name, rows in kept.items():
                near = {"f16": 2e-3, "bf16": 2e-2, "q8_0": 3e-2}.get(str(held[name].dtype), 1e-5)  # a step of its rounding
                np.testing.assert_allclose(rows, step.read(name), rtol=near, atol=near, err_msg=f"{turn} {name}")
            np.testing.assert_allclose(got["pooled"], wanted["pooled"], rtol=0, atol=1e-4)
            if case[3]:
                np.testing.assert_array_equal(got["near"], kept["near"])
            step.commit()
    assert len(kept["rows"]) > 0


def test_a_block_that_is_not_there_is_refused() -> None:
    case = ("f16", 4, True, False)
    store = StateStore(specs(*case[:3]), kv_dtype=as_dtype("f16"), slack=16, initial_pages=1)
    with store.begin([(store.new(), 5)]) as step:
        for backend in ("cpu", "reference"):
            given, dims = StepInputs(executable(backend, *case).plan.graph.inputs)(
                step, np.zeros(5, np.int32), np.zeros(0, np.int32)
            )
            given |= {"x": numbers(5, 16), "rows.4.new": np.array([1], np.int32)}
            with pytest.raises(StateError if backend == "reference" else InputError, match="position 5 of sequence 0"):
                executable(backend, *case).run(given, state=step, dims=dims)


def heads_graph(draw: Any) -> tuple[Graph, dict[str, Array]]:
    """A chain over vectors of heads, too many elements a token for a row."""
    h, d = draw(st.sampled_from([(3, 2048), (64, 128), (16, 512), (4096 // 64 + 1, 64)]))
    x, w = input("x", (T, h * d)), constant("w", shape=(d,))
    table = rope_table(input("pos", (T,), "i32"), n_dims=32)
    value: Node = x.reshape(T, h, d)
    token, head, each = input("token", (T, 1, d)), input("head", (T, h, 1)), constant("each", shape=(h, 1))
    twice, crossed = input("twice", (T, h, 2 * d)), input("crossed", (T, h, 2, d // 2)).permute(0, 1, 3, 2).reshape(T, h, d)
    which = draw(st.integers(0, h - 1))
    steps = [
        lambda v: rms_norm(v, w, eps=1e-6),
        lambda v: l1_norm(v, eps=1e-6),
        lambda v: rotate(v, table, n_dims=32, offset=d - 32),
        lambda v: rotate(v, table, n_dims=32, layout="half_split"),
        fwht,
        soft_max,
        lambda v: v * token,
        lambda v: v + head,
        lambda v: v * each,
        lambda v: v * w,
        silu,
        lambda v: v + x.reshape(T, h, d),
        lambda v: v * twice[:, :, ::2],
        lambda v: v + twice[:, :, d // 2 : d // 2 + d],
        lambda v: v + crossed,
        lambda v: v * twice[:, which : which + 1, 7:8].broadcast(T, 1, d),
        lambda v: v * v[:, which : which + 1],
        lambda v: v + v[:, :, which : which + 1],
        lambda v: v.reshape(T, h, 2, d // 2).permute(0, 1, 3, 2).reshape(T, h, d),
    ]
    seen = []
    for step in draw(st.lists(st.sampled_from(steps), min_size=2, max_size=7)):
        value = step(value)
        seen.append(value)
    outputs = {"y": value} | ({"z": draw(st.sampled_from(seen)) * 2.0} if draw(st.booleans()) else {})
    n = draw(st.sampled_from([0, 1, 3, 40]))
    arrays = {"x": numbers(n, h * d), "pos": np.arange(n, dtype=np.int32) * 7, "token": numbers(n, 1, d, seed=1)}
    arrays |= {"twice": numbers(n, h, 2 * d, seed=5), "crossed": numbers(n, h, 2, d // 2, seed=6)}
    arrays |= {"head": numbers(n, h, 1, seed=2), "each": numbers(h, 1, seed=3), "w": numbers(d, seed=4)}
    return Graph(outputs), arrays


@settings(deadline=None, max_examples=40)
@given(data=st.data(), backend=st.sampled_from(BACKENDS))
def test_rows_of_heads(data: Any, backend: str) -> None:
    assert_same(*heads_graph(data.draw), backend)


X = input("x", (T, 16 * 1024)).reshape(T, 16, 1024)
Q = rms_norm(X, eps=1e-6)


@pytest.mark.parametrize(
    "y",
    [
        silu(rms_norm(X[:, :, ::2], eps=1e-6)),
        silu(rms_norm(X.reshape(T, 16, 32, 32).permute(0, 1, 3, 2), eps=1e-6)),
        silu(rms_norm(X.reshape(T, 16, 4, 256)[:, :, :, :128], eps=1e-6)),
        silu(Q * X[:, 5:6, 7:8].broadcast(T, 1, 1024)),
        Q * Q[:, 0:1],
        silu(Q) * Q[:, 3:4] + 1.0,
        fwht(silu(Q) * silu(Q)[:, 3:4]),
        rotate(Q, Q[:, 2, :32].reshape(T, 16, 2), n_dims=32),
        rotate(Q, X[:, 3, :32].reshape(T, 2, 16).permute(0, 2, 1), n_dims=32),
    ],
    ids=range(9),
)
def test_parts_of_heads_and_other_heads(y: Node) -> None:
    assert_same(Graph(y=y), {"x": numbers(9, 16 * 1024)})


def test_heads_are_one_program() -> None:
    """With those of the indexer, whose heads are as many."""
    x, table = input("x", (T, 64 * 512)), rope_table(input("pos", (T,), "i32"), n_dims=64)
    q = rotate(rms_norm(x.reshape(T, 64, 512), eps=1e-6), table, n_dims=64, offset=448)
    other = fwht(rotate(input("z", (T, 64 * 128)).reshape(T, 64, 128), table, n_dims=64, offset=64))
    (found,) = programs(Graph(q=q, other=other))
    assert sorted(found) == ["fwht", "rms_norm", "rotate", "rotate"]
    arrays = {"x": numbers(5, 64 * 512), "z": numbers(5, 64 * 128, seed=1), "pos": np.arange(5, dtype=np.int32)}
    assert_same(Graph(q=q, other=other), arrays)


def test_neighbours_are_taken_in_but_not_in_a_circle() -> None:
    """What reads the same value is one program, unless one of them needs the other through something else."""
    x, w = input("x", (T, 64)), input("w", (24, 64))
    mixed = mul_mat(w, x)
    a, b = sum_rows(soft_max(mixed[:, :8])), l1_norm(mixed[:, 8:], eps=1e-6) * 2.0
    arrays = {"x": numbers(9, 64), "w": numbers(24, 64, seed=1), "v": numbers(7, 16, seed=2), "u": numbers(24, 7, seed=3)}
    assert [sorted(ops) for ops in programs(Graph(a=a, b=b))] == [["l1_norm", "scale", "soft_max", "sum_rows"]]
    assert_same(Graph(a=a, b=b), arrays)
    again = mul_mat(input("u", (24, 7)), mul_mat(input("v", (7, 16)), b))  # needs b, and is read beside mixed
    c = soft_max(again + mixed) * sum_rows(mixed)
    graph = Graph(a=a, b=b, c=c)
    found = programs(graph)
    assert sum("l1_norm" in ops for ops in found) == 1 and not any(
        "l1_norm" in ops and ops.count("soft_max") == 2 for ops in found
    )
    assert_same(graph, arrays)


@settings(deadline=None, max_examples=40)
@given(
    n=st.sampled_from([0, 1, 2, 5, 33]),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 5), st.sampled_from([1, 7, 16, 100, 5000])),
    shared=st.booleans(),
    dtype=st.sampled_from(["f32", "f16"]),
    backend=st.sampled_from(BACKENDS),
)
def test_sums_of_a_few_products(n: int, sizes: tuple[int, int, int], shared: bool, dtype: str, backend: str) -> None:
    """Of rows that lie side by side, with what follows them in one call."""
    width, rows, height = sizes
    streams = input("x", (1 if shared else T, width, height), dtype)
    y = mul_mat(streams.permute(0, 2, 1), input("b", (T, rows, width))) + input("c", (T, rows, 1))
    device = Noted(backend)
    compile(Graph(y=y), device)
    assert [[node.op for node in call.nodes] for call in device.calls] == [["mul_mat", "add"]]
    arrays = {"b": numbers(n, rows, width), "c": numbers(n, rows, 1, seed=1)}
    arrays["x"] = numbers(1 if shared else n, width, height, seed=2).astype(as_dtype(dtype).numpy)
    plans = [compile(Graph(y=y), b, CompileOptions(fuse=b != "reference")).bind() for b in (backend, "reference")]
    got, wanted = (plan.run({name: arrays[name] for name in plan.plan.graph.inputs}, dims={"T": n})["y"] for plan in plans)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
