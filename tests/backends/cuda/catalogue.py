"""The kernels of the backend: those of real models' and small models' steps, and of each op for a few cases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
from tests.backends.cuda import full_width
from tests.backends.cuda.bare import BareRuntime
from tests.models import tiny

FEW = ("llama", "gemma3", "deepseek_v32", "deepseek_v4")
"""Architectures that have most kinds of kernels among them."""
QUANTISED = (("llama", "q4_0"), ("llama", "f16"), ("deepseek_v4", "mxfp4"))

NUMBERS = re.compile(r"({norm}), [^,]+, \d+,|(?<=Logits<)\d+u|(?<=, )[1-9]\d*ll")
"""In a joined product's call: eps, and how much of a row is held at once; in attention's, the scale and a window."""
PARTS = re.compile(r"(part<[^>]*>\([^)]*\)(, )?)+")
NUMBER = re.compile(r"\b\d+(u|ll)?\b")


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


def by_label(kernels: Iterable[Written]) -> dict[str, Written]:
    """One of those that differ in such numbers alone."""
    found: dict[str, Written] = {}
    for kernel in kernels:
        found.setdefault(NUMBERS.sub(lambda match: match[1] or "N", kernel.label), kernel)
    return found


def family(label: str) -> str:
    """Kernels of one function and the same types, whatever its numbers and how many products it joins."""
    function, _, operands = label.rpartition(" (")
    types = {operand.rpartition(" ")[2] for operand in operands.rstrip(")").split(", ")}
    return f"{NUMBER.sub('N', PARTS.sub('parts', function))} {sorted(types)}"


def of_all_kinds() -> dict[str, Written]:
    """Those of real models at their widths, and of small models one of each family that those lack, by label."""
    found = by_label(full_width.kernels().values())
    seen = {family(label) for label in found}
    for label, kernel in sorted(by_label(of_models(FEW).values()).items()):
        if family(label) not in seen:
            seen.add(family(label))
            found[label] = kernel
    return found
