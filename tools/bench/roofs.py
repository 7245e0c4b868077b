"""What the machine can do at the moment: bytes read from memory, and f32 and int8 arithmetic, by native kernels.

The kernels do nothing else, so that no program does better: they are what speeds are fractions of.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from threading import Barrier
from typing import Any

import numpy as np

from tensorgraph.backends.cpu.emit import Function, Loop
from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, I64, PTR, Type, Value
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.target import Target, host
from tensorgraph.tools.bench.machine import l3_bytes

CHAINS = 10
"""Independent sums: enough to hide an operation's latency, few enough for 16 registers."""
TURNS = 100_000
BLOCK_WORDS = 1 << 21
READ_S, LATE_S, LATE_TURNS, LATE_ROUNDS = 0.03, 0.001, 20_000, 11
LEAST_BYTES, MOST_BYTES = 1 << 28, 1 << 31


@dataclass(frozen=True)
class Roofs:
    """Rates with one number of threads.

    Units: `stream_gbs` 1e9 bytes read a second, of data much larger than the caches; `fma_gflops` 1e9 f32 operations a second,
    two a multiply-add; `dot_gops` the same of int8 products summed in int32, None where the target has no instruction for it;
    `late_fma_gflops` f32 operations in the first `LATE_S` after memory was read for a while, when cores may run slower; None
    where it was not measured.
    """

    stream_gbs: float
    fma_gflops: float
    dot_gops: float | None
    late_fma_gflops: float | None = None


def measure(threads: int, seconds: float) -> Roofs:
    """Measure each roof for a third of `seconds`."""
    kernels, each = _kernels(), seconds / 3
    slices = np.array_split(_data(), threads)

    def stream(part: np.ndarray[Any, Any]) -> Callable[[], int]:
        blocks = [part[at : at + BLOCK_WORDS] for at in range(0, len(part), BLOCK_WORDS)]
        turn = iter(range(1 << 62))

        def read() -> int:
            block = blocks[next(turn) % len(blocks)]
            n_bytes = block.nbytes // kernels.step_bytes * kernels.step_bytes
            kernels.stream(block.ctypes.data, n_bytes)
            return n_bytes

        return read

    def compute(kernel: Any, operations: int) -> Callable[[], int]:
        def run() -> int:
            kernel(TURNS)
            return operations * TURNS

        return run

    dot = kernels.dot
    return Roofs(
        rate([stream(part) for part in slices], each) / 1e9,
        rate([compute(kernels.fma, kernels.fma_operations)] * threads, each) / 1e9,
        rate([compute(dot, kernels.dot_operations)] * threads, each) / 1e9 if dot is not None else None,
    )


def fma_after_reading(threads: int) -> float:
    """1e9 f32 operations a second of so many threads, in the first `LATE_S` after each has read memory for `READ_S`; medians."""
    kernels, slices, start = _kernels(), np.array_split(_data(), threads), Barrier(threads)

    def one(part: np.ndarray[Any, Any]) -> float:
        n_bytes = min(part.nbytes, BLOCK_WORDS * 8) // kernels.step_bytes * kernels.step_bytes
        blocks = [part[at : at + BLOCK_WORDS] for at in range(0, len(part) - n_bytes // 8 + 1, BLOCK_WORDS)]
        found = []
        for _ in range(LATE_ROUNDS):
            start.wait()
            began, i = time.perf_counter(), 0
            while time.perf_counter() - began < READ_S or not i:
                kernels.stream(blocks[i % len(blocks)].ctypes.data, n_bytes)
                i += 1
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < LATE_S or not done:
                kernels.fma(LATE_TURNS)
                done += 1
            found.append(done * kernels.fma_operations * LATE_TURNS / (time.perf_counter() - began) / 1e9)
        return float(np.median(found))

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one, slices))


def rate(works: Sequence[Callable[[], int]], seconds: float) -> float:
    """What all threads do in a second, each calling its function, which returns how much it did, for `seconds`."""
    start = Barrier(len(works))

    def repeat(work: Callable[[], int]) -> float:
        start.wait()
        began, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds or not done:
            done += work()
        return done / spent

    with ThreadPoolExecutor(len(works)) as pool:
        return sum(pool.map(repeat, works))


