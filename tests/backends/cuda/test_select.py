"""top_k, argsort and index_top_k on kernels of CUDA's against the reference, in each form and for rows that end anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim, Extent
from tensorgraph.dtypes import as_dtype, f16
from tensorgraph.extents import StepInputs
from tensorgraph.graph import Graph, input
from tensorgraph.ops.attention import index_top_k, index_top_k_cuda
from tensorgraph.ops.select import argsort, top_k
from tensorgraph.plan import Executable
from tensorgraph.state_store import StateStore
from tests.backends.cpu.test_index_streams import Index
from tests.backends.cuda import where

Array = NDArray[Any]
pytestmark = pytest.mark.usefixtures("machine")
T, S = Dim("T", 80), Dim("S", 70001)
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-310, -1e-42, 1e-5, -1e38]
SCHEDULES = (0, 1, 7)


@cache
def device() -> CudaDevice:
    return where.device()


def executable(graph: Graph, *, exact: bool = False) -> Executable:
    return compile(graph, device(), CompileOptions(fuse=False, exact=exact)).bind()


def launched(run: Executable, **dims: int) -> list[str]:
    """The functions of a step's launches."""
    calls = [call for groups in run.plan.groups for group in groups for call in getattr(group, "calls", ())]
    return [call.emit.function.partition("<")[0] for call in calls if call.guard.holds(dims)]


def rows(shape: tuple[int, int], kind: str, dtype: str) -> Array:
    """Numbers in no order, rising or falling ones, few different ones, all alike, -inf nearly everywhere, or special ones."""
    rng = np.random.default_rng(shape)
    x = rng.standard_normal(shape)
    if kind == "rising":
        x = np.sort(x, -1)
    elif kind == "falling":
        x = np.sort(x, -1)[:, ::-1]
    elif kind == "ties":
        x = np.maximum(np.round(x), 0)
    elif kind == "alike":
        x = 3 + 0 * x
    elif kind == "hidden":
        x = np.where(rng.random(shape) < 0.97, -np.inf, np.round(x, 1))
    elif kind == "special":
        x = np.where(rng.random(shape) < 0.5, rng.choice(SPECIAL, shape), x)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x.astype(as_dtype(dtype).numpy))


def check(run: Executable, x: Array, name: str, **attrs: Any) -> None:
    """In several orders of a block's threads."""
    wanted = {"top_k": top_k, "argsort": argsort}[name].compute({"x": x.astype(np.float64)}, attrs)
    for schedule in SCHEDULES[:1] if x.size > 20000 else SCHEDULES:
        device().set_threads(schedule)
        got = run.run({"x": x})["y"]
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted)


@cache
def selection(dtype: str, k: int) -> Executable:
    return executable(Graph(y=top_k(input("x", (T, S), dtype), k=k)))


LENGTHS = [(0, "random"), (1, "special"), (37, "ties"), (2048, "random"), (2049, "special"), (4099, "falling"), (16384, "hidden")]
LENGTHS += [(16385, "rising"), (20000, "ties"), (70001, "random")]


@pytest.mark.parametrize(("n", "kind"), LENGTHS)
@pytest.mark.parametrize("k", [7, 2048])
def test_top_k_of_few_rows(n: int, kind: str, k: int) -> None:
    """By a block for each row, or by several."""
    check(selection("f32", k), rows((2, n), kind, "f32"), "top_k", k=k)


@pytest.mark.parametrize(("n", "kind"), [(0, "random"), (33, "special"), (2100, "rising"), (4099, "ties")])
def test_top_k_of_many_rows(n: int, kind: str) -> None:
    check(selection("f32", 7), rows((70, n), kind, "f32"), "top_k", k=7)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
@pytest.mark.parametrize(("n", "kind"), [(5, "special"), (5001, "rising"), (17001, "special"), (18000, "hidden")])
def test_top_k_of_other_types(dtype: str, n: int, kind: str) -> None:
    check(selection(dtype, 300), rows((1, n), kind, dtype), "top_k", k=300)


def test_top_k_where_a_list_of_what_is_nearly_alike_has_no_room() -> None:
    x = rows((2, 40001), "alike", "f32")
    x[0, ::3] += np.arange(0, len(x[0, ::3])) * 2.0**-22 * 3  # the same sign, exponent and first bits
    x[1, 5::4000] = 9
    for k in (7, 2048):
        check(selection("f32", k), x, "top_k", k=k)


