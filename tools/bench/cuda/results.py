"""What is measured: a row each, how much time there is, and what is written of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tensorgraph.tools import options
from tensorgraph.tools.bench.cases import deviation, median
from tensorgraph.tools.bench.report import markdown_table

Limit = Literal["memory", "arithmetic", "launches", "host", ""]


@dataclass
class Row:
    """One thing that was measured.

    Attributes:
        seconds: of each round, for what is measured once.
        size_bytes, flops: that it moves and computes at least.
        limit: which of them, or the starting of kernels, takes longest at the ceilings; `of_limit` is that over the measured.
        kernels: that are started for it.
        peer_seconds: by name, of the same rounds, of what others do for it.
        more: figures of one part alone.
    """

    part: str
    name: str
    seconds: list[float]
    size_bytes: int = 0
    flops: int = 0
    limit: Limit = ""
    of_limit: float | None = None
    kernels: float = 0.0
    peer_seconds: dict[str, list[float]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    def as_object(self) -> dict[str, Any]:
        """Every round of it."""
        return {**asdict(self), "median_s": self.median_s, "deviation_s": deviation(self.seconds)}


@dataclass(frozen=True)
class Ceilings:
    """What the card does at most. Units: bytes a second, operations a second, seconds for a node of a graph."""

    read: float
    copy: float
    rates: Mapping[str, float]  # of "f16", "s8", "dp4a", "f32"
    node_s: float

    def limit(self, size_bytes: float, flops: float, kind: str, kernels: float) -> tuple[Limit, float]:
        """What takes longest, and how long."""
        times: dict[Limit, float] = {"memory": size_bytes / self.read, "arithmetic": flops / self.rates[kind]}
        times["launches"] = kernels * self.node_s
        name = max(times, key=lambda each: times[each])
        return name, times[name]


@dataclass
class Budget:
    """Minutes that there are, and what did not run for want of them or of memory."""

    minutes: float
    began: float = field(default_factory=time.perf_counter)
    not_run: list[dict[str, str]] = field(default_factory=list)

    @property
    def spent_s(self) -> float:
        return time.perf_counter() - self.began

    @property
    def left_s(self) -> float:
        return 60 * self.minutes - self.spent_s

    def has(self, part: str, name: str, seconds: float, share: float = 1.0) -> bool:
        """Whether there is time for what takes so long, in the first `share` of all; what there is none for is listed."""
        left = self.left_s - 60 * self.minutes * (1 - share)
        if left < seconds or left <= 0:
            self.leave(part, name, f"wants {seconds:.0f} s; {max(left, 0):.0f} s of {self.minutes:g} minutes are left for it")
            return False
        return True

    def leave(self, part: str, name: str, why: str) -> None:
        self.not_run.append({"part": part, "name": name, "why": why})


def text(rows: Sequence[Row], not_run: Iterable[Mapping[str, str]], about: Mapping[str, Any], *, markdown: bool = False) -> str:
    """A table for each part, what did not run, and the machine."""
    table = markdown_table if markdown else options.table
    parts = []
    for part, columns in (("ceilings", _ceiling), ("ops", _op), ("models", _model)):
        found = [columns(row) for row in rows if row.part == part]
        if found:
            names = [name for name in found[0] if any(row[name] for row in found)]
            parts.append(table([tuple(names), *(tuple(row[name] or "-" for name in names) for row in found)], left=1))
    left = [f"not run: {each['part']}, {each['name']}: {each['why']}" for each in not_run]
    lines = [*(f"- {line}" if markdown else line for line in [*notes(about), *left])]
    return "\n\n".join([*parts, "\n".join(lines)])


def notes(about: Mapping[str, Any]) -> list[str]:
    """What the figures are of."""
    device = about["device"]
    more = ", ".join(f"{name} {value}" for name, value in device.items() if name != "name")
    lines = [f"device: {device['name']}" + (f" ({more})" if more else "")]
    lines.append(f"host: {about['machine']['processor']}, {about['machine']['cores']} cores")
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    lines.append("medians of rounds, after a warm-up")
    lines.append("limit: what takes longest at the ceilings; of it: that time over the measured")
    lines.append("host us: of a decode step, what it takes beside its kernels")
    return lines


def _ceiling(row: Row) -> dict[str, str]:
    return {"ceiling": row.name, "value": f"{row.more['value']:,.4g}", "unit": row.more["unit"]}


def _op(row: Row) -> dict[str, str]:
    found = {"op": row.name, "us": f"{1e6 * row.median_s:.2f}", "kernels": f"{row.kernels:g}"}
    found |= {"GB/s": f"{row.size_bytes / row.median_s / 1e9:,.0f}", "TFLOP/s": f"{row.flops / row.median_s / 1e12:.2f}"}
    found |= {"limit": row.limit, "of it": _percent(row.of_limit)}
    beside = (f"{name} {1e6 * median(s):.2f} us, {median(s) / row.median_s:.2f}" for name, s in row.peer_seconds.items())
    return found | {"others, and their time over ours": "; ".join(beside)}


def _model(row: Row) -> dict[str, str]:
    m, tokens = row.more, row.more["tokens"]
    found = {"model": m["model"], "test": m["test"], "t/s": f"{tokens / row.median_s:,.1f}", "kernels": f"{row.kernels:g}"}
    found |= {"device us": f"{1e6 * m['device_s']:,.0f}" if m.get("device_s") else ""}
    found |= {"host us": f"{1e6 * m['host_s']:,.0f}" if "host_s" in m else ""}
    found |= {"MB a token": f"{row.size_bytes / 1e6:,.1f}" if m["test"].startswith("tg") else ""}
    found |= {"limit": row.limit, "of it": _percent(row.of_limit), "target": m.get("target", "")}
    return found


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"