@cache
def _data() -> np.ndarray[Any, Any]:
    return np.ones(min(max(LEAST_BYTES, 4 * l3_bytes()), MOST_BYTES) // 8, np.uint64)


@dataclass(frozen=True)
class _Kernels:
    """Native functions, and what one turn of each does."""

    stream: Any
    step_bytes: int
    fma: Any
    fma_operations: int
    dot: Any | None
    dot_operations: int
    jit: Jit  # the code lives as long as it does


@cache
def _kernels() -> _Kernels:
    target, step = host(), dot_step(host())
    functions = [stream_kernel(target), fma_kernel(target), *([dot_kernel(target, step)] if step is not None else [])]
    jit = Jit(target, None)
    stream, fma, *dot = jit.compile([f.text() for f in functions])
    turns = ctypes.c_int64
    return _Kernels(
        stream=ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)(stream),
        step_bytes=CHAINS * target.vector_bytes,
        fma=ctypes.CFUNCTYPE(ctypes.c_float, turns)(fma),
        fma_operations=2 * CHAINS * target.vector_bytes // 4,
        dot=ctypes.CFUNCTYPE(ctypes.c_int32, turns)(dot[0]) if dot else None,
        dot_operations=2 * CHAINS * step.bytes if step is not None else 0,
        jit=jit,
    )


def stream_kernel(target: Target) -> Function:
    """`kernel(data, n) -> sum of its 64-bit words`; n a multiple of `CHAINS` vectors, in bytes.

    Both halves are read at once: a core has more on the way from memory so than in one place.
    """
    f = Function("kernel", {"data": PTR, "n": I64}, target, I64)
    words, width, each = I64.x(target.vector_bytes // 8), target.vector_bytes, CHAINS // 2
    half = f.parameters["n"] // 2
    with f.loop(0, half, each * width, [f.zero(words)] * CHAINS) as loop:
        near = f.parameters["data"] + loop.i
        places = [start + k * width for start in (near, near + half) for k in range(each)]
        loop.next(*(v + f.load(place, words) for v, place in zip(loop.values, places, strict=True)))
    f.ret(_sum(f, loop))
    return f


def fma_kernel(target: Target) -> Function:
    """`kernel(turns) -> a sum that every multiply-add counts in`."""
    f = Function("kernel", {"turns": I64}, target, F32)
    type = F32.x(target.vector_bytes // 4)
    with f.loop(0, f.parameters["turns"], 1, [f.const(k, type) for k in range(CHAINS)]) as loop:
        loop.next(*(f.fma(v, 0.5, 1.0) for v in loop.values))
    f.ret(_sum(f, loop))
    return f


@dataclass(frozen=True)
class DotStep:
    """The target's int8 dot product: bytes of each operand, and `add(f, sums, a, b)`, sums + products of four neighbours."""

    bytes: int
    add: Callable[[Function, Value, Value, Value], Value]


def dot_step(target: Target) -> DotStep | None:
    """None where the target has no such instruction."""
    for feature, name, size in (
        ("vnni", "llvm.x86.avx512.vpdpbusd.512", 64),
        ("avxvnni", "llvm.x86.avx512.vpdpbusd.256", 32),
        ("dotprod", "llvm.aarch64.neon.sdot.v4i32.v16i8", 16),
    ):
        if feature in target.has:
            return DotStep(size, partial(_dot_call, name))
    return DotStep(32, _dot_avx2) if "avx2" in target.has else None


def _dot_call(name: str, f: Function, sums: Value, a: Value, b: Value) -> Value:
    return f.call(name, sums.type, sums, a, b)


def _dot_avx2(f: Function, sums: Value, a: Value, b: Value) -> Value:
    pairs = f.call("llvm.x86.avx2.pmadd.ub.sw", I16.x(16), a, b)
    return sums + f.call("llvm.x86.avx2.pmadd.wd", I32.x(8), pairs, f.const(1, I16.x(16)))


def dot_kernel(target: Target, step: DotStep) -> Function:
    """`kernel(turns) -> a sum that every product counts in`."""
    f = Function("kernel", {"turns": I64}, target, I32)
    sums: Type = I32.x(step.bytes // 4)
    with f.loop(0, f.parameters["turns"], 1, [f.const(k, sums) for k in range(CHAINS)]) as loop:
        # the sums are an operand too: with two constants there would be nothing to compute in a turn
        loop.next(*(step.add(f, v, v.bits_as(I8.x(step.bytes)), f.const(3, I8.x(step.bytes))) for v in loop.values))
    f.ret(_sum(f, loop))
    return f


def _sum(f: Function, loop: Loop) -> Value:
    total = loop.results[0]
    for value in loop.results[1:]:
        total = total + value
    return f.sum(total)