@pytest.mark.parametrize(("dtype", "most"), [("f32", 1024), ("f64", 1024), ("bf16", 256)])
def test_top_k_of_experts(dtype: str, most: int) -> None:
    """By a warp for each row."""
    run = executable(Graph(y=top_k(input("x", (T, Dim("N", most)), dtype), k=8)))
    for n, kind in ((0, "random"), (1, "alike"), (most - 1, "ties"), (most, "special"), (64, "hidden"), (256, "random")):
        check(run, rows((9, n), kind, dtype), "top_k", k=8)


def test_top_k_of_more_than_there_is_room_for() -> None:
    """By a sort, of the whole row or of pieces of it."""
    run = executable(Graph(y=top_k(input("x", (T, Dim("N", 9000))), k=4999)))
    for n, kind in ((0, "random"), (3, "special"), (4096, "hidden"), (4097, "ties"), (9000, "special")):
        check(run, rows((2, n), kind, "f32"), "top_k", k=4999)


def test_rows_with_other_strides() -> None:
    """Columns of a matrix, and rows that begin at any address."""
    n = Dim("N", 20000)
    columns = executable(Graph(y=top_k(input("x", (n, T)).permute(1, 0), k=40)))
    shifted = executable(Graph(y=top_k(input("x", (T, n), "f16").slice(1, 3, n), k=40)))
    ordered = executable(Graph(y=argsort(input("x", (n, T)).permute(1, 0), descending=False)))
    for length in (77, 4500, 20000):
        x = rows((length, 3), "ties", "f32")
        wanted = top_k.compute({"x": x.T}, {"k": 40})
        np.testing.assert_array_equal(columns.run({"x": x})["y"], wanted)
        np.testing.assert_array_equal(ordered.run({"x": x})["y"], argsort.compute({"x": x.T}, {"descending": False}))
        y = rows((3, length), "special", "f16")
        np.testing.assert_array_equal(shifted.run({"x": y})["y"], top_k.compute({"x": y[:, 3:].astype(float)}, {"k": 40}))


@cache
def order(dtype: str, descending: bool) -> Executable:
    return executable(Graph(y=argsort(input("x", (T, S), dtype), descending=descending)))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_argsort(dtype: str, descending: bool) -> None:
    lengths = [(0, "random"), (1, "special"), (2, "rising"), (999, "special"), (2049, "ties"), (4099, "special"), (20001, "ties")]
    for n, kind in lengths:
        check(order(dtype, descending), rows((3, n), kind, dtype), "argsort", descending=descending)


def test_argsort_of_a_long_row() -> None:
    check(order("f32", True), rows((1, 70001), "special", "f32"), "argsort", descending=True)


# index_top_k, its keys a tensor.

TOKENS, ROWS = Dim("T", 40), Dim("S", 3000)
SCORED = {"f16 64": ("f16", 5, 64), "bf16 96": ("bf16", 17, 96), "f16 256": ("f16", 3, 256), "f32 20": ("f32", 70, 20)}


def slots_of(name: str, tokens: Dim, rows: Dim) -> dict[str, tuple[tuple[Extent, ...], str]]:
    dtype, heads, width = SCORED[name]
    slots: dict[str, tuple[tuple[Extent, ...], str]] = {"q": ((tokens, heads, width), "f32"), "k": ((rows, width), dtype)}
    slots |= {"w": ((tokens, heads), "f32")}
    return slots | {f"{a}_{b}": ((n,), "i32") for a, n in (("q", tokens), ("k", rows)) for b in ("pos", "seq")}


@cache
def indexer(name: str, k: int, every: int, form: str, exact: bool) -> Executable:
    """`form`: which of the ways is taken, by other limits between them."""
    slots = slots_of(name, TOKENS, ROWS)
    limits = {"written": (64, 1 << 21, 16384), "divided": (64, 1 << 21, 100), "parts": (64, 1, 16384), "at once": (0, 1, 16384)}
    with pytest.MonkeyPatch.context() as patch:
        for limit, value in zip(("FEW", "SCORES", "LONG"), limits[form], strict=True):
            patch.setattr(index_top_k_cuda, limit, value)
        node = index_top_k(*(input(slot, *about) for slot, about in slots.items()), top_k=k, every=every)
        run = executable(Graph(y=node), exact=exact)
        run.run(indexed(name, 1, 1, every))  # which builds its launches
    return run


