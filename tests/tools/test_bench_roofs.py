"""The roofs that `tensorgraph bench` measures, and how it waits until threads sleep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tensorgraph.tools.bench import machine, peer, roofs
from tensorgraph.tools.bench.roofs import CHAINS


class Clock:
    """A processor that is busy until `busy_until`."""

    def __init__(self, busy_until: float) -> None:
        self.now, self.busy_until = 0.0, busy_until

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def process_time(self) -> float:
        return min(self.now, self.busy_until)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("busy_until", "quiet", "waited"), [(0.0, True, 0.25), (0.6, True, 1.0), (99.0, False, 1.25)])
def test_waiting_until_threads_sleep(busy_until: float, quiet: bool, waited: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(busy_until)
    monkeypatch.setattr(peer, "time", clock)
    assert (peer.wait_until_quiet(limit_s=1.0, step_s=0.25), clock.now) == (quiet, waited)


def test_a_rate_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(roofs, "time", clock)

    def work() -> int:
        clock.sleep(0.25)
        return 3

    assert roofs.rate([work], 1.0) == 12.0


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    yield roofs._kernels()


def test_the_stream_kernel_reads_every_word(kernels: Any) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 63, 5 * kernels.step_bytes // 8, np.uint64)
    assert kernels.stream(words.ctypes.data, words.nbytes) % (1 << 64) == int(words.sum())
    for i in (0, len(words) - 1, len(words) // 2):
        words[i] += np.uint64(1)
        assert kernels.stream(words.ctypes.data, words.nbytes) % (1 << 64) == int(words.sum())


@pytest.mark.parametrize("turns", [1, 2, 7])
def test_the_fma_kernel_does_every_operation(kernels: Any, turns: int) -> None:
    sums = np.arange(CHAINS, dtype=np.float64)
    for _ in range(turns):
        sums = 0.5 * sums + 1
    lanes = kernels.fma_operations // (2 * CHAINS)
    assert kernels.fma(turns) == pytest.approx(lanes * sums.sum(), rel=1e-6)


@pytest.mark.parametrize("turns", [1, 2, 7])
def test_the_dot_kernel_does_every_operation(kernels: Any, turns: int) -> None:
    """Each int32 sum gains 3 times the sum of its own four bytes; as x86 has it the bytes are unsigned, on ARM signed."""
    if kernels.dot is None:
        assert roofs.dot_step(roofs.host()) is None
        return
    signed = roofs.host().family == "aarch64"
    lanes = kernels.dot_operations // (2 * CHAINS * 4)
    sums = np.arange(CHAINS, dtype=np.int32)
    for _ in range(turns):
        sums = sums + 3 * sums.view(np.int8 if signed else np.uint8).reshape(-1, 4).sum(-1, dtype=np.int32)
    assert kernels.dot(turns) == lanes * int(sums.sum())


def test_every_thread_has_its_part_and_every_roof_is_measured() -> None:
    for threads in (1, 3):
        found = roofs.measure(threads, 0.0)
        assert min(found.stream_gbs, found.fma_gflops, found.dot_gops or 1.0) > 0
    assert machine.cores() >= 1 and machine.l3_bytes() >= 0 and machine.describe()["machine"]["processor"]
