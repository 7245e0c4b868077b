"""Where a team waits: told apart by what is read and written before and after, in loops and branches."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tensorgraph.backends.cpu.ir import F32, I32
from tensorgraph.backends.cuda.writer import CudaKernel, Param

WAIT = "__syncwarp();"
Write = Callable[[CudaKernel], None]


def waits(write: Write, lanes: int = 32) -> list[str]:
    """The lines of a kernel between whose accesses a wait stands: "load", "store", "wait", in order."""
    k = CudaKernel(lanes, 128, 4096)
    write(k)
    found = []
    for line in k.source("k").splitlines():
        if "__sync" in line:
            found.append("wait")
        elif line.startswith("for"):
            found.append("for")
        elif "= *(const" in line or ")[lane];" in line:
            found.append("load")
        elif "*(int*)" in line or "*(float*)" in line or "[lane] =" in line:
            found.append("store")
    return found


def operand(k: CudaKernel, name: str = "y"):  # type: ignore[no-untyped-def]
    from tensorgraph.backends.cpu.ir import PTR

    return k.param(Param("address", name), PTR)


def vector(k: CudaKernel):  # type: ignore[no-untyped-def]
    return k.zero(F32.x(32))


def written_then_read_by_all(k: CudaKernel) -> None:
    y = operand(k)
    k.store(vector(k), y)
    k.load(y, I32)


def written_then_read_by_its_own_lanes(k: CudaKernel) -> None:
    y = operand(k)
    k.store(vector(k), y)
    k.load(y, F32.x(32))


def another_operand(k: CudaKernel) -> None:
    x, y = operand(k, "x"), operand(k)
    k.store(vector(k), y)
    k.load(x, I32)


def read_then_written(k: CudaKernel) -> None:
    y = operand(k)
    k.load(y, I32)
    k.store(k.const(1, I32), y)


def scratch_and_operand(k: CudaKernel) -> None:
    y, memory = operand(k), k.scratch()
    k.store(vector(k), memory)
    k.load(y, I32)
    k.load(memory + 4, I32)


def a_loop_that_reads_what_the_turn_before_wrote(k: CudaKernel) -> None:
    y = operand(k)
    with k.loop(0, 9) as loop:
        k.store(vector(k), y + loop.i * 128)
        k.load(y + 4, I32)
        loop.next()


def a_loop_that_reads(k: CudaKernel) -> None:
    y = operand(k)
    k.store(vector(k), y)
    with k.loop(0, 9) as loop:
        k.load(y + loop.i * 4, I32)
        loop.next()


def a_branch_that_writes(k: CudaKernel) -> None:
    x, y = operand(k, "x"), operand(k)
    with k.when(k.load(x, I32).gt(0)):
        k.store(vector(k), y)
    k.load(y, I32)


def a_branch_that_waits(k: CudaKernel) -> None:
    x, y = operand(k, "x"), operand(k)
    some = k.load(x, I32).gt(0)
    k.store(vector(k), y)
    k.either(some, lambda: [k.load(y, I32)], lambda: [k.const(0, I32)])
    k.load(y + 8, I32)


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (written_then_read_by_all, ["store", "wait", "load"]),
        (written_then_read_by_its_own_lanes, ["store", "load"]),
        (another_operand, ["store", "load"]),
        (read_then_written, ["load", "wait", "store"]),
        (scratch_and_operand, ["store", "load", "wait", "load"]),
        (a_loop_that_reads_what_the_turn_before_wrote, ["for", "store", "wait", "load", "wait"]),
        (a_loop_that_reads, ["store", "wait", "for", "load"]),
        (a_branch_that_writes, ["load", "store", "wait", "load"]),
        (a_branch_that_waits, ["load", "store", "wait", "load", "wait", "load"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_waits(write: Write, found: list[str]) -> None:
    assert waits(write) == found


def test_a_thread_alone_never_waits() -> None:
    def write(k: CudaKernel) -> None:
        y = operand(k)
        k.store(k.const(1, I32), y)
        k.load(y, I32)

    assert waits(write, lanes=1) == ["store", "load"]


def test_a_team_that_is_a_block_waits_for_the_block() -> None:
    k = CudaKernel(128, 128, 0)
    written_then_read_by_all(k)
    assert "__syncthreads();" in k.source("k") and WAIT not in k.source("k")