def indexed(name: str, n_tokens: int, n_rows: int, every: int) -> dict[str, Array]:
    """Whole numbers, so that scores are exact in any order, with many ties; rows of three sequences mixed."""
    dtype, heads, width = SCORED[name]
    rng = np.random.default_rng(n_rows)
    k_seq = rng.integers(0, 3, n_rows)
    k_pos = np.array([np.sum(k_seq[:i] == s) for i, s in enumerate(k_seq)], int)
    mixed = rng.permutation(n_rows)
    given: dict[str, Array] = {"q": rng.integers(-1, 2, (n_tokens, heads, width)).astype(np.float32)}
    given["k"] = rng.integers(-1, 2, (n_rows, width)).astype(as_dtype(dtype).numpy)
    given["w"] = rng.integers(-1, 4, (n_tokens, heads)).astype(np.float32)
    given |= {"q_pos": rng.integers(0, n_rows * every + 2, n_tokens), "q_seq": rng.integers(0, 4, n_tokens)}
    given |= {"k_pos": k_pos[mixed], "k_seq": k_seq[mixed]}
    return {slot: x.astype(np.int32) if "_" in slot else x for slot, x in given.items()}


def compare(run: Executable, given: Mapping[str, Array], k: int, every: int) -> None:
    wide = {slot: x if "_" in slot else x.astype(np.float64) for slot, x in given.items()}
    wanted = index_top_k.compute(wide, {"top_k": k, "every": every})
    for schedule in SCHEDULES:
        device().set_threads(schedule)
        np.testing.assert_array_equal(run.run(given)["y"], wanted)


@pytest.mark.parametrize("form", ["written", "divided", "parts", "at once"])
@pytest.mark.parametrize(("name", "k", "exact"), [("f16 64", 30, False), ("f32 20", 30, False), ("f16 64", 300, True)])
def test_the_same_rows(name: str, k: int, exact: bool, form: str) -> None:
    every = 4 if k == 300 else 1
    for n_tokens, n_rows in ((0, 5), (2, 0), (1, 1), (3, 129), (2, 256), (1, 700), (2, 2500)):
        compare(indexer(name, k, every, form, exact), indexed(name, n_tokens, n_rows, every), k, every)


@pytest.mark.parametrize("name", ["bf16 96", "f16 256"])
def test_rows_of_other_widths(name: str) -> None:
    for form in ("written", "at once"):
        for n_tokens, n_rows in ((1, 63), (2, 257)):
            compare(indexer(name, 20, 1, form, False), indexed(name, n_tokens, n_rows, 1), 20, 1)


@pytest.mark.parametrize("exact", [False, True])
def test_scores_that_are_not_finite(exact: bool) -> None:
    """NaN and -inf are never selected; heads that only fill up a tile add nothing."""
    for form in ("written", "at once"):
        given = indexed("f16 64", 3, 700, 1)
        given["k"][5::50] = [[np.inf], [np.nan], [-np.inf], [np.inf], [1], [-1], [0], [0], [0], [0], [np.inf], [0], [0], [np.inf]]
        given["q"][0], given["q_pos"], given["q_seq"] = 1, np.full(3, 700, np.int32), np.arange(3, dtype=np.int32)
        with np.errstate(invalid="ignore"):
            compare(indexer("f16 64", 30, 1, form, exact), given, 30, 1)


def test_keys_that_do_not_lie_at_multiples_of_16_bytes() -> None:
    slots = {slot: input(slot, *about) for slot, about in slots_of("f16 64", TOKENS, ROWS).items()}
    slots["k"] = input("k", (ROWS, 67), "f16")[:, 3:]
    run = executable(Graph(y=index_top_k(*slots.values(), top_k=9)))
    given = indexed("f16 64", 2, 300, 1)
    wanted = index_top_k.compute({n: x if "_" in n else x.astype(float) for n, x in given.items()}, {"top_k": 9, "every": 1})
    given["k"] = np.pad(given["k"], ((0, 0), (3, 0)), constant_values=9)
    np.testing.assert_array_equal(run.run(given)["y"], wanted)


