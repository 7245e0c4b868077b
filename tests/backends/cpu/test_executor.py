"""The executor against programs worked out in NumPy, on several numbers of threads, and in every bad moment we could think of."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorgraph.backends.cpu import native_loop
from tensorgraph.backends.cpu.executor import Executor, usable_cores
from tensorgraph.backends.cpu.ir import I32, I64
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.kernel import HEADER, Kernel
from tensorgraph.backends.cpu.target import TARGETS, host
from tensorgraph.backends.cpu.thread_choice import LONGEST, SHORTEST, TRIAL, ThreadChoice
from tensorgraph.errors import AttributeValueError

Ints = NDArray[np.int64]
THREADS = (1, 2, 4)


def mix(k: Kernel) -> None:
    """y[i] = 3 x[last - i % n] + i over x's n elements, so every chunk reads what others wrote; and who ran what."""
    x, y, n_x, n_y, chunks_seen, of_thread, firsts = (k.slot() for _ in range(7))
    n = k.load(n_x, I64)
    with k.span(k.load(n_y, I64)) as each:
        k.store(k.load(x + (n - 1 - each.i % n) * 8, I64) * 3 + each.i, y + each.i * 8)
    seen, mine, first = chunks_seen + k.chunk * 8, of_thread + k.thread * 8, firsts + k.thread * 8
    k.store(k.load(seen, I64) + 1, seen)
    k.store(k.load(mine, I64) + 1, mine)
    k.store(k.load(first, I64) + k.convert(k.first, I64), first)


def nap(k: Kernel) -> None:
    """Sleeps for args[0] microseconds, then counts its chunk."""
    for_us, seen = k.load(k.slot(), I32), k.slot() + k.chunk * 8
    k.call("usleep", I32, for_us)
    k.store(k.load(seen, I64) + 1, seen)


def meet(k: Kernel) -> None:
    """Sets its chunk's flag, then waits for the other's: two threads must be here at once. Status 9 if the other never comes."""
    flags, status = k.slot(), k.slot()
    k.write(f"store atomic i64 1, ptr {(flags + k.chunk * 8).ref} release, align 8")
    other = flags + (1 - k.chunk) * 8
    with k.loop(0, 200_000, 1, [k.i64(0)]) as looks:
        there = k.instruction(f"load atomic i64, ptr {other.ref} acquire, align 8", I64)
        with k.when(there.eq(0)):
            k.call("usleep", I32, k.const(50, I32))
        looks.next(there)
    with k.when(looks.results[0].eq(0)):
        k.store(k.i64(9), status)


def fail(k: Kernel) -> None:
    """Leaves a code and details, the first of them its chunk, unless there is a code already."""
    status, code = k.slot(), k.load(k.slot(), I64)
    with k.when(k.load(status, I64).eq(0)):
        for i, detail in enumerate((k.chunk, k.i64(11), k.i64(12)), 1):
            k.store(detail, status + 8 * i)
        k.store(code, status)


@pytest.fixture(scope="module")
def jit() -> Jit:
    return Jit(host(), None)


@pytest.fixture(scope="module")
def kernels(jit: Jit) -> dict[str, int]:
    bodies = (mix, nap, meet, fail)
    return dict(zip((body.__name__ for body in bodies), compiled(jit, *bodies), strict=True))


@pytest.fixture(scope="module")
def executors(jit: Jit) -> Iterator[dict[int, Executor]]:
    made = {n: Executor(jit, n) for n in THREADS}
    yield made
    for executor in made.values():
        executor.close()


def compiled(jit: Jit, *bodies: Callable[[Kernel], None]) -> list[int]:
    texts = []
    for body in bodies:
        body(k := Kernel(jit.target))
        texts.append(k.text())
    return jit.compile(texts)


