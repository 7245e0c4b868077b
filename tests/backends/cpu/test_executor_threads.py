"""The executor's threads in every bad moment: asleep, interrupted, forked, closed, called by several, out of processors."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from tensorgraph.backends.cpu.executor import Executor, usable_cores
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.loop_function import LoopFunction
from tensorgraph.backends.cpu.target import host
from tensorgraph.errors import AttributeValueError
from tests.backends.cpu.programs import MixProgram, Program, await_sleepers, compiled_kernels, meeting

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


def test_sleep_and_wake(jit: Jit, kernels: dict[str, int]) -> None:
    """Short runs with pauses around the time after which workers go to sleep."""
    draw = random.Random(7)
    executor = Executor(jit, 3)
    programs = [MixProgram(kernels["mix"], [(draw.choice([1, 2, 5, 40]), 1, 8)] * draw.choice([1, 2, 9]), 3) for _ in range(20)]
    runs = 2000
    for _ in range(runs):
        program = draw.choice(programs)
        program.clear()
        program.program.run(executor)
        program.check()
        pause = draw.choice([0, 0, 1e-4, 3e-4, 4e-4, 1e-3])
        if pause:
            time.sleep(pause * draw.random())
    assert executor.counters()[0]["runs"] == runs
    assert all(counter["runs"] <= runs for counter in executor.counters())
    executor.close()


def test_a_sleeper_comes(jit: Jit, kernels: dict[str, int]) -> None:
    executor = Executor(jit, 2)
    program, flags = meeting(kernels, executor)
    for run in range(21):
        slept = executor.counters()[1]["parks"]
        flags[:] = 0
        assert program.run(executor) is None  # at first the worker has just begun, then it sleeps
        assert flags.tolist() == [1, 1]
        assert executor.counters()[1]["chunks"] == run + 1
        await_sleepers(executor, slept)
    executor.close()


def test_where_nobody_can_sleep_on_an_address(kernels: dict[str, int]) -> None:
    target = replace(host(), triple="x86_64-unknown-freebsd" if host().family == "x86_64" else "aarch64-unknown-freebsd")
    jit = Jit(target, None)
    executor = Executor(jit, 2)
    assert LoopFunction(target, {}).futex is None
    program, flags = meeting(kernels, executor)
    for _ in range(5):
        flags[:] = 0
        assert program.run(executor) is None
        await_sleepers(executor)
    executor.close()


def workers_of(executor: Executor) -> list[threading.Thread]:
    return [worker for team in (executor.team, executor._timed) if team for worker in team.workers]


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
        "print(executor.run(0, 0), len(executor.team.workers))\n"
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
            program.step(kernels["ring"], [program.array(signal.SIGALRM)], program.array(1))
            for _ in range(3):
                program.step(kernels["nap"], [program.array(1000), seen], program.array(8))
            table = program.table()
            with pytest.raises(Alarm):
                executor.run(*table)
            assert seen.tolist() == [3] * 8
            assert executor.run(table[0] + 8 * len(program.lines[0]), table[1] - 1) is None  # all but the ringing
            assert seen.tolist() == [6] * 8
    finally:
        signal.signal(signal.SIGALRM, before)


def test_two_callers(kernels: dict[str, int], executors: dict[int, Executor]) -> None:
    def call(program: MixProgram, executor: Executor, wrong: list[BaseException]) -> None:
        try:
            for _ in range(200):
                program.clear()
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
