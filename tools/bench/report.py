"""What was measured, as JSON takes it and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorgraph.tools import options
from tensorgraph.tools.bench.cases import deviation, median
from tensorgraph.tools.bench.roofs import Roofs
from tensorgraph.tools.bench.rounds import Figures

PEER_TYPE = "peer's"
"""The column of its file's main type."""


@dataclass
class Run:
    """The figures of one model with one number of threads.

    Attributes:
        model: as `ours.describe` gives it, with `name`.
        threads: as they were asked for; `n_threads` is how many that are.
        token_bytes: bytes that a decoded token reads, by case.
        peer: what the peer says of itself, with `file`; None where there was none.
    """

    model: Mapping[str, Any]
    backend: str
    threads: str
    n_threads: int
    figures: Sequence[Figures]
    token_bytes: Mapping[str, int]
    peer: Mapping[str, Any] | None = None


def as_object(runs: Sequence[Run], about: Mapping[str, Any], errors: Sequence[str]) -> dict[str, Any]:
    """Everything, every round of it. Units: seconds, tokens a second, bytes."""
    return {**about, "runs": [_run_object(run) for run in runs], "errors": list(errors)}


def _run_object(run: Run) -> dict[str, Any]:
    return {
        "model": dict(run.model),
        "backend": run.backend,
        "threads": run.threads,
        "n_threads": run.n_threads,
        "peer": dict(run.peer) if run.peer else None,
        "cases": [_case_object(run, f) for f in run.figures],
    }


def _case_object(run: Run, f: Figures) -> dict[str, Any]:
    found: dict[str, Any] = {
        "test": str(f.case),
        **dataclasses.asdict(f.case),
        "seconds": f.ours_s,
        "rates": f.ours_rates,
        "median": median(f.ours_rates),
        "deviation": deviation(f.ours_rates),
        "quiet": f.ours_quiet,
        "roofs": [{str(n): dataclasses.asdict(roofs) for n, roofs in now.items()} for now in f.roofs],
    }
    if f.peer_s:
        theirs = {"seconds": f.peer_s, "rates": f.peer_rates, "median": median(f.peer_rates), "quiet": f.peer_quiet}
        found |= {"peer": theirs | {"deviation": deviation(f.peer_rates), "setting": f.peer_setting}, "ratio": f.ratio}
    if f.case.kind == "tg":
        n = run.token_bytes[str(f.case)]
        found |= {"token_bytes": n, "stream_fraction": f.roof_fraction(n, run.n_threads)}
    return found


def as_text(runs: Sequence[Run], about: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The table, then the machine, the peer and the roofs."""
    table = markdown_table if markdown else options.table
    lines = [f"- {line}" if markdown else line for line in notes(runs, about)]
    return "\n\n".join([table(table_rows(runs), left=1), "\n".join(lines), table(roof_rows(runs), left=0)])


def show(runs: Sequence[Run], about: Mapping[str, Any]) -> None:
    """The same on a terminal: models apart, and ratios in colour."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    def table(rows: Sequence[Sequence[str]], left: int) -> Table:
        found = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(rows[0]):
            found.add_column(name, justify="left" if i < left else "right", no_wrap=True)
        for row, following in zip(rows[1:], [*rows[2:], ()], strict=True):
            found.add_row(*row, end_section=left > 0 and row[:1] != following[:1])
        return found

    rows = table_rows(runs)
    coloured = [rows[0], *(tuple(_coloured(name, c) for name, c in zip(rows[0], row, strict=True)) for row in rows[1:])]
    tables = table(coloured, 1), table(roof_rows(runs), 0)
    console = Console(highlight=False)
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(tables[0], options=wide).maximum)  # too long lines are the terminal's
    console.print(tables[0])
    console.print("\n".join(notes(runs, about)), markup=False, soft_wrap=True)
    console.print(tables[1])


def _coloured(column: str, cell: str) -> str:
    return f"[bold {'green' if float(cell) >= 1 else 'red'}]{cell}[/]" if column == "ratio" and cell != "-" else cell


