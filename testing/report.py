"""What a check found, for people and for programs."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorgraph.dims import shape_text
from tensorgraph.graph import Node
from tensorgraph.testing.difference import Difference, Statistics
from tensorgraph.text import attr_text


@dataclass(frozen=True)
class Described:
    """A node for people.

    Attributes:
        name: its own, that of its stream, or of the weight that it reads.
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
        weights = [i.base.name for i in node.inputs if i.base.op == "constant"]
        name = node.attrs.get("stream", "") or node.name or (weights[0] if weights else "")
        attrs = {k: attr_text(v) for k, v in node.attrs.items() if v is not None and k not in ("map", "guards")}
        return Described(node.op, name, node.where, source_text(node.where), shape_text(node.shape), node.dtype.name, attrs)

    def __str__(self) -> str:
        name, where = (f" {self.name}" if self.name else ""), (f" ({self.where})" if self.where else "")
        return f"{self.op}{name} {self.dtype}{self.shape}{where}"


def source_text(where: str) -> str:
    """The line that `file.py:31` means, of the only imported file of that name; empty where there is none, or several."""
    name, _, number = where.rpartition(":")
    loaded = {file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    files = [file for file in loaded if Path(file).name == name]
    return linecache.getline(files.pop(), int(number)).strip() if len(files) == 1 and number.isdigit() else ""


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
        together: all nodes that are wrong when they are computed together; the node alone where it is wrong by itself.
        alone: whether they are wrong, too, taken out of the graph.
        passes: those without which it comes right; `grouping` is the device's own joining of nodes.
        step: number of the step, and how many tokens were there before.
        reproduction: the file that holds it, where one was asked for.
    """

    node: Described
    together: tuple[Described, ...]
    difference: Difference
    inputs: tuple[InputValue, ...]
    alone: bool
    passes: tuple[str, ...]
    step: int
    length: int
    exact: bool
    reproduction: str | None = None

    @property
    def verdict(self) -> str:
        """What is wrong, in a sentence."""
        without = f"; it comes right without {' or without '.join(self.passes)}" if self.passes else ""
        if self.node.op in ("append", "read"):
            return f"rows of state are wrong{without}"
        if len(self.together) > 1:
            alone = "" if self.alone else ", in this graph only"
            return f"each of {len(self.together)} nodes is right by itself, computed together they are wrong{alone}{without}"
        return f"wrong by itself{without}" if self.alone else f"right by itself, wrong as this graph is compiled{without}"

    def lines(self) -> Iterator[str]:
        """The fault for people."""
        name = f" {self.node.name}" if self.node.name else ""
        yield f"{self.node.op}{name}: {self.verdict}"
        yield f"  at     {self.node.where}" + (f": {self.node.text}" if self.node.text else "")
        yield f"  gives  {self.node.dtype}{self.node.shape}, {self.difference}"
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
    first: Fault | None = None

    @property
    def ok(self) -> bool:
        return self.first is None

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self) | {"ok": self.ok}
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
        lines = [f"{head}: {self.nodes} nodes agree{most}"]
        name, whole = max(self.whole.items(), key=lambda item: item[1], default=("", 0.0))
        if name:
            lines.append(f"  the steps as they are: NMSE {whole:.2g} at most, of {name}")
        lines += [f"  rounding grows at {node}" for node in self.amplified]
        return "\n".join(lines)
