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
    with_peer = any(f.peer_s for run in runs for f in run.figures)
    rows = [("model", "size", "params", "backend", "threads", "test", "t/s", *(("peer t/s", "ratio") if with_peer else ()))]
    rows += [_row(run, f, with_peer) for run in runs for f in run.figures]
    roofs = [
        ("threads", "read GB/s", "f32 GFLOP/s", "int8 GOP/s"),
        *(_roof_row(n, found) for n, found in sorted(_by_threads(runs).items())),
    ]
    table = markdown_table if markdown else options.table
    parts = [table(rows, left=1), "\n".join(_notes(runs, about)), table(roofs, left=0), "\n".join(_decodes(runs))]
    return "\n\n".join(part for part in parts if part)


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """As GitHub renders it."""
    rule = [":--" if i < left else "--:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _row(run: Run, f: Figures, with_peer: bool) -> tuple[str, ...]:
    size, parameters = options.size_text(run.model["size_bytes"]), f"{run.model['parameters'] / 1e6:.2f} M"
    name = f"{run.model['name']} {run.model['type']}"
    row = (name, size, parameters, run.backend, run.threads, str(f.case), _rates_text(f.ours_rates))
    if not with_peer:
        return row
    return (*row, _rates_text(f.peer_rates), "-" if f.ratio is None else f"{f.ratio:.2f}")


def _rates_text(rates: Sequence[float]) -> str:
    return f"{median(rates):.2f} ± {deviation(rates):.2f}" if rates else "-"


def _notes(runs: Sequence[Run], about: Mapping[str, Any]) -> list[str]:
    machine = about["machine"]
    features = f", {' '.join(machine['features'])}" if machine["features"] else ""
    lines = [f"median ± median absolute deviation of {about['rounds']} rounds, after a warm-up"]
    lines.append(f"machine: {machine['processor']}, {_count(machine['cores'], 'core')}{features}")
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    for run in runs:
        if run.peer is not None:
            library = f" (llama.cpp {run.peer['library']})" if run.peer["library"] else ""
            settings = _settings_text(run.figures)
            what = f"llama-cpp-python {run.peer['package']}{library}, {run.peer['file']}"
            lines.append(f"peer, {_threads_text(run)}: {what}; {settings}")
        for whose, restless in (
            ("our", [str(f.case) for f in run.figures if not f.ours_quiet]),
            ("the peer's", [str(f.case) for f in run.figures if not f.peer_quiet]),
        ):
            if restless:
                lines.append(f"note: {whose} threads kept running after {', '.join(restless)}, so the other side was disturbed")
    return lines


def _settings_text(figures: Sequence[Figures]) -> str:
    """`flash attention on (pp512, tg128)`"""
    cases: dict[str, list[str]] = {}
    for f in figures:
        if f.peer_setting:
            cases.setdefault(f.peer_setting, []).append(str(f.case))
    return ", ".join(f"{setting} ({', '.join(names)})" for setting, names in cases.items())


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


def _decodes(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in runs:
        for f in run.figures:
            if f.case.kind == "tg":
                n = run.token_bytes[str(f.case)]
                reached, part = n * median(f.ours_rates) / 1e9, f.roof_fraction(n, run.n_threads)
                what = f"{run.model['name']}, {_threads_text(run)}, {f.case}"
                lines.append(f"{what}: {n / 1e6:.1f} MB read a token, {reached:.1f} GB/s, {part:.0%} of the read rate")
    return lines


def _threads_text(run: Run) -> str:
    return "1 thread" if run.threads == "1" else f"{run.threads} threads"


def _count(n: int, one: str) -> str:
    return f"{n} {one}{'' if n == 1 else 's'}"
