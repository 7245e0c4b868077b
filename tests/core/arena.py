"""Playing a plan's memory through, byte by byte."""

from __future__ import annotations

import numpy as np

from tensorgraph.graph import Node
from tensorgraph.memory import ALIGNMENT, MemoryPlan, needs_storage, storage_roots
from tensorgraph.op import node_bytes
from tensorgraph.plan import Plan


def play(order: list[Node], kept: list[Node], memories: list[MemoryPlan]) -> None:
    """Every node writes its number over its buffer; whoever reads a node finds its number everywhere in it."""
    where = {n: (m, b) for m in memories for n, b in m.buffers.items()}
    bytes_of = {id(m): np.full(m.peak_bytes, -1, np.int64) for m in memories}
    number = {n: i for i, n in enumerate(order)}

    def check(reader: object, node: Node) -> None:
        for root in storage_roots(node):
            if needs_storage(root):
                memory, buffer = where[root]
                held = bytes_of[id(memory)][buffer.offset : buffer.offset + node_bytes(root)]
                assert len(held) == node_bytes(root) and (held == number[root]).all(), (
                    f"{root!r} is overwritten before {reader!r}"
                )

    for node in order:
        if node.op not in ("view", "choose"):
            for source in node.inputs:
                check(node, source)
        if needs_storage(node):
            memory, buffer = where[node]
            assert buffer.offset % ALIGNMENT == 0 and buffer.size_bytes >= node_bytes(node)
            bytes_of[id(memory)][buffer.offset : buffer.offset + buffer.size_bytes] = number[node]
    for node in kept:
        check("the end", node)


def play_plan(plan: Plan) -> None:
    """`play` for a whole plan, as its splits run one after another on their devices, each with its copies first."""
    order = [n for split in plan.scheduled.splits for n in sorted(split.nodes, key=lambda n: n.op != "copy")]
    play(order, list(plan.graph.outputs.values()), list(plan.memory.values()))
    for device, memory in plan.memory.items():
        assert {n for n in order if needs_storage(n) and plan.scheduled.device[n] == device} == set(memory.buffers)
        ends = [b.offset + b.size_bytes for b in memory.buffers.values()]
        assert memory.peak_bytes == max(ends, default=0) <= memory.total_bytes