def table_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for each model, number of threads and test, below their heads; columns are there where they say something."""
    found = [_row(run, f) for run in runs for f in run.figures]
    same = all(run.peer is None or run.peer["file"] == run.model["file"] for run in runs)
    columns = [name for name in found[0] if any(row[name] for row in found) and not (same and name == PEER_TYPE)]
    return [tuple(columns), *(tuple(row[name] or "-" for name in columns) for row in found)]


def _row(run: Run, f: Figures) -> dict[str, str]:
    name, kind = str(run.model["name"]), str(run.model["type"])
    row = {
        "model": name if kind in name.split("-") else f"{name} {kind}",
        "size": options.size_text(run.model["size_bytes"]),
        "params": f"{run.model['parameters'] / 1e6:.1f} M",
        "threads": run.threads,
        "test": str(f.case),
        "t/s": _rates_text(f.ours_rates),
        PEER_TYPE: str((run.peer or {}).get("type", "")),
        "peer t/s": _rates_text(f.peer_rates),
        "ratio": "" if f.ratio is None else f"{f.ratio:.2f}",
        "read": "",
    }
    if f.case.kind == "tg":
        n = run.token_bytes[str(f.case)]
        row["read"] = f"{n * median(f.ours_rates) / 1e9:.1f} GB/s {f.roof_fraction(n, run.n_threads):4.0%}"
    return row


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """As GitHub renders it."""
    rule = [":--" if i < left else "--:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _rates_text(rates: Sequence[float]) -> str:
    return f"{median(rates):.2f} ± {deviation(rates):.2f}" if rates else ""


def notes(runs: Sequence[Run], about: Mapping[str, Any]) -> list[str]:
    """What the figures are of."""
    machine = about["machine"]
    features = f", {' '.join(machine['features'])}" if machine["features"] else ""
    load = f"; a load of {machine['load']:.1f} before" if machine["load"] is not None else ""
    lines = [f"median ± median absolute deviation of {about['rounds']} rounds, after a warm-up"]
    if any(f.peer_s for run in runs for f in run.figures):
        lines[0] += "; ratio: the median of the rounds' ratios"
    if about["busy"]:
        who = "another process" if about["busy"] == 1 else f"each of {about['busy']} other processes"
        lines.append(f"meanwhile {who} kept a core busy, beside both sides")
    lines.append(f"machine: {machine['processor']}, {_count(machine['cores'], 'core')}{features}{load}")
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    backends = ", ".join(dict.fromkeys(run.backend for run in runs))
    how = (", exact" if about["exact"] else "") + (", random state before" if about.get("fill") else "")
    lines.append(f"backend {backends}, rows {about['kv_type']}{how}")
    return [*lines, *_peer_notes(runs), *_restless(runs)]


def _peer_notes(runs: Sequence[Run]) -> list[str]:
    """Which library, its files where they are others than ours, and what its warm-ups decided."""
    lines: list[str] = []
    for run in runs:
        if run.peer is not None:
            library = f" (llama.cpp {run.peer['library']})" if run.peer["library"] else ""
            lines.append(f"peer: llama-cpp-python {run.peer['package']}{library}")
            if run.peer["file"] != run.model["file"]:
                kind = f", {run.peer['type']}" if run.peer.get("type") else ""
                lines.append(f"peer of {run.model['name']}: {run.peer['file']}{kind}")
    decided: dict[str, list[str]] = {}
    for run in runs:
        for f in run.figures:
            if f.peer_setting:
                decided.setdefault(f.peer_setting, []).append(_where(run, f))
    if len(decided) == 1:
        lines.append(f"peer: {next(iter(decided))}")
    elif decided:
        few = min(decided, key=lambda setting: len(decided[setting]))
        (most,) = decided.keys() - {few}
        lines.append(f"peer: {most}; {few} in {', '.join(dict.fromkeys(decided[few]))}")
    return list(dict.fromkeys(lines))


def _restless(runs: Sequence[Run]) -> list[str]:
    lines = []
    for whose, quiet in (("our", "ours_quiet"), ("the peer's", "peer_quiet")):
        if restless := [_where(run, f) for run in runs for f in run.figures if not getattr(f, quiet)]:
            lines.append(f"note: {whose} threads kept running after {', '.join(restless)}, so the other side was disturbed")
    return lines


def _where(run: Run, f: Figures) -> str:
    return f"{run.model['name']} {f.case} on {run.threads if run.threads == options.AUTO else _count(run.n_threads, 'thread')}"


def roof_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """What the machine could do, below their heads: medians over all rounds."""
    head = ("threads", "read GB/s", "f32 GFLOP/s", "int8 GOP/s")
    return [head, *(_roof_row(n, found) for n, found in sorted(_by_threads(runs).items()))]


def _by_threads(runs: Sequence[Run]) -> dict[int, list[Roofs]]:
    """Each round's roofs once, though all cases of a depth share them."""
    found: dict[int, dict[int, Roofs]] = {}
    for roofs in (now for run in runs for f in run.figures for now in f.roofs):
        for n, measured in roofs.items():
            found.setdefault(n, {})[id(measured)] = measured
    return {n: list(measured.values()) for n, measured in found.items()}


def _roof_row(n: int, found: Sequence[Roofs]) -> tuple[str, ...]:
    dots = [r.dot_gops for r in found if r.dot_gops is not None]
    dot_text = f"{median(dots):.0f}" if dots else "-"
    return str(n), f"{median([r.stream_gbs for r in found]):.1f}", f"{median([r.fma_gflops for r in found]):.0f}", dot_text


def _count(n: int, one: str) -> str:
    return f"{n} {one}{'' if n == 1 else 's'}"
