"""Files of state: what a damaged, hostile or foreign one is answered with."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tensorgraph.dtypes import f16, f32
from tensorgraph.errors import FormatError, InputError, StateError, TensorGraphError
from tensorgraph.state import StateSpec, StreamClass
from tensorgraph.state_store import StateStore
from tests.core.state_cases import SPECS, assert_same, extend, visible


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[StateStore, dict[str, np.ndarray], Path]]:
    store = StateStore(SPECS, kv_dtype=f16, page_rows=4, slack=0)
    seq = store.new()
    extend(store, seq, 140, np.random.default_rng(0))
    rows = visible(store, seq)
    store.save(seq, tmp_path / "saved", {"model": "m"})
    store.free(seq)
    yield store, rows, tmp_path / "saved"
    assert set(store.used_pages.values()) == {0}


def load_altered(store: StateStore, path: Path, content: bytes) -> dict[str, np.ndarray]:
    altered = path.with_name("altered")
    altered.write_bytes(content)
    seq, _ = store.load(altered)
    rows = visible(store, seq)
    store.free(seq)
    return rows


def test_a_truncated_file_is_refused(saved: tuple[StateStore, dict[str, np.ndarray], Path]) -> None:
    store, _, path = saved
    content = path.read_bytes()
    for n in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(FormatError, match=rf"altered, {n} bytes long"):
            load_altered(store, path, content[:n])
    with pytest.raises(FormatError):
        load_altered(store, path, content + b"\0")
    with pytest.raises(InputError, match="there is no file"):
        store.load(path.with_name("missing"))


def test_a_changed_byte_never_changes_rows(saved: tuple[StateStore, dict[str, np.ndarray], Path]) -> None:
    store, rows, path = saved
    content = path.read_bytes()
    data_from = 8 + int.from_bytes(content[:8], "little")

    @settings(max_examples=150, deadline=None)
    @given(at=st.integers(0, len(content) - 1), bits=st.integers(1, 255))
    def change(at: int, bits: int) -> None:
        altered = bytearray(content)
        altered[at] ^= bits
        if at >= data_from:
            with pytest.raises(FormatError):
                load_altered(store, path, bytes(altered))
            return
        try:
            loaded = load_altered(store, path, bytes(altered))
        except TensorGraphError:
            return
        for name, wanted in rows.items():
            assert_same(loaded[name], wanted)

    change()


def test_hostile_descriptions_are_refused(saved: tuple[StateStore, dict[str, np.ndarray], Path]) -> None:
    specs = {"w": StateSpec((2,), keep=8)}
    store, path = StateStore(specs, kv_dtype=f16), saved[2].with_name("hostile")
    good = {"specs": {"w": specs["w"].key(f16)}, "length": 10**9, "first": {"1w8": 10**9 - 7}, "extra": {}}
    rows = {"w": np.ones((7, 2), np.float16)}
    about = {**good, "crc32": {"w": 0}}
    changes: list[Any] = [
        {},  # a checksum that is not the rows'
        {"length": 10**30},
        {"length": -1},
        {"length": "5"},
        {"length": True, "first": {"1w8": 5}},
        {"first": {"1w8": -1}},
        {"first": {"1w8": 10**9}},
        {"first": {}},
        {"extra": {"a": 1}},
        {"specs": None},
    ]
    texts = [json.dumps({**about, **change}) for change in changes]
    for text in (*texts, "null", "[" * 100_000, "{", ""):
        save_file(rows, path, {"tensorgraph.state": text})
        with pytest.raises(FormatError):
            store.load(path)
    save_file(rows, path)
    with pytest.raises(FormatError):
        store.load(path)
    fewer = rows["w"][1:]  # a row that the next token looks back at is not there
    about |= {"first": {"1w8": 10**9 - 6}, "crc32": {"w": zlib.crc32(fewer.tobytes())}}
    save_file({"w": fewer}, path, {"tensorgraph.state": json.dumps(about)})
    with pytest.raises(FormatError, match="wanted a first row from 0 to 999999993"):
        store.load(path)
    save_file({"x": rows["w"]}, path, {"tensorgraph.state": json.dumps(about)})
    with pytest.raises(FormatError, match="wanted the streams w; got x"):
        store.load(path)
    assert store.used_pages[StreamClass(1, 8)] == 0


def test_the_state_of_another_model_is_refused(saved: tuple[StateStore, dict[str, np.ndarray], Path]) -> None:
    path = saved[2]
    others = ({**SPECS, "k": StateSpec((2, 4))}, {**SPECS, "near": StateSpec((3,), keep=9)}, {"k": SPECS["k"]})
    for specs in others:
        with pytest.raises(StateError, match=r"wanted the \d+ streams of this store"):
            StateStore(specs, kv_dtype=f16).load(path)
    with pytest.raises(StateError, match='"k" 2x3:f16:1 \\(wanted 2x3:f32:1\\)'):
        StateStore(SPECS, kv_dtype=f32).load(path)


def test_lengths_may_be_numpy_integers(tmp_path: Path) -> None:
    store = StateStore(SPECS, kv_dtype=f16)
    seq = store.new()
    store.begin([(seq, np.int32(9))]).commit()  # type: ignore[list-item]
    assert store.trim(seq, np.int64(7)) == 7  # type: ignore[arg-type]
    store.save(seq, tmp_path / "saved")
    assert store.length(store.load(tmp_path / "saved")[0]) == 7


def test_an_interrupted_save_leaves_the_older_file(
    saved: tuple[StateStore, dict[str, np.ndarray], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows, path = saved

    def interrupt(source: object, target: object) -> None:
        raise KeyboardInterrupt

    empty = store.new()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.save(empty, path)
    store.free(empty)
    for name, wanted in load_altered(store, path, path.read_bytes()).items():
        assert_same(wanted, rows[name])
    assert sorted(p.name for p in path.parent.iterdir()) == ["altered", "saved"]
