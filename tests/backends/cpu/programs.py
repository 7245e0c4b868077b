"""Programs for the executor whose every result, chunk and thread can be checked, and the kernels that they are made of."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu.executor import Executor
from tensorgraph.backends.cpu.ir import I32, I64
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.kernel import HEADER, Kernel

Ints = NDArray[np.int64]


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


def ring(k: Kernel) -> None:
    """Raises the signal args[0] from inside the native call."""
    k.call("raise", I32, k.load(k.slot(), I32))


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


def compiled_kernels(jit: Jit) -> dict[str, int]:
    """The address of each, by name."""
    bodies = (mix, nap, ring, meet, fail)
    texts = []
    for body in bodies:
        body(k := Kernel(jit.target))
        texts.append(k.text())
    return dict(zip((body.__name__ for body in bodies), jit.compile(texts), strict=True))


@dataclass
class Program:
    """A table, and the arrays whose addresses are in it."""

    lines: list[list[int]] = field(default_factory=list)
    kept: list[Ints] = field(default_factory=list)

    def array(self, *values: int) -> Ints:
        self.kept.append(np.array(values, np.int64))
        return self.kept[-1]

    def step(
        self, kernel: int, slots: list[Ints | int], items: Ints, grain: int = 1, most: int = 64, apart: bool = False
    ) -> None:
        args = self.array(*(0 for _ in HEADER), *(s if isinstance(s, int) else address(s) for s in slots))
        self.lines.append([kernel, address(args), address(items), grain, most, int(apart), 0, 0])

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
            apart = len(self.got) % 2 == 1
            self.program.step(kernel, [source, out, n_x, n_y, seen, of_thread, firsts], n_y, grain, most, apart)
            self.got.append((out, seen, of_thread, firsts))
            if items > 0:
                i = np.arange(items)
                now = 3 * now[len(now) - 1 - i % len(now)] + i
                source = out
            self.want.append(now if items > 0 else np.zeros(0, np.int64))

    def clear(self) -> None:
        """As it was before a run."""
        for out in itertools.chain(*self.got):
            out[:] = 0

    def check(self) -> None:
        for (items, grain, most), want, (out, seen, of_thread, firsts) in zip(self.steps, self.want, self.got, strict=True):
            chunks = wanted_chunks(items, grain, most)
            assert out.tolist() == want.tolist()
            assert seen.tolist() == [1] * chunks + [0] * (most - chunks)
            assert of_thread.sum() == chunks
            assert firsts.tolist() == (of_thread > 0).astype(int).tolist()


def await_sleepers(executor: Executor, beyond: int = 0) -> None:
    """Until every worker slept more than so many times."""
    for thread in range(1, executor.max_threads):
        end = time.monotonic() + 20
        while executor.counters()[thread]["parks"] <= beyond:
            assert time.monotonic() < end
            time.sleep(1e-3)


def meeting(kernels: dict[str, int], executor: Executor) -> tuple[Program, Ints]:
    program, flags = Program(), np.zeros(2, np.int64)
    program.step(kernels["meet"], [flags, executor.status_address], program.array(2))
    return program, flags
