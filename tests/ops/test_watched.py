"""Memory, threads, in-place results and guarded forms: conformance sees what a kernel does beside its result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.backends.reference.device import ReferenceDevice
from tensorgraph.graph import STRUCTURAL
from tensorgraph.op import Op
from tensorgraph.tools.conformance import check


class WatchedArena(ReferenceDevice):
    """A device that has an arena and threads as the CPU has, and computes one op, over memory, by a function of its own."""

    def __init__(self, name: str, compute: Any) -> None:
        super().__init__(name)
        self.arena, self.threads, self.compute = np.zeros(1 << 24, np.uint8), 1, compute
        self.buffers: dict[Any, Any] = {}

    def fill_arena(self, n_bytes: int, value: int) -> bool:
        self.arena[:n_bytes] = value
        return True

    def arena_bytes(self, n_bytes: int) -> Any:
        return self.arena[:n_bytes]

    def set_threads(self, threads: Any) -> None:
        self.threads = threads

    def compile(self, part: Any) -> Any:
        right = super().compile(part)

        def run(values: Any, step: Any) -> None:
            right(values, step)
            self.buffers = part.memory.buffers
            for node in part.nodes:
                if node.op not in STRUCTURAL:
                    compute = nothing_wrong if node.op == "cont" else self.compute
                    compute(self, node, part.memory.buffers[node].offset, values, step)

        return run


def nothing_wrong(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
    if node not in values:  # done with
        return
    raw = np.ascontiguousarray(values[node]).reshape(-1).view(np.uint8)
    device.arena[offset : offset + len(raw)] = raw


def one_byte_too_many(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
    nothing_wrong(device, node, offset, values, step)
    if node in values:
        device.arena[offset + values[node].nbytes] = 0


def one_byte_before(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
    nothing_wrong(device, node, offset, values, step)
    device.arena[offset - 1] = 0


def minus_one_behind(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
    """What memory is filled with, but not always."""
    nothing_wrong(device, node, offset, values, step)
    if node in values:
        device.arena[offset + values[node].nbytes] = 0xFF


def too_many_on_three_threads(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
    (one_byte_too_many if device.threads == 3 else nothing_wrong)(device, node, offset, values, step)


def writes_its_input(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
    nothing_wrong(device, node, offset, values, step)
    x = values[node.inputs[0].base]
    if x.size:
        x.reshape(-1).view(np.uint8)[:1] ^= 1


def by_threads(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
    nothing_wrong(device, node, offset, values, step)
    if node in values:
        values[node] = values[node] + np.asarray(device.threads == 3, values[node].dtype)


@pytest.mark.parametrize(
    ("compute", "part", "message"),
    [
        (nothing_wrong, None, ""),
        (one_byte_too_many, "memory", "1 bytes outside of results were written, the first at byte"),
        (one_byte_before, "memory", "1 bytes outside of results were written, the first at byte"),
        (minus_one_behind, "memory", "1 bytes outside of results were written, the first at byte"),
        (too_many_on_three_threads, "memory", "1 bytes outside of results were written, the first at byte"),
        (writes_its_input, "memory", "byte 0 of the copy of the input x has changed"),
        (by_threads, "threads", "with 3 threads the same plan gives other bits"),
    ],
)
def test_memory_and_threads_are_watched(compute: Any, part: str | None, message: str) -> None:
    report = check("silu", WatchedArena("watched", compute), examples=60, seed=3)
    assert (report.failure.part if report.failure else None) == part, str(report)
    assert report.failure is None or message in report.failure.message


def test_a_result_in_its_inputs_memory_is_compared() -> None:
    """Of an op that reads its input's first element after it has written it, where both are one."""

    def read_late(device: Any, node: Any, offset: int, values: Any, step: Any) -> None:
        nothing_wrong(device, node, offset, values, step)
        below = device.buffers.get(node.inputs[0].base)
        if below is not None and below.offset == offset and values[node].size:
            values[node] = np.array(values[node])
            values[node].reshape(-1)[-1:] = 7

    report = check("silu", WatchedArena("watched", read_late), examples=60, seed=3)
    assert report.failure is not None and report.failure.part == "in place"
    assert report.failure.message == "the result is another one where it takes the memory of x"


def test_every_guarded_form_is_compared() -> None:
    op = Op("two_forms", "x[...]: real -> y[...]: x", attrs={})
    try:
        op.reference(lambda x: 2 * x)
        op.lowering("right", guard=lambda node: True)(lambda x: x + x)
        assert check(op, "reference", examples=30, seed=3).ok
        op.lowering("wrong", guard=lambda node: True)(lambda x: x * 2.001)
        failure = check(op, "reference", examples=30, seed=3).failure
        assert failure is not None and failure.part == "lowering wrong"
    finally:
        registry.ops.remove("two_forms")