def test_launches_of_a_step() -> None:
    """What goes one after another in each form."""
    run = selection("f32", 7)
    divided = ["top_k_clear", "top_k_count", "top_k_choose"]
    assert [launched(run, T=t, S=s) for t, s in ((1, 16384), (64, 16385), (65, 70001))] == [
        ["top_k_of_blocks"],
        divided,
        ["top_k_of_blocks"],
    ]
    forms = {"written": ["index_scores", "index_choice"], "divided": ["index_scores", "index_count", "index_choose"]}
    forms |= {"parts": ["index_best", "index_merge"], "at once": ["index_best"]}
    for form, functions in forms.items():
        assert launched(indexer("f16 64", 30, 1, form, False), T=2, S=2500) == functions
    slots = [input(slot, *about) for slot, about in slots_of("f16 64", Dim("T", 512), Dim("S", 1 << 20)).items()]
    run = executable(Graph(y=index_top_k(*slots, top_k=2048)))
    steps = ((1, 4000, "written"), (1, 1 << 20, "divided"), (64, 16384, "written"), (64, 40000, "parts"), (65, 40000, "at once"))
    assert all(launched(run, T=t, S=s) == forms[form] for t, s, form in steps)


# index_top_k, its keys a stream whose rows are read where they lie.

STREAMS = {
    "f16": Index(5, 64, 9),
    "blocks of four, bf16": Index(16, 96, 7, every=4, dtype="bf16"),
    "f32": Index(3, 33, 40, dtype="f32"),
}


WRITTEN, PARTS, AT_ONCE = (64, 1 << 21), (8, 1), (0, 1)


@pytest.mark.parametrize(
    ("name", "limits", "exact"),
    [("f16", WRITTEN, False), ("f16", PARTS, True), ("blocks of four, bf16", AT_ONCE, False), ("f32", WRITTEN, False)],
)
def test_rows_of_streams(name: str, limits: tuple[int, int], exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence and several, from the first token on; at last, tokens whose sequence is not in the batch."""
    for limit, value in zip(("FEW", "SCORES"), limits, strict=True):
        monkeypatch.setattr(index_top_k_cuda, limit, value)
    index, rng = STREAMS[name], np.random.default_rng(len(name))
    run = executable(index.graph(), exact=exact)
    assert not [needed for needed in run.needed if needed.startswith("rows.")]
    on_cpu = StateStore({"keys": index.spec}, kv_dtype=f16, initial_pages=1)
    on_device = StateStore({"keys": index.spec}, kv_dtype=f16, initial_pages=1, zeros={"keys": device().zeros})
    a, b, c = (on_cpu.new() for _ in range(3))
    assert (a, b, c) == tuple(on_device.new() for _ in range(3))
    for turn, counts in enumerate(
        ({a: 1}, {a: 1, b: 2}, {a: 90}, {c: 3, a: 7, b: 80}, {b: 1}, {a: 1, b: 1, c: 1}, {c: 96}, {a: 5, c: 20})
    ):
        given, dims = step_inputs(index, on_cpu, counts, rng, strange=turn == 7)
        device().set_threads(turn)
        with on_cpu.begin(list(counts.items())) as step:
            wanted = reference(index).run(given, state=step, dims=dims)["y"]
            step.commit()
        with on_device.begin(list(counts.items())) as step:
            np.testing.assert_array_equal(run.run(given, state=step, dims=dims)["y"], wanted, err_msg=f"{counts}")
            step.commit()


@cache
def reference(index: Index) -> Executable:
    return compile(index.graph(), "reference", CompileOptions(fuse=False)).bind()


def step_inputs(
    index: Index, store: StateStore, counts: dict[int, int], rng: np.random.Generator, *, strange: bool
) -> tuple[dict[str, Array], dict[str, int]]:
    """Whole numbers; `strange`: some tokens' sequences are not in the batch."""
    with store.begin(list(counts.items())) as step:
        names = [n for n in reference(index).plan.graph.inputs if n.split(".")[0] in ("rows", "positions", "seqs")]
        n_tokens, n_new = len(step.positions), len(step.classes[index.spec.stream_class].new)
        given, dims = StepInputs(names)(step, np.zeros(n_tokens, np.int32), np.zeros(0, np.int32))
    given["q"] = rng.integers(-2, 3, (n_tokens, index.heads, index.width)).astype(np.float32)
    given["w"] = rng.integers(-1, 4, (n_tokens, index.heads)).astype(np.float32)
    given["new"] = rng.integers(-1, 2, (n_new, index.width)).astype(np.float32)
    if strange:
        given["seqs"] = given["seqs"].copy()
        given["seqs"][::3] = rng.choice([-1, len(counts), 1 << 30], len(given["seqs"][::3]))
    return dict(given), dict(dims)
