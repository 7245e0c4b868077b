"""What a check found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tensorgraph.dims import shape_text
from tensorgraph.graph import Node
from tensorgraph.text import attr_text
from tensorgraph.tools.testing.difference import Difference, Statistics
from tensorgraph.tools.testing.source_lines import source_text

Stage = Literal["plan", "session", "graph"]


@dataclass(frozen=True)
class Described:
    """A node for people.

    Attributes:
        name: its own, that of its stream, or of the weight or stream that it reads; `after NAME` where others read it for it.
        where: the model's source line; `text` is what stands there, where the file is known.
    """

    op: str
    name: str
    where: str
    text: str
    shape: str
    dtype: str
    attrs: Mapping[str, str]

    @staticmethod
    def of(node: Node) -> Described:
        attrs = {k: attr_text(v) for k, v in node.attrs.items() if v is not None and k not in ("map", "guards")}
        name = node.attrs.get("stream", "") or node.name or _named_before(node)
        where, shape = node.where, shape_text(node.shape)
        return Described(node.op, name, where, source_text(where), shape, node.dtype.name, attrs)

    def __str__(self) -> str:
        name, where = (f" {self.name}" if self.name else ""), (f" ({self.where})" if self.where else "")
        return f"{self.op}{name} {self.dtype}{self.shape}{where}"


def _named_before(node: Node) -> str:
    """The nearest weight, stream or named value that a node is computed from."""
    level, after = [i.base for i in node.inputs], ""
    while level:
        for source in level:
            if source.op != "input" and source.name:
                return after + source.name
        level, after = list(dict.fromkeys(i.base for source in level for i in source.inputs)), "after "
    return ""


@dataclass(frozen=True)
class InputValue:
    """An input of a wrong node: its slot, what gives it, and what its values are like."""

    slot: str
    source: Described
    statistics: Statistics


@dataclass(frozen=True)
class Fault:
    """The first value that is wrong although its inputs are right.

    Attributes:
        node: whose value it is.
        number: of that node in its graph, as `print` shows it.
        extents: its shape in this step.
        together: all nodes that are wrong when they are computed together; the node alone where it is wrong by itself.
        alone: whether they are wrong, too, taken out of the graph.
        passes: those without which it comes right; `grouping` is the device's own joining of nodes.
        step: number of the step, and how many tokens were there before.
        block: the source line of the shared building block that made it, where a model's line calls one.
        stage: where it shows: in the plan of a step; in a `session`, which steps on prepared plans, each step being right; or
            in the `graph`, which gives something else than the model as it is written, before rows are chosen early.
        reproduction: the file that holds it, where one was asked for; `unsaved` says why there is none.
    """

    node: Described
    number: int
    extents: tuple[int, ...]
    together: tuple[Described, ...]
    difference: Difference
    inputs: tuple[InputValue, ...]
    alone: bool
    passes: tuple[str, ...]
    step: int
    length: int
    exact: bool
    block: str = ""
    stage: Stage = "plan"
    reproduction: str | None = None
    unsaved: str = ""

    @property
    def verdict(self) -> str:
        """What is wrong, in a sentence."""
        if self.stage == "session":
            return "each step is right by itself, wrong as a session steps"
        if self.stage == "graph":
            return "each node is right, but the graph is not what the model wrote: rows are chosen early in it"
        without = f"; it comes right without {' or without '.join(self.passes)}" if self.passes else ""
        if self.node.op in ("append", "read"):
            n_new = self.inputs[0].statistics.shape[0] if self.inputs else 0
            old = self.difference.at and self.difference.at[0] < self.extents[0] - n_new
            return f"{'rows that were there before' if old else 'new rows of state'} are wrong{without}"
        if len(self.together) > 1:
            alone = "" if self.alone else ", in this graph only"
            return f"each of {len(self.together)} nodes is right by itself, computed together they are wrong{alone}{without}"
        return f"wrong by itself{without}" if self.alone else f"right by itself, wrong as this graph is compiled{without}"

    def lines(self) -> Iterator[str]:
        """The fault for people."""
        name = f" {self.node.name}" if self.node.name else ""
        yield f"%{self.number} {self.node.op}{name}: {self.verdict}"
        yield f"  at     {self.node.where}" + (f": {self.node.text}" if self.node.text else "")
        if self.block:
            yield f"         {self.block}: {source_text(self.block)}"
        here = f", here {list(self.extents)}" if self.extents else ""
        yield f"  gives  {self.node.dtype}{self.node.shape}{here}: {self.difference}"
        mode = "exact" if self.exact else "activations in 8 bits"
        yield f"  step   {self.step}, after {self.length} tokens, {mode}"
        if self.node.attrs:
            yield f"  attrs  {', '.join(f'{k}={v}' for k, v in self.node.attrs.items())}"
        for each in self.together[:-1] if len(self.together) > 1 else ():
            yield f"  with   {each}"
        for value in self.inputs:
            yield f"  {value.slot:<6} {value.source.op}{' ' + value.source.name if value.source.name else ''}: {value.statistics}"
        if self.reproduction:
            yield f"  saved  {self.reproduction}"
        if self.unsaved:
            yield f"  not saved: {self.unsaved}"


@dataclass(frozen=True)
class Worst:
    """Of the values that agree, the one farthest off."""

    node: Described
    nmse: float


@dataclass(frozen=True)
class Report:
    """The outcome of a check.

    Attributes:
        wanted, got: the sides, the trusted one first.
        nodes: values compared in each step; `steps` of them were gone through.
        worst: of each op, as it agrees.
        whole: NMSE of what a step gave as it is, the largest of all outputs and streams.
        amplified: nodes whose difference rounding explains, as far as it grew there.
        ended: there were so many of these that what differs besides was not looked at.
        first: the first value that is wrong.
    """

    wanted: str
    got: str
    exact: bool
    steps: int
    nodes: int
    worst: Mapping[str, Worst]
    whole: Mapping[str, float]
    amplified: tuple[Described, ...] = ()
    ended: bool = False
    first: Fault | None = None

    @property
    def ok(self) -> bool:
        return self.first is None

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = _finite(asdict(self) | {"ok": self.ok})
        if self.first is not None:
            found["first"]["verdict"] = self.first.verdict
        return found

    def __str__(self) -> str:
        mode = "exact" if self.exact else "activations in 8 bits"
        head = f"{self.got} beside {self.wanted}, {mode}, {self.steps} {'step' if self.steps == 1 else 'steps'}"
        if self.first is not None:
            return "\n".join((f"{head}: differs", *self.first.lines()))
        worst = max(self.worst.values(), key=lambda w: w.nmse, default=None)
        most = f", worst NMSE {worst.nmse:.2g} at {worst.node}" if worst is not None and worst.nmse else ""
        agree = "1 node agrees" if self.nodes == 1 else f"{self.nodes} nodes agree"
        if self.ended:
            agree += " by themselves; together not all was looked at, as rounding grows at many"
        lines = [f"{head}: {agree}{most}" if self.nodes else f"{head}: no difference"]
        name, whole = max(self.whole.items(), key=lambda item: item[1], default=("", 0.0))
        if name:
            lines.append(f"  the steps as they are: NMSE {whole:.2g} at most, of {name}")
        lines += [f"  rounding grows at {node}" for node in self.amplified]
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
