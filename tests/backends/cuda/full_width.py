"""Kernels of real models' steps at full width: planned as `tensorgraph plan` does, without weights or memory for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tensorgraph.backends.cuda.device import CudaDevice, Held
from tensorgraph.backends.cuda.launches import Written
from tensorgraph.backends.cuda.program import Program
from tensorgraph.backends.cuda.runtime import Memory
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import Part, stream_layouts
from tensorgraph.dtypes import f16
from tensorgraph.extents import Extents
from tensorgraph.models import Model
from tensorgraph.models.builder import FileWeights
from tensorgraph.plan import Plan
from tensorgraph.tools.model_argument import described_model
from tensorgraph.tools.plan import step_dims
from tensorgraph.tools.synth.rules import TypeRules
from tensorgraph.tools.synth.shape import shape_of
from tests.backends.cuda.bare import BareRuntime

CONTEXT = 1 << 15


@dataclass(frozen=True)
class Width:
    """A published configuration: which of its layers, one of each kind, and the types of its matrices.

    Attributes:
        only: a pattern of what the labels of its kernels contain.
        changes: of what makes a kernel longer, and no different.
    """

    name: str
    layers: str
    types: tuple[str, ...]
    exact: bool = False
    only: str = ""
    changes: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 512)

    def model(self) -> Model:
        with described_model(self.name) as described:
            shape = shape_of(described, TypeRules(self.types), layers=self.layers, changes=self.changes)
        return replace(shape.model, catalog=FileWeights({t.name: (tuple(t.shape), t.dtype) for t in shape.tensors}))


EXPERTS = ("*ffn_gate_exps*=iq2_xxs", "*ffn_up_exps*=iq2_xxs", "*ffn_down_exps*=q2_k")
MIXED = ("q4_k/q8_0", "*attn_v.*=q6_k", "*ffn_down*=q6_k/q8_0", "output*=q6_k")
FEWER = ("hc_sinkhorn_iters=6",)
"""As many times the same instructions follow each other."""
EXACT = "flash_attn|combine|index_|_exact"
"""What differs where a step is exact."""
WINDOWED = r"flash_attn.*Rule<1, [1-9]"
WIDTHS = (
    Width("llama-3.1-8b", "1", MIXED, steps=(1, 4, 512)),
    Width("deepseek-v3.2", "0,3", (MIXED[0], *MIXED[2:])),
    Width("deepseek-v4-flash", "0,2,3,4", ("q8_0", *EXPERTS), changes=FEWER),
    Width("deepseek-v4-flash", "4,", ("q8_0", "*_exps*=mxfp4"), changes=FEWER),
    Width("gemma3-1b", "6", ("f16",), only=WINDOWED),
    Width("gpt-oss-20b", "2", ("f16",), only=WINDOWED),
    Width("llama-3.1-8b", "1", ("f16",), exact=True, only=EXACT),
    Width("deepseek-v3.2", "0,", ("f16",), exact=True, only=EXACT),
)


class Unread(CudaDevice):
    """A device without memory: constants lie nowhere."""

    def __init__(self) -> None:
        super().__init__("cuda", BareRuntime)

    def require(self, arena_bytes: int) -> None: ...


def kernels_of(width: Width) -> dict[str, Written]:
    """By name, of steps of so many tokens at the end of a long context: of one token, of a few, and of a prompt."""
    model, device, found = width.model(), Unread(), {}
    extents = Extents(max(width.steps), CONTEXT)
    graph = model.graph(extents, f16)
    layouts = stream_layouts(graph, model.states(), [device])
    plan = compile(graph, device, CompileOptions(layouts=layouts, exact=width.exact))
    for tokens in width.steps:
        dims = step_dims(model, extents, tokens)
        for program in programs(plan, device, plan.choose(dims)):
            for call in program.made_calls(dims):
                written = program._write(call)
                if re.search(width.only, written.label):
                    found[written.name] = written
                    BareRuntime.starts(written.name, program._shared_bytes(call))
    return found


def programs(plan: Plan, device: Unread, choice: tuple[int, ...]) -> Iterator[Program]:
    """As an `Executable` makes them of a plan."""
    active, taken = plan.active(choice), dict(zip(plan.choices, choice, strict=True))
    constants: dict[Any, Any] = {}
    for node in (i for split in plan.scheduled.splits for n in split.nodes for i in n.inputs if i.op == "constant"):
        constants[node] = Held(Memory(0, 0, None), device.constant_layout(node, plan.graph), (), node.dtype.numpy)
    for split, groups in zip(plan.scheduled.splits, plan.groups, strict=True):
        nodes = tuple(n for n in split.nodes if n in active)
        made = tuple(g for g in groups if not active.isdisjoint(g.nodes))
        yield Program(device, Part(nodes, frozenset(), taken, made, plan.memory[device.name], constants, plan.options))


def kernels(steps: tuple[int, ...] = ()) -> dict[str, Written]:
    """By name; of other steps than the usual ones where they are given."""
    widths = [replace(width, steps=steps or width.steps) for width in WIDTHS]
    return {name: kernel for width in widths for name, kernel in kernels_of(width).items()}