@dataclass
class Program:
    """A table, and the arrays whose addresses are in it."""

    lines: list[list[int]] = field(default_factory=list)
    kept: list[Ints] = field(default_factory=list)

    def array(self, *values: int) -> Ints:
        self.kept.append(np.array(values, np.int64))
        return self.kept[-1]

    def step(self, kernel: int, slots: list[Ints | int], items: Ints, grain: int = 1, most: int = 64) -> None:
        args = self.array(*(0 for _ in HEADER), *(s if isinstance(s, int) else address(s) for s in slots))
        self.lines.append([kernel, address(args), address(items), grain, most, 0, 0, 0])

    def run(self, executor: Executor) -> list[int] | None:
        return executor.run(*self.table())

    def table(self) -> tuple[int, int]:
        table = self.array(*itertools.chain(*self.lines))
        return address(table), len(self.lines)


def address(array: Ints) -> int:
    return int(array.ctypes.data)


def wanted_chunks(items: int, grain: int, most: int) -> int:
    return 0 if items <= 0 else min(most, -(-items // grain))


class MixProgram:
    """Steps of `mix`, each over what the one before wrote, and what must come out."""

    def __init__(self, kernel: int, steps: list[tuple[int, int, int]], threads: int) -> None:
        self.steps, self.program = steps, Program()
        source = np.arange(7, dtype=np.int64)
        self.want: list[Ints] = []
        self.got: list[tuple[Ints, Ints, Ints, Ints]] = []
        self.first_source, self.program.kept = source, [source]
        now = source
        for items, grain, most in steps:
            n_y, n_x = self.program.array(items), self.program.array(len(source))
            out, seen = np.zeros(max(items, 0), np.int64), np.zeros(most, np.int64)
            of_thread, firsts = np.zeros(threads, np.int64), np.zeros(threads, np.int64)
            self.program.kept += [out, seen, of_thread, firsts]
            self.program.step(kernel, [source, out, n_x, n_y, seen, of_thread, firsts], n_y, grain, most)
            self.got.append((out, seen, of_thread, firsts))
            if items > 0:
                i = np.arange(items)
                now = 3 * now[len(now) - 1 - i % len(now)] + i
                source = out
            self.want.append(now if items > 0 else np.zeros(0, np.int64))

    def check(self) -> None:
        for (items, grain, most), want, (out, seen, of_thread, firsts) in zip(self.steps, self.want, self.got, strict=True):
            chunks = wanted_chunks(items, grain, most)
            assert out.tolist() == want.tolist()
            assert seen.tolist() == [1] * chunks + [0] * (most - chunks)
            assert of_thread.sum() == chunks
            assert firsts.tolist() == (of_thread > 0).astype(int).tolist()


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


def test_sleep_and_wake(jit: Jit, kernels: dict[str, int]) -> None:
    """Short runs with pauses around the time after which workers go to sleep."""
    draw = random.Random(7)
    executor = Executor(jit, 3)
    programs = [MixProgram(kernels["mix"], [(draw.choice([1, 2, 5, 40]), 1, 8)] * draw.choice([1, 2, 9]), 3) for _ in range(20)]
    runs = 2000
    for _ in range(runs):
        program = draw.choice(programs)
        for out in itertools.chain(*program.got):
            out[:] = 0
        program.program.run(executor)
        program.check()
        pause = draw.choice([0, 0, 1e-4, 3e-4, 4e-4, 1e-3])
        if pause:
            time.sleep(pause * draw.random())
    assert executor.counters()[0]["runs"] == runs
    assert all(counter["runs"] <= runs for counter in executor.counters())
    executor.close()


def await_sleepers(executor: Executor) -> None:
    """Until every worker slept once more than now."""
    before = [counter["parks"] for counter in executor.counters()]
    for thread in range(1, executor.max_threads):
        end = time.monotonic() + 20
        while executor.counters()[thread]["parks"] == before[thread]:
            assert time.monotonic() < end
            time.sleep(1e-3)


def meeting(kernels: dict[str, int], executor: Executor) -> tuple[Program, Ints]:
    program, flags = Program(), np.zeros(2, np.int64)
    program.step(kernels["meet"], [flags, executor.status_address], program.array(2))
    return program, flags


def test_a_sleeper_comes(jit: Jit, kernels: dict[str, int]) -> None:
    executor = Executor(jit, 2)
    program, flags = meeting(kernels, executor)
    assert program.run(executor) is None  # the worker has just begun
    for _ in range(20):
        await_sleepers(executor)
        flags[:] = 0
        assert program.run(executor) is None
        assert flags.tolist() == [1, 1]
    assert executor.counters()[1]["chunks"] == 21
    executor.close()


def test_where_nobody_can_sleep_on_an_address(kernels: dict[str, int]) -> None:
    target = replace(host(), triple="x86_64-unknown-freebsd" if host().family == "x86_64" else "aarch64-unknown-freebsd")
    jit = Jit(target, None)
    executor = Executor(jit, 2)
    assert native_loop.LoopFunction(target, {}).futex is None
    program, flags = meeting(kernels, executor)
    for _ in range(5):
        flags[:] = 0
        assert program.run(executor) is None
        await_sleepers(executor)
    executor.close()


def test_code_for_every_target() -> None:
    for target in TARGETS.values():
        texts = [native_loop.ticks_text(target)]
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
    assert seconds[1] < 0.01
    rounds = np.array([1, 0, 3, 2]) if threads == 1 else np.array([1, 0, 1, 1])
    assert (seconds >= 0.95e-6 * np.array(us) * rounds).all()
    assert seconds.sum() <= 1.05 * passed
    mixed = MixProgram(kernels["mix"], [(40, 1, 8), (1, 1, 1), (300, 2, 64)] * 50, threads)
    assert (executor.profile(*mixed.program.table()) > 0).all()
    mixed.check()
    executor.close()


def workers_of(executor: Executor) -> list[threading.Thread]:
    return [worker for team in executor._teams.values() for worker in team.workers]


def test_close_and_reopen(jit: Jit, kernels: dict[str, int]) -> None:
    executor = Executor(jit, 3)
    executor.close()
    for asleep in (False, True, False):
        program = MixProgram(kernels["mix"], [(40, 1, 8)] * 9, 3)
        program.program.run(executor)
        program.check()
        workers = workers_of(executor)
        assert len(workers) == 2
        assert all(worker.is_alive() for worker in workers)
        if asleep:
            await_sleepers(executor)
        executor.close()
        executor.close()
        assert not any(worker.is_alive() for worker in workers)
    program.program.run(executor)
    executor.profile(*program.program.table())
    workers = workers_of(executor)
    assert len(workers) == 4
    del executor
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)


def test_set_threads(jit: Jit, kernels: dict[str, int]) -> None:
    executor = Executor(jit)
    assert executor.max_threads == usable_cores()
    for threads in (3, 1, 2):
        executor.set_threads(threads)
        assert executor.max_threads == threads == len(executor.counters())
        program = MixProgram(kernels["mix"], [(40, 1, 8)] * 9, threads)
        program.program.run(executor)
        program.check()
    for wrong in (0, -1, 1025, "many", 1.5):
        with pytest.raises(AttributeValueError, match=r"\[executor\] wanted 1 to 1024 threads"):
            executor.set_threads(wrong)  # type: ignore[arg-type]
    executor.close()


def test_exit_without_close() -> None:
    code = (
        "from tensorgraph.backends.cpu.executor import Executor\n"
        "from tensorgraph.backends.cpu.jit import Jit\n"
        "from tensorgraph.backends.cpu.target import host\n"
        "executor = Executor(Jit(host(), None), 3)\n"
        "print(executor.run(0, 0), len(executor._teams[False].workers))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=os.getcwd())
    assert (done.returncode, done.stdout, done.stderr) == (0, "None 2\n", "")


class Alarm(Exception):
    pass


def test_interrupted_run(kernels: dict[str, int], executors: dict[int, Executor]) -> None:
    """The native call finishes, then Python raises: nothing is left half way."""

    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for executor in executors.values():
            program, seen = Program(), np.zeros(8, np.int64)
            for _ in range(3):
                program.step(kernels["nap"], [program.array(10_000), seen], program.array(8))
            table = program.table()
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(Alarm):
                executor.run(*table)
            assert seen.tolist() == [3] * 8
            assert executor.run(*table) is None
            assert seen.tolist() == [6] * 8
    finally:
        signal.signal(signal.SIGALRM, before)


def test_two_callers(kernels: dict[str, int], executors: dict[int, Executor]) -> None:
    def call(program: MixProgram, executor: Executor, wrong: list[BaseException]) -> None:
        try:
            for _ in range(200):
                for out in itertools.chain(*program.got):
                    out[:] = 0
                program.program.run(executor)
                program.check()
        except BaseException as error:
            wrong.append(error)

    for threads, executor in executors.items():
        wrong: list[BaseException] = []
        programs = [MixProgram(kernels["mix"], [(40 + i, 1, 8), (1, 1, 1)], threads) for i in range(3)]
        callers = [threading.Thread(target=call, args=(program, executor, wrong)) for program in programs]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wrong


def in_child(check: Callable[[], None]) -> int:
    """Fork, check there; how the child ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            check()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing to fork with")
def test_fork(jit: Jit, kernels: dict[str, int]) -> None:
    executor = Executor(jit, 2)

    def check() -> None:
        program, _ = meeting(kernels, executor)
        assert program.run(executor) is None  # with a worker of the child's own
        assert executor.counters()[1]["chunks"] == 1
        executor.close()

    check()
    assert in_child(check) == 0  # without workers
    program, flags = meeting(kernels, executor)
    program.run(executor)
    assert in_child(check) == 0  # with workers
    flags[:] = 0
    assert program.run(executor) is None
    assert executor.counters()[1]["chunks"] == 2
    napping, seen = Program(), np.zeros(8, np.int64)
    napping.step(kernels["nap"], [napping.array(30_000), seen], napping.array(8))
    runner = threading.Thread(target=napping.run, args=(executor,))
    runner.start()
    while not seen.any():
        time.sleep(1e-3)
    assert in_child(check) == 0  # while a run goes on, which the child knows nothing of
    runner.join()
    assert seen.tolist() == [1] * 8
    executor.close()


def simulated(choice: ThreadChoice, runs: int, weight: int, alone: Callable[[], float], all_: Callable[[], float]) -> float:
    """The part of runs that were made alone."""
    count = 0
    for _ in range(runs):
        count += choice.alone
        choice.note(weight, int(1000 * (alone() if choice.alone else all_())))
    return count / runs


def test_thread_choice() -> None:
    draw = random.Random(3)

    def near(value: float) -> Callable[[], float]:
        return lambda: value * draw.uniform(0.95, 1.05)

    choice = ThreadChoice()
    assert simulated(choice, 5000, 900, near(180), near(100)) < 3 / LONGEST + 0.01  # idle: a few tries, given up early
    assert simulated(choice, 1000, 900, near(220), near(400)) > 0.95  # a neighbour came: all threads wait for the slowest
    assert simulated(choice, 2 * LONGEST, 900, near(180), near(100)) < 0.5 + TRIAL / LONGEST  # it went: noticed at the next try
    assert simulated(choice, 1000, 900, near(180), near(100)) < 0.05
    assert simulated(choice, 1000, 3, near(2), near(4)) > 0.9  # small programs have an answer of their own
    assert simulated(choice, 100, 900, near(180), near(100)) < 0.1


def test_auto(jit: Jit, kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough runs for both ways to be taken; results do not depend on it."""
    monkeypatch.setattr("tensorgraph.backends.cpu.executor.usable_cores", lambda: 2)
    executor = Executor(jit, "auto")
    taken = set()
    for i in range(3 * SHORTEST):
        program = MixProgram(kernels["mix"], [(40, 1, 8), (1, 1, 1), (300, 2, 64)] * (1 + i % 2), 2)
        assert executor._choice is not None
        taken.add(executor._choice.alone)
        program.program.run(executor)
        program.check()
    assert taken == {False, True}
    executor.close()
