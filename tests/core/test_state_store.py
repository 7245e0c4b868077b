"""What the store of state promises, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import run_op
from tensorgraph.dtypes import as_dtype, bf16, f16, f32, i32
from tensorgraph.errors import (
    CannotTrim,
    DTypeError,
    ShapeError,
    StateError,
    UnknownNameError,
)
from tensorgraph.state import Layout, StateSpec, StreamClass
from tensorgraph.state_pages import PagePool
from tensorgraph.state_store import StateStore
from tensorgraph.tools.inspect import state_cost
from tests.core.state_cases import IN_PANELS, SPECS, assert_same, extend, fill, visible

# --- declarations and sizes -------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    v32: dict[str, StateSpec] = {}
    for i in range(61):
        v32 |= {f"{i}.kv": StateSpec((576,)), f"{i}.index_k": StateSpec((128,))}
    assert state_cost(v32, f16).bytes_per_token / 1024 == pytest.approx(83.9, abs=0.03)
    assert state_cost(v32, f16).bytes_constant == 0
    v4: dict[str, StateSpec] = {}
    for i in range(43):
        v4[f"{i}.window"] = StateSpec((512,), keep=128)
    for i in range(21):
        v4 |= {f"{i}.kv": StateSpec((512,), every=4), f"{i}.index_k": StateSpec((128,), every=4)}
    for i in range(21, 41):
        v4[f"{i}.kv"] = StateSpec((512,), every=128)
    assert state_cost(v4, f16).bytes_per_token == 6880.0
    assert state_cost(v4, f16).bytes_constant == 43 * 128 * 512 * 2


def test_a_spec_says_its_class_key_and_bytes() -> None:
    spec = StateSpec((8, 128), keep=128)
    assert (spec.stream_class.name, StateSpec((1,), every=4).stream_class.name) == ("1w128", "4")
    assert (spec.key(f16), spec.row_bytes(f16), spec.row_bytes(f32)) == ("8x128:f16:1w128", 2048, 4096)
    assert (spec.key(as_dtype("q8_0")), spec.row_bytes(as_dtype("q8_0"))) == ("8x128:q8_0:1w128", 8 * 4 * 34)
    assert StateSpec((2,), f32).row_bytes(f16) == 8


def test_wrong_declarations_are_refused() -> None:
    declarations: list[dict[str, Any]] = [{"row_shape": (0,)}, {"row_shape": [4]}, {"every": 0}, {"keep": 0}]
    for wrong in declarations:
        with pytest.raises(StateError, match="wanted"):
            StateSpec(**{"row_shape": (4,), **wrong})
    with pytest.raises(DTypeError):
        StateSpec((4,), i32)
    with pytest.raises(DTypeError, match="wanted f16, bf16, f32 or q8_0 for a stream; got i32"):
        StateStore({"k": StateSpec((4,))}, kv_dtype=i32)
    with pytest.raises(DTypeError, match="got q4_0"):
        StateStore({"k": StateSpec((32,))}, kv_dtype=as_dtype("q4_0"))
    with pytest.raises(DTypeError, match=r"wanted rows of a multiple of 32 for q8_0; got \[2, 48\]"):
        StateStore({"k": StateSpec((2, 48))}, kv_dtype=as_dtype("q8_0"))
    arguments: list[dict[str, Any]] = [{"page_rows": 0}, {"slack": -1}, {"page_rows": 8, "layouts": {"k": "rows16"}}]
    arguments += [{"layouts": {"k": "panels"}}, {"layouts": {"k": "columns"}}]
    for options in arguments:
        with pytest.raises(StateError, match="wanted"):
            StateStore({"k": StateSpec((4,))}, kv_dtype=f16, **options)
    with pytest.raises(UnknownNameError):
        StateStore({"k": StateSpec((4,))}, kv_dtype=f16, layouts={"v": "rows"})


def test_size_is_that_of_the_pages() -> None:
    store = StateStore({"k": StateSpec((4,)), "c": StateSpec((2,), f32, every=4)}, kv_dtype=f16, initial_pages=3)
    assert store.size_bytes == 3 * 16 * (4 * 2 + 2 * 4)
    assert store.classes == (StreamClass(1, None), StreamClass(4, None))


# --- pages ------------------------------------------------------------------------------------------------------------


def test_rows_are_rounded_to_the_dtype_of_the_stream() -> None:
    x = np.linspace(-3, 3, 20, dtype=np.float32).reshape(5, 4)
    for dtype, wanted in ((f16, np.float16), (bf16, ml_dtypes.bfloat16), (f32, np.float32)):
        store = StateStore({"k": StateSpec((4,))}, kv_dtype=dtype)
        with store.begin([(store.new(), 5)]) as step:
            step.append("k", x)
            assert_same(step.read("k"), x.astype(wanted))
    x, dtype = np.random.default_rng(0).standard_normal((5, 2, 64), np.float32), as_dtype("q8_0")
    layouts: tuple[Layout, ...] = ("rows", "rows16", "panels")
    for layout in layouts:
        store = StateStore({"k": StateSpec((2, 64))}, kv_dtype=dtype, layouts={"k": layout})
        with store.begin([(store.new(), 5)]) as step:
            step.append("k", x)
            assert_same(step.read("k"), run_op("cast", run_op("cast", x, dtype=dtype), dtype=f32))


def test_forks_share_pages_until_one_of_them_writes() -> None:
    rng = np.random.default_rng(0)
    store = StateStore({"k": SPECS["k"]}, kv_dtype=f16, page_rows=4)
    cls, parent = StreamClass(1, None), store.new()
    begun = extend(store, parent, 10, rng)["k"]
    child = store.fork(parent)
    assert store.used_pages[cls] == 3
    mine, yours = extend(store, parent, 1, rng)["k"], extend(store, child, 1, rng)["k"]
    assert store.used_pages[cls] == 4  # the half-filled page only, and only for the first of the two to write
    assert_same(visible(store, parent)["k"], np.concatenate([begun, mine]))
    assert_same(visible(store, child)["k"], np.concatenate([begun, yours]))


def test_a_page_that_is_used_again_is_zero() -> None:
    store = StateStore({"k": SPECS["k"], "v": SPECS["v"]}, kv_dtype=f16, page_rows=4, initial_pages=2)
    first = store.new()
    extend(store, first, 8, np.random.default_rng(0))
    assert np.count_nonzero(store.pages("k")) and np.count_nonzero(store.pages("v"))
    store.free(first)
    with store.begin([(store.new(), 5)]) as step:
        assert not np.count_nonzero(store.pages("k")) and not np.count_nonzero(store.pages("v"))
        assert step.classes[StreamClass(1, None)].seen.slots.max() < 8


def test_pages_fall_out_of_keep_and_no_more_are_used() -> None:
    rng = np.random.default_rng(0)
    store = StateStore({"w": StateSpec((2,), keep=8)}, kv_dtype=f16, page_rows=4, slack=6)
    seq = store.new()
    for _ in range(100):
        extend(store, seq, 1, rng)
    # the next token looks at rows 93..; with slack at 87.., which lies in page 21 of 0..24
    assert store.used_pages[StreamClass(1, 8)] == 4


def test_all_layouts_hold_the_same_rows(tmp_path: Path) -> None:
    sixteen: dict[str, Layout] = dict.fromkeys(SPECS, "rows16")
    panels: dict[str, Layout] = dict.fromkeys(IN_PANELS, "panels")
    stores = [
        StateStore(SPECS, kv_dtype=f16, slack=0),
        StateStore(SPECS, kv_dtype=f16, slack=0, page_rows=32, layouts=sixteen),
        StateStore(SPECS, kv_dtype=f16, slack=0, layouts=panels),
    ]
    for i, store in enumerate(stores):
        seq, other = store.new(), store.new()
        rng = np.random.default_rng(5)
        for counts in ((40, 3), (1, 0), (150, 17), (2, 9)):
            with store.begin([(seq, counts[0]), (other, counts[1])]) as step:
                fill(step, SPECS, rng)
                step.commit()
        store.save(seq, tmp_path / str(i))
    assert stores[1].pages("k").shape[1:] == (2, 2, 3, 16) and stores[1].pages("coded").shape[1:] == (2, 2, 34, 16)
    assert stores[2].pages("wide").shape[1:] == (1, 3, 16, 16) and stores[2].pages("coded").shape[1:] == (1, 2, 16, 34)
    for store in stores[1:]:
        for name in SPECS:
            assert_same(visible(stores[0], seq)[name], visible(store, seq)[name])
    for store, path in zip(stores, ("1", "2", "0"), strict=True):  # a file does not depend on layout or page size
        loaded, _ = store.load(tmp_path / path)
        for name, rows in visible(store, loaded).items():
            assert_same(rows, visible(store, seq)[name])


def test_chunks_and_whole_see_the_same_bytes() -> None:
    rows = np.random.default_rng(0).standard_normal((90, 3), np.float32)
    seen = []
    for chunks in ([90], [1] * 90, [7, 40, 1, 42]):
        store, at = StateStore({"near": SPECS["near"]}, kv_dtype=bf16, page_rows=4), 0
        seq, by_token = store.new(), {}
        for n in chunks:
            with store.begin([(seq, n)]) as step:
                step.append("near", rows[at : at + n])
                row_pos = step.classes[StreamClass(1, 8)].seen.rows
                for t in step.positions.tolist():
                    by_token[t] = step.read("near")[(row_pos > t - 8) & (row_pos <= t)].tobytes()
                step.commit()
            at += n
        seen.append(by_token)
    assert seen[0] == seen[1] == seen[2]


# --- trim -------------------------------------------------------------------------------------------------------------


def test_trim_reaches_what_is_retained_and_says_what_that_is() -> None:
    rng = np.random.default_rng(0)
    store = StateStore({"w": StateSpec((1,), keep=8), "k": StateSpec((1,))}, kv_dtype=f16, page_rows=4, slack=4)
    seq = store.new()
    whole = extend(store, seq, 100, rng)
    # the reader at 96 looks at rows 89..96, in page 22: rows 88.. stay, and the reader at 95 is the first they serve
    with pytest.raises(CannotTrim, match="wanted a length of 94 tokens") as caught:
        store.trim(seq, 94)
    assert (caught.value.earliest, store.length(seq)) == (95, 100)
    assert store.trim(seq, 95) == 95
    with store.begin([(seq, 1)]) as step:
        more = fill(step, store.specs, rng)
        assert_same(step.read("w"), np.concatenate([whole["w"][88:95], more["w"]]))
        assert_same(step.read("k"), np.concatenate([whole["k"][:95], more["k"]]))
    assert store.trim(seq, 0) == 0
    assert visible(store, seq)["k"].shape == (0, 1)
    with pytest.raises(StateError, match="wanted a length from 0 to 0"):
        store.trim(seq, 1)


@settings(max_examples=60, deadline=None)
@given(chunks=st.lists(st.integers(1, 60), min_size=1, max_size=5), back=st.integers(0, 17), page=st.integers(1, 9))
def test_slack_tokens_can_always_be_trimmed(chunks: list[int], back: int, page: int) -> None:
    store = StateStore(SPECS, kv_dtype=f16, page_rows=page, slack=17)
    seq, rng = store.new(), np.random.default_rng(0)
    for n in chunks:
        extend(store, seq, n, rng)
    length = max(0, sum(chunks) - back)
    assert store.trim(seq, length) == length


def test_trim_falls_back_on_the_nearest_snapshot_of_the_same_history() -> None:
    rng = np.random.default_rng(0)
    specs = {"w": StateSpec((1,), keep=8)}
    store = StateStore(specs, kv_dtype=f16, page_rows=4, slack=0)
    seq = store.new()
    rows = [extend(store, seq, 20, rng)["w"]]
    early = store.snapshot(seq)
    rows.append(extend(store, seq, 30, rng)["w"])
    late = store.snapshot(seq)
    child = store.fork(seq)
    rows.append(extend(store, seq, 50, rng)["w"])
    assert store.trim(seq, 60) == 50
    assert_same(visible(store, seq)["w"], np.concatenate(rows)[43:50])
    assert store.trim(seq, 30) == 20
    extend(store, seq, 80, rng)
    assert store.trim(seq, 60) == 20  # `late` holds other tokens than these now
    late.release()
    extend(store, child, 50, rng)
    assert store.trim(child, 60) == 20  # taken before the fork, so the child may use it
    extend(store, child, 80, rng)
    early.release()
    with pytest.raises(CannotTrim):
        store.trim(child, 60)
    with pytest.raises(StateError, match="not released"):
        store.restore(seq, early)


def test_snapshots_of_a_snapshot_serve_as_well() -> None:
    rng = np.random.default_rng(0)
    store = StateStore({"w": StateSpec((1,), keep=8)}, kv_dtype=f16, page_rows=4, slack=0)
    seq, other = store.new(), store.new()
    rows = extend(store, seq, 20, rng)["w"]
    store.snapshot(seq)
    extend(store, seq, 30, rng)
    store.restore(other, store.snapshot(seq))
    extend(store, other, 50, rng)
    with pytest.raises(CannotTrim) as caught:
        store.trim(other, 18)
    assert caught.value.earliest == 19  # the first snapshot holds rows 12..19, and the reader at 19 looks at these
    assert store.trim(other, 30) == 20
    assert store.trim(other, 19) == 19
    assert_same(visible(store, other)["w"], rows[12:19])


def compress(rows: np.ndarray, low: int, block: int) -> np.ndarray:
    """A pooled row like those of V4's overlapping compressor: eight rows, those before the text are absent."""
    start = max(0, 4 * block - 4)
    c, z = np.moveaxis(rows[start - low : 4 * block + 4 - low].astype(np.float64), 1, 0)
    weights = np.exp(z - z.max(0))
    return np.asarray((weights * c).sum(0) / weights.sum(0), np.float32)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_compressed_rows_stay_consistent_under_trim(data: st.DataObject) -> None:
    specs = {"cz": StateSpec((2, 3), f32, keep=8), "kv": StateSpec((3,), f32, every=4)}
    store = StateStore(specs, kv_dtype=f16, page_rows=data.draw(st.sampled_from([1, 4, 16])), slack=5)
    seq, rng, text, longest = store.new(), np.random.default_rng(0), np.empty((0, 2, 3), np.float32), 0
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            length = data.draw(st.integers(min(len(text), max(0, longest - 5)), len(text)))
            assert store.trim(seq, length) == length
            text = text[:length]
        new = rng.standard_normal((data.draw(st.integers(0, 13)), 2, 3), np.float32)
        text = np.concatenate([text, new])
        longest = max(longest, len(text))
        with store.begin([(seq, len(new))]) as step:
            step.append("cz", new)
            seen, window = step.read("cz"), step.classes[StreamClass(1, 8)]
            blocks = step.classes[StreamClass(4, None)].new.rows.tolist()
            step.append("kv", np.array([compress(seen, window.seen.start[0], b) for b in blocks]).reshape(-1, 3))
            step.commit()
        wanted = [compress(text, 0, b) for b in range(len(text) // 4)]
        assert_same(visible(store, seq)["kv"], np.array(wanted, np.float32).reshape(-1, 3))


# --- steps ------------------------------------------------------------------------------------------------------------


def test_misuse_of_steps_is_refused() -> None:
    store = StateStore(SPECS, kv_dtype=f16)
    seq = store.new()
    for batch in ([(seq, 1), (seq, 1)], [(seq, -1)], [(seq, 2**31)]):
        with pytest.raises(StateError, match="wanted"):
            store.begin(batch)
    with pytest.raises(UnknownNameError, match=r"\[begin\] wanted one of the sequences \[0\]; got 7"):
        store.begin([(7, 1)])
    step = store.begin([(seq, 2)])
    changes: list[Callable[[], object]] = [
        lambda: store.begin([(seq, 1)]),
        lambda: store.fork(seq),
        lambda: store.free(seq),
        lambda: store.trim(seq, 0),
        lambda: store.snapshot(seq),
        lambda: store.load("none"),
    ]
    for change in changes:
        with pytest.raises(StateError, match="wanted no open step"):
            change()
    with pytest.raises(ShapeError, match=r'wanted rows \[2, 2, 3\] for "k"; got \[1, 2, 3\]'):
        step.append("k", np.zeros((1, 2, 3)))
    with pytest.raises(UnknownNameError):
        step.read("q")
    step.commit()
    for ended in (step.commit, lambda: step.read("k"), lambda: step.append("k", np.zeros((2, 2, 3)))):
        with pytest.raises(StateError, match="wanted an open step"):
            ended()
    step.rollback()
    assert store.length(seq) == 2


def test_a_step_that_is_left_by_an_error_leaves_nothing() -> None:
    store = StateStore(SPECS, kv_dtype=f16, page_rows=4)
    seq, rng = store.new(), np.random.default_rng(0)
    extend(store, seq, 6, rng)
    before, pages, copy = visible(store, seq), store.used_pages, store.fork(seq)
    with pytest.raises(KeyboardInterrupt), store.begin([(seq, 30), (copy, 3)]) as step:
        step.append("k", np.ones((33, 2, 3)))
        raise KeyboardInterrupt
    assert (store.length(seq), store.used_pages) == (6, pages)
    for name, rows in visible(store, seq).items():
        assert_same(rows, before[name])


def test_a_step_without_memory_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(SPECS, kv_dtype=f16, page_rows=4, initial_pages=2)
    seq = store.new()

    def refuse(pool: PagePool, n_pages: int) -> None:
        raise MemoryError

    extend(store, seq, 4, np.random.default_rng(0))
    pages = store.used_pages
    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "grow", refuse)
        with pytest.raises(MemoryError):
            store.begin([(store.fork(seq), 2), (seq, 9)])
    assert store.used_pages == pages
    extend(store, seq, 9, np.random.default_rng(0))
    assert store.length(seq) == 13
