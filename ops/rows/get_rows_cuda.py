"""Rows by number on CUDA, decoded on the way where they are held in planes."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cuda.launches import Call, Context, Launch, NodeKernel, Ref, Template
from tensorgraph.backends.cuda.weights import LAYOUT, reads_planes
from tensorgraph.dims import product
from tensorgraph.graph import Node
from tensorgraph.ops.rows.get_rows import get_rows

FILE = "tensorgraph.ops.rows:get_rows.cu"
MESSAGES = ("[get_rows] ids must be below {1}, or -1 for none; got {0}",)
PIECE = 1024
"""Elements of a row that a block moves."""


def reads(node: Node, slot: str) -> tuple[str, ...]:
    """A table that products read too is held once, as they hold it."""
    return reads_planes(node.at("a")) if slot == "a" else ()


def calls(node: Node, context: Context) -> Sequence[Call]:
    a, ids = node.inputs
    operands = {"a": Ref(a, LAYOUT if context.layout(a) == LAYOUT else "dense"), "ids": Ref(ids), "y": Ref(node)}
    items = product(node.shape[:-1]) * ((node.shape[-1] + (PIECE - 1)) // PIECE)
    return [Launch(Template(FILE, "get_rows", messages=MESSAGES), operands, items=items, nodes=(node,))]


get_rows.kernels["cuda"] = NodeKernel(calls, reads=reads)
