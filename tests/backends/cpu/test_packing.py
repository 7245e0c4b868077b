"""Weights packed behind the caller's back: nothing is lost by interrupts, forks, or several callers, and no thread stays."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu import packing
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.weights import pack, unpack
from tensorgraph.dtypes import f32

ROWS, WIDTH = 32, 64
SIZE = 4 * ROWS * WIDTH


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    device = CpuDevice()
    device.settle()
    yield device
    device.settle()


def arrays(count: int) -> list[np.ndarray]:
    """As they lie in a mapped file: others are packed at once."""
    memory = mmap.mmap(-1, count * SIZE)
    np.frombuffer(memory, np.float32)[:] = np.arange(count * ROWS * WIDTH)
    whole = np.frombuffer(memory, np.float32).reshape(count, ROWS, WIDTH)
    whole.flags.writeable = False
    return list(whole)


def packing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tensorgraph-packing"]


@pytest.mark.parametrize("per_batch", [1, 3, 100])
def test_what_is_packed_is_there_when_it_is_read(per_batch: int, device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_BYTES", per_batch * SIZE)
    given = arrays(50)
    held = [pack(array, f32, "r16", device) for array in given]
    assert not device.code.packing.idle
    for one, array in zip(held, given, strict=True):
        np.testing.assert_array_equal(unpack(one, f32, device), array)
    assert device.code.packing.idle and packing_threads() == []


def test_arrays_that_may_change_are_packed_at_once(device: CpuDevice) -> None:
    array = np.ones((ROWS, WIDTH), np.float32)
    held = pack(array, f32, "r16", device)
    array[:] = 7
    seen = array[:]
    seen.flags.writeable = False
    again = pack(seen, f32, "r16", device)
    array[:] = 8
    assert device.code.packing.idle
    assert np.all(unpack(held, f32, device) == 1) and np.all(unpack(again, f32, device) == 7)


def test_a_thread_begins_again_after_it_has_done_everything(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_BYTES", SIZE)
    work = device.code.packing
    for array in arrays(3):
        pack(array, f32, "r16", device)
        for thread in packing_threads():
            thread.join(60)
        assert not work._waiting and not work._running and not work.idle


def test_where_the_system_refuses_a_thread_the_caller_does_it(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(packing, "BATCH_BYTES", SIZE)
    given = arrays(3)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no)
        held = [pack(array, f32, "r16", device) for array in given]
        device.code.packing.settle()
    for one, array in zip(held, given, strict=True):
        np.testing.assert_array_equal(unpack(one, f32, device), array)


def test_from_several_threads(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_BYTES", 2 * SIZE)
    given, wrong = arrays(64), []

    def use(part: list[np.ndarray]) -> None:
        for array in part:
            held = pack(array, f32, "r16", device)
            if not np.array_equal(unpack(held, f32, device), array):
                wrong.append(array[0, 0])

    threads = [threading.Thread(target=use, args=(given[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_interrupt_loses_nothing(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of settling: whoever settles next does the rest."""
    given = arrays(6)
    held = [pack(array, f32, "r16", device) for array in given]
    run = device.code.executor.run

    def interrupted(table: int, n_steps: int) -> Any:
        monkeypatch.setattr(device.code.executor, "run", run)
        raise KeyboardInterrupt

    monkeypatch.setattr(device.code.executor, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        device.settle()
    assert not device.code.packing.idle
    np.testing.assert_array_equal(unpack(held[0], f32, device), given[0])
    assert device.code.packing.idle


def test_an_error_of_the_thread_reaches_who_waits(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who settles hears of it once, and then does the thread's batch again."""

    def run_out(who: str, run: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(packing, "BATCH_BYTES", SIZE)
    monkeypatch.setattr(device.code.packing, "_run", run_out)
    (array,) = arrays(1)
    held = pack(array, f32, "r16", device)
    for thread in packing_threads():
        thread.join()
    monkeypatch.undo()
    assert device.code.packing._error is not None
    with pytest.raises(MemoryError, match="no room"):
        device.settle()
    assert not device.code.packing.idle
    np.testing.assert_array_equal(unpack(held, f32, device), array)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_what_the_thread_had_begun(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three steps one is in the hands of a thread that never gets on, one waits, one is not in a batch yet."""
    (first, second, third), begun, stuck = arrays(3), threading.Event(), threading.Event()
    work = device.code.packing
    monkeypatch.setattr(packing, "BATCH_BYTES", SIZE)
    monkeypatch.setattr(work, "_run", partial(wait, begun, stuck))
    held = [pack(first, f32, "r16", device), pack(second, f32, "r16", device)]
    monkeypatch.setattr(packing, "BATCH_BYTES", 2 * SIZE)
    held.append(pack(third, f32, "r16", device))
    assert begun.wait(60)
    monkeypatch.undo()
    pid = os.fork()
    if pid == 0:
        good = all(np.array_equal(unpack(one, f32, device), a) for one, a in zip(held, (first, second, third), strict=True))
        os._exit(0 if good else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    stuck.set()
    with pytest.raises(EOFError):
        device.settle()
    assert status == 0


def wait(begun: threading.Event, stuck: threading.Event, who: str, run: Any) -> None:
    begun.set()
    stuck.wait(60)
    raise EOFError  # what it has in hand stays there
