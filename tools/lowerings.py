"""`tensorgraph lowerings`: the forms of attention to listed rows, what they cost here, and which is best."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import UnknownNameError
from tensorgraph.tools import options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorgraph.models.text.model import TextModel

SAMPLE_S = 0.02
TOKENS = (1, 4, 16, 64, 256)
ROWS = (1.1, 1.5, 2, 4, 16, 64)
"""Rows there are, as multiples of those that are listed."""


def lowerings(
    measure: Annotated[bool, typer.Option("--measure", help="Measure again, and keep what is found.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Time every form over a grid of sizes.")] = False,
    heads: Annotated[int, typer.Option(min=1, help="Query heads, all of one kv head.")] = 16,
    listed: Annotated[int, typer.Option(min=1, help="Rows that each token has listed.")] = 512,
    shared: Annotated[float, typer.Option(min=0, max=1, help="Part of them that all tokens have listed.")] = 0.0,
    rounds: Annotated[int, typer.Option("-r", "--rounds", min=1, help="Times that each form is run, in turns.")] = 5,
    threads: options.Threads = "1",
    as_json: options.Json = False,
) -> None:
    """Say what copying a row takes beside what a query does with it, from which the form of sparse attention follows.

    gather: each token through the rows of its own list. union: all tokens of a tile through those of all their lists. masked: all
    rows that any of them may see. The costs are measured once, when the first model that lists rows is compiled, and kept; each
    tile of queries then takes the form that costs least. --lowering FORM of other commands overrides that.

    \b
    tensorgraph lowerings
    tensorgraph lowerings --measure --json
    tensorgraph lowerings --grid --heads 128 --listed 2048
    """
    count = options.thread_count(threads)
    from tensorgraph.backends.cpu.target import host
    from tensorgraph.ops.attention import row_costs_cpu as row_costs
    from tensorgraph.ops.attention.candidates_cpu import SCALE
    from tensorgraph.tools.bench import machine

    costs = (row_costs.measure_again if measure else row_costs.row_costs)(host())
    report: dict[str, Any] = {"costs": costs._asdict(), "scale": SCALE, **machine.describe()}
    if grid:
        asked = {"heads": heads, "listed": listed, "shared": shared, "threads": threads, "rounds": rounds}
        report |= asked | {"grid": measure_grid(heads, listed, shared, rounds, count)}
    typer.echo(json.dumps(report) if as_json else as_text(report))


def measure_grid(heads: int, listed: int, shared: float, rounds: int, threads: Any) -> list[dict[str, Any]]:
    """Of every size the milliseconds of every form and of what is chosen, and the ratio of this to the best form: medians of
    rounds, in each of which all take their turns."""
    from tensorgraph.backends.cpu.device import CpuDevice
    from tensorgraph.ops.attention.candidates_cpu import FORMS
    from tensorgraph.ops.attention.row_costs_cpu import Trial
    from tensorgraph.tools.bench.cases import median

    device = CpuDevice()
    device.set_threads(threads)
    found = []
    sizes = [(n, int(listed * times)) for n in TOKENS for times in ROWS]
    for tokens, rows in options.shown(sizes, len(sizes), "measuring"):
        trial = Trial(heads, tokens, rows + tokens, listed, shared)
        runs = dict(zip((*FORMS, "chosen"), trial.prepare(device, (*FORMS, None)), strict=True))
        took: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds):
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                took[name].append(seconds_of(runs[name]) * 1e3)
        medians = {name: median(times) for name, times in took.items()}
        best = min(FORMS, key=lambda form: medians[form])
        ratio = median([chosen / other for chosen, other in zip(took["chosen"], took[best], strict=True)])
        found.append({"tokens": tokens, "rows": rows, "ms": medians, "best": best, "ratio": ratio})
    return found


def seconds_of(run: Callable[[], None]) -> float:
    """Of one run, the caches being what it leaves itself: a mean of as many as take `SAMPLE_S`."""
    run()
    began, n = time.perf_counter(), 0
    while not n or time.perf_counter() - began < SAMPLE_S:
        run()
        n += 1
    return (time.perf_counter() - began) / n


def as_text(report: dict[str, Any]) -> str:
    costs, scale = report["costs"], report["scale"]
    lines = [
        f"{report['machine']['processor']}: copying a row takes as long as {costs['listed'] / scale:.1f} queries do with it "
        f"where it is listed, {costs['next'] / scale:.1f} where it lies behind the last"
    ]
    if "grid" in report:
        said = f"{report['heads']} heads, {report['listed']} rows listed, {report['shared']:.0%} of them by all tokens"
        lines += ["", f"ms, {said}; {report['threads']} threads, medians of {report['rounds']}"]
        forms = list(report["grid"][0]["ms"])
        rows = [("tokens", "rows", *forms, "best", "chosen / best")]
        for one in report["grid"]:
            times = (f"{one['ms'][form]:.2f}" for form in forms)
            rows.append((str(one["tokens"]), str(one["rows"]), *times, one["best"], f"{one['ratio']:.2f}"))
        lines.append(options.table(rows, left=0))
    return "\n".join(lines)


def checked(model: TextModel) -> TextModel:
    """The model, all of whose `lowerings` name forms that there are.

    Raises: UnknownNameError: one does not; the model is closed then.
    """
    wanted = model.engine.options.lowerings
    if wanted:
        known = forms_of(model)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            model.close()
            raise UnknownNameError(f"[lowering] there is no form {unknown[0]!r}; the model's: {', '.join(known) or 'none'}")
    return model


def forms_of(model: TextModel) -> Sequence[str]:
    """The forms between which a step of a model chooses: the model's own, and those of its ops and their kernels."""
    from tensorgraph import registry
    from tensorgraph.extents import Extents
    from tensorgraph.graph import STRUCTURAL

    found: dict[str, None] = {}
    for node in model.engine.graph(Extents()):
        if node.op == "choose":
            found |= dict.fromkeys(node.slots)
        elif node.op not in STRUCTURAL:
            op = registry.ops.get(node.op)
            kernel = op.kernel("cpu")
            found |= dict.fromkeys((*(form.name for form in op.lowerings), *(kernel.forms if kernel is not None else ())))
    return list(found)
