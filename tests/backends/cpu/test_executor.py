"""The executor against programs worked out in NumPy, on several numbers of threads; its choice of how many take part."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu import native_loop
from tensorgraph.backends.cpu.executor import Executor
from tensorgraph.backends.cpu.ir import I64, PTR
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.loop_function import LoopFunction
from tensorgraph.backends.cpu.target import TARGETS, host
from tensorgraph.backends.cpu.thread_choice import SHORTEST
from tests.backends.cpu.programs import MixProgram, Program, compiled_kernels, wanted_chunks

THREADS = (1, 2, 4)


@pytest.fixture(scope="module")
def jit() -> Jit:
    return Jit(host(), None)


@pytest.fixture(scope="module")
def kernels(jit: Jit) -> dict[str, int]:
    return compiled_kernels(jit)


@pytest.fixture(scope="module")
def executors(jit: Jit) -> Iterator[dict[int, Executor]]:
    made = {n: Executor(jit, n) for n in THREADS}
    yield made
    for executor in made.values():
        executor.close()


def test_numbers_claimed_in_turn_are_of_parts_in_turn(jit: Jit) -> None:
    f = LoopFunction(host(), {"team": PTR, "taken": I64, "chunks": I64}, I64)
    f.ret(native_loop._place(f, *f.parameters.values()))
    place = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(jit.compile([f.text()])[0])
    team = np.zeros(native_loop.THREADS // 8, np.int64)
    for parts in (1, 2, 3, 7, 64, 100):
        team[native_loop.PARTS // 8] = parts
        for chunks in (1, 2, 5, 64, 65):
            cut = np.array_split(np.arange(chunks), parts)
            want = [int(part[turn]) for turn in range(len(cut[0])) for part in cut if turn < len(part)]
            assert [place(team.ctypes.data, i, chunks) for i in range(chunks)] == want


steps_of = st.lists(st.tuples(st.integers(-1, 300), st.integers(1, 64), st.integers(1, 80)), max_size=40)


@settings(deadline=None, max_examples=150)
@given(steps=steps_of)
def test_programs(kernels: dict[str, int], executors: dict[int, Executor], steps: list[tuple[int, int, int]]) -> None:
    for threads, executor in executors.items():
        before = [sum(counter["chunks"] for counter in executor.counters()), executor.counters()[0]["runs"]]
        program = MixProgram(kernels["mix"], steps, threads)
        assert program.program.run(executor) is None
        program.check()
        after = [sum(counter["chunks"] for counter in executor.counters()), executor.counters()[0]["runs"]]
        assert after[0] - before[0] == sum(wanted_chunks(*step) for step in steps)
        assert after[1] - before[1] == 1


@pytest.mark.parametrize("threads", [*THREADS, 16])
def test_long_programs(jit: Jit, kernels: dict[str, int], threads: int) -> None:
    draw = random.Random(threads)
    steps = [(draw.choice([1, 1, 8, 64, 500]), draw.choice([1, 8, 100]), draw.choice([1, 2, 64])) for _ in range(3000)]
    executor = Executor(jit, threads)
    for _ in range(5):
        program = MixProgram(kernels["mix"], steps, threads)
        assert program.program.run(executor) is None
        program.check()
    executor.close()


def test_many_chunks(kernels: dict[str, int], executors: dict[int, Executor]) -> None:
    most = native_loop.MOST_CHUNKS
    for threads, executor in executors.items():
        program = MixProgram(kernels["mix"], [(3 * most, 1, most)], threads)
        program.program.lines[0][4] = 1 << 40  # the loop's own limit holds
        program.program.run(executor)
        program.check()


def test_items_are_read_when_run(kernels: dict[str, int], executors: dict[int, Executor]) -> None:
    for executor in executors.values():
        program, seen = Program(), np.zeros(8, np.int64)
        items, zero = program.array(8), program.array(0)
        program.step(kernels["nap"], [zero, seen], items)
        for n in (8, 3, 0, 1):
            items[0], seen[:] = n, 0
            program.run(executor)
            assert seen.tolist() == [1] * n + [0] * (8 - n)


def test_code_for_every_target() -> None:
    for target in TARGETS.values():
        texts = [native_loop.ticks_text(target), native_loop.chooser_text(target)]
        for text in (native_loop.alone_text, native_loop.caller_text, native_loop.worker_text):
            texts += [text(target, False), text(target, True)]
        assert all(len(code) > 0 for code in Jit(target, None).objects(texts))


def test_status(kernels: dict[str, int], executors: dict[int, Executor]) -> None:
    for executor in executors.values():
        bad, good, seen = Program(), Program(), np.zeros(8, np.int64)
        bad.step(kernels["fail"], [executor.status_address, bad.array(7)], bad.array(1))
        bad.step(kernels["fail"], [executor.status_address, bad.array(8)], bad.array(8))
        good.step(kernels["nap"], [good.array(0), seen], good.array(8))
        assert bad.run(executor) == [7, 0, 11, 12]
        assert executor.status == [7, 0, 11, 12]
        assert good.run(executor) is None
        assert executor.status is None
        executor.profile(*bad.table())
        assert executor.status == [7, 0, 11, 12]
        assert good.run(executor) is None
        assert seen.tolist() == [2] * 8


@pytest.mark.parametrize("threads", [1, 2])
def test_profile(jit: Jit, kernels: dict[str, int], threads: int) -> None:
    executor = Executor(jit, threads)
    program, seen = Program(), np.zeros(8, np.int64)
    us = [20_000, 0, 40_000, 10_000]
    for for_us, items in zip(us, (1, 0, 3, 2), strict=True):
        program.step(kernels["nap"], [program.array(for_us), seen], program.array(items))
    begin = time.perf_counter()
    seconds = executor.profile(*program.table())
    passed = time.perf_counter() - begin
    assert seen.tolist() == [3, 2, 1, 0, 0, 0, 0, 0]
    assert seconds.shape == (4,)
    assert seconds[1] < seconds[0]
    rounds = np.array([1, 0, 3, 2]) if threads == 1 else np.array([1, 0, 1, 1])
    assert (seconds >= 0.95e-6 * np.array(us) * rounds).all()
    assert seconds.sum() <= 1.05 * passed
    counted = executor.profile_counters()
    assert sum(c.chunks for c in counted) == 6 and counted[0].runs == 1 and len(counted) == threads
    asleep_s = 1e-6 * np.dot(us, (1, 0, 3, 2))  # in kernels, all threads together
    assert 0.95 * asleep_s <= sum(c.busy_s for c in counted) <= 1.05 * threads * passed
    assert all(c.busy_s <= 1.05 * passed for c in counted)
    mixed = MixProgram(kernels["mix"], [(40, 1, 8), (1, 1, 1), (300, 2, 64)] * 50, threads)
    seconds = executor.profile(*mixed.program.table())
    assert (seconds >= 0).all() and seconds.sum() > 0
    mixed.check()
    executor.close()


def test_auto(jit: Jit, kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of two sizes in turn, enough of them for each to be tried both ways; results do not depend on it."""
    monkeypatch.setattr("tensorgraph.backends.cpu.executor.usable_cores", lambda: 2)
    executor = Executor(jit, "auto")
    weights = [40 + 1 + 150, 2 * (40 + 1 + 150)]
    taken, looked = [set[int](), set[int]()], list[int]()
    assert executor._choice is not None
    real = executor._choice.look
    monkeypatch.setattr(executor._choice, "look", lambda bits: (looked.append(bits), real(bits)))
    for i in range(6 * SHORTEST):
        program = MixProgram(kernels["mix"], [(40, 1, 8), (1, 1, 1), (0, 1, 1), (300, 2, 64)] * (1 + i % 2), 2)
        line, looks = executor._choice.lines[weights[i % 2].bit_length()], len(looked)
        taken[i % 2].add(int(line[native_loop.ALONE // 8]))
        count, left = line[native_loop.COUNT // 8], line[native_loop.LEFT // 8]
        program.program.run(executor)
        program.check()
        assert executor.team.at(native_loop.WEIGHT) == weights[i % 2]
        if line[native_loop.COUNT // 8]:  # else a try began or ended with this run
            assert line[native_loop.LAST // 8 + count % native_loop.KEPT] == executor.team.at(native_loop.TICKS) > 0
            assert line[native_loop.COUNT // 8] == count + 1
            assert line[native_loop.LEFT // 8] == left - 1 > 0 or looked[looks:] == [weights[i % 2].bit_length()]
    assert taken == [{0, 1}, {0, 1}]
    executor.close()


def test_auto_runs_as_chosen(jit: Jit, kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorgraph.backends.cpu.executor.usable_cores", lambda: 2)
    executor = Executor(jit, "auto")
    napping, seen = Program(), np.zeros(8, np.int64)
    napping.step(kernels["nap"], [napping.array(1000), seen], napping.array(8))  # long enough for the worker to come
    napping.run(executor)
    for alone in (1, 0, 1):
        executor._choice.lines[(8).bit_length(), native_loop.ALONE // 8] = alone  # a weight of 8
        before = executor.counters()[1]["chunks"]
        napping.run(executor)
        after = executor.counters()[1]["chunks"]
        assert after == before if alone else after > before
    executor.close()
