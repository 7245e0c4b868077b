"""The kernels of the backend: those of every small model's steps, and of every op for a few cases, by what they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np

from tensorgraph import registry
from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.launches import Written
from tensorgraph.compiler import CompileOptions
from tensorgraph.engine import Engine
from tensorgraph.session import Session
from tensorgraph.tools.conformance.check import run_drawn
from tensorgraph.tools.conformance.draw import draw_case
from tensorgraph.tools.conformance.evaluate import evaluate, node_of
from tests.backends.cuda.bare import BareRuntime
from tests.models import tiny

FEW = ("llama", "gemma3", "deepseek_v32", "deepseek_v4")
"""Architectures that have most kinds of kernels among them."""
QUANTISED = (("llama", "q4_0"), ("llama", "f16"), ("deepseek_v4", "mxfp4"))


class Noting(CudaDevice):
    """A device that runs nothing, and knows what it was asked for."""

    def __init__(self) -> None:
        super().__init__("cuda", BareRuntime)
        self.written: dict[str, Written] = {}

    def kernels(self, written: Sequence[Written]) -> Any:
        self.written |= {each.name: each for each in written}
        return super().kernels(written)


def of_models(architectures: Sequence[str]) -> dict[str, Written]:
    """Of prompts of two lengths and of one token more, by name."""
    device = Noting()
    for architecture, kind in [*((a, "f32") for a in architectures), *QUANTISED]:
        engine = Engine(tiny.model(architecture, kind), device, kv_dtype="f16", options=CompileOptions())
        ids = tiny.tokens(architecture)
        with Session(engine) as session:
            session.eval(ids[:40])
            session.eval(ids[40:43])
            session.eval(ids[43:44])
    return device.written


def of_ops(examples: int) -> dict[str, Written]:
    """Of a few drawn cases of each op that has kernels here, by name; the same in every run."""
    device = Noting()
    for name in registry.ops:
        op = registry.ops.get(name)

        def one(data: Any, op: Any = op) -> None:
            slots, attrs = draw_case(op, data.draw)
            node = node_of(op, {slot: np.asarray(x) for slot, x in slots.items()}, attrs)
            if device.supports(node):
                evaluate(node, slots, device)

        run_drawn(hypothesis, one, examples, 5)
    return device.written
