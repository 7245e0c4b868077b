"""Pages in a device's memory beside NumPy's: what a store does with them gives the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cuda.host import HostRuntime
from tensorgraph.backends.cuda.pages import DevicePages
from tensorgraph.backends.cuda.runtime import OutOfMemoryError
from tensorgraph.dtypes import as_dtype
from tensorgraph.state import StateSpec
from tensorgraph.state_store import StateStore
from tests.backends.cuda.bare import BareRuntime

SPECS = {"k": StateSpec((2, 3)), "window": StateSpec((5,), keep=20), "rows": StateSpec((4,), every=4)}


def stores() -> tuple[StateStore, StateStore, BareRuntime]:
    runtime = BareRuntime()
    zeros = dict.fromkeys(SPECS, lambda shape, dtype: DevicePages.zeros(runtime, shape, dtype))
    made = (StateStore(SPECS, kv_dtype=as_dtype("f16"), initial_pages=1, slack=4, zeros=z) for z in (None, zeros))
    return *made, runtime


def rows(store: StateStore, seq: int) -> dict[str, Any]:
    with store.begin([(seq, 0)]) as step:
        return {name: np.asarray(step.read(name)) for name in SPECS}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_store_of_them_holds_what_numpys_holds(data: st.DataObject) -> None:
    """Growing, appending, forking, trimming and coming back to a snapshot; pages that are used again are zeros."""
    plain, device, _ = stores()
    seqs, snapshots, rng = [plain.new()], [], np.random.default_rng(data.draw(st.integers(0, 99)))
    assert device.new() == seqs[0]
    for _ in range(data.draw(st.integers(1, 12))):
        seq = data.draw(st.sampled_from(seqs))
        what = data.draw(st.sampled_from(("append", "fork", "trim", "snapshot", "restore", "free")))
        if what == "append":
            n = data.draw(st.integers(1, 45))
            given_rows: dict[str, Any] = {}
            for store in (plain, device):
                with store.begin([(seq, n)]) as step:
                    for name, spec in SPECS.items():
                        shape = (len(step.classes[spec.stream_class].new), *spec.row_shape)
                        step.append(name, given_rows.setdefault(name, rng.standard_normal(shape).astype(np.float32)))
                    step.commit()
        elif what == "fork":
            seqs.append(plain.fork(seq))
            assert device.fork(seq) == seqs[-1]
        elif what == "trim":
            length = data.draw(st.integers(max(0, plain.length(seq) - 4), plain.length(seq)))
            assert plain.trim(seq, length) == device.trim(seq, length)
        elif what == "snapshot":
            snapshots.append((plain.snapshot(seq), device.snapshot(seq)))
        elif what == "restore" and snapshots:
            of_plain, of_device = data.draw(st.sampled_from(snapshots))
            plain.restore(seq, of_plain)
            device.restore(seq, of_device)
        elif what == "free" and len(seqs) > 1:
            seqs.remove(seq)
            plain.free(seq)
            device.free(seq)
        for each in seqs:
            for name, value in rows(plain, each).items():
                np.testing.assert_array_equal(rows(device, each)[name], value)


def test_pages_that_were_used_are_zeros_again() -> None:
    _, device, _ = stores()
    seq = device.new()
    with device.begin([(seq, 20)]) as step:
        for name, spec in SPECS.items():
            step.append(name, np.ones((len(step.classes[spec.stream_class].new), *spec.row_shape), np.float32))
        step.commit()
    assert np.count_nonzero(np.asarray(device.pages("k"))) == 20 * 6
    device.free(seq)
    other = device.new()
    with device.begin([(other, 20)]):
        assert not np.count_nonzero(np.asarray(device.pages("k")))


def test_what_is_saved_is_read_by_a_store_of_the_other_kind(tmp_path: Any) -> None:
    plain, device, _ = stores()
    seq, rng = device.new(), np.random.default_rng(0)
    with device.begin([(seq, 37)]) as step:
        for name, spec in SPECS.items():
            shape = (len(step.classes[spec.stream_class].new), *spec.row_shape)
            step.append(name, rng.standard_normal(shape).astype(np.float32))
        step.commit()
    device.save(seq, tmp_path / "state")
    loaded, _ = plain.load(tmp_path / "state")
    for name, value in rows(plain, loaded).items():
        np.testing.assert_array_equal(value, rows(device, seq)[name])


def test_memory_is_given_back() -> None:
    """With the store, and what it held before its pages moved."""
    _, device, runtime = stores()
    seq = device.new()
    for _ in range(5):
        with device.begin([(seq, 100)]) as step:
            step.commit()
    held = runtime.taken_bytes
    assert held == device.size_bytes
    del device, step
    assert runtime.taken_bytes == 0


@pytest.mark.usefixtures("compiler")
def test_the_runtime_that_runs_kernels_counts_too() -> None:
    runtime = HostRuntime(memory_bytes=1000)
    first = runtime.take(600)
    with pytest.raises(OutOfMemoryError, match="wanted 600 bytes; 400 of 1000 are free"):
        runtime.take(600)
    del first
    assert runtime.free_bytes() == 1000
