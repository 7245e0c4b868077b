"""`tensorgraph test-ops`: every op on a backend compared with its reference."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.tools.conformance import Report, Support

REFERENCE = "reference"


def test_ops(
    op: Annotated[
        list[str] | None, typer.Option(help="An op to test; may be repeated.", metavar="NAME", show_default="all")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="A backend to test; may be repeated.", metavar="NAME", show_default="all but reference, if there are any"
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Cases drawn for each op and backend.", metavar="N")] = 30,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draws the same cases again; a report names it.", metavar="K", show_default="random")
    ] = None,
    list_ops: Annotated[bool, typer.Option("--list", help="Only list the ops: inputs, result, source.")] = False,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="Only list which backend runs which op; with the reference, unless --backend.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compare ops on a backend with their reference, for cases drawn from each op's declaration.

    Inputs are dense, strided, repeated and constant, of block types too, and axes may be known only at run time. What is
    checked: the result, by a criterion that follows the op's own conditioning; a second run; the op's laws; its expansion.
    Of a failing op the smallest failing case is printed. Exit code 1 where an op fails.

    \b
    tensorgraph test-ops
    tensorgraph test-ops --backend cpu --op mul_mat --op rms_norm --examples 300
    tensorgraph test-ops --op rope --seed 7
    tensorgraph test-ops --list
    tensorgraph test-ops --coverage --json
    """
    import tensorgraph.ops  # noqa: F401  (importing registers)
    from tensorgraph import registry
    from tensorgraph.tools.conformance import check
    from tensorgraph.tools.conformance import coverage as find_coverage

    known = list(registry.ops)
    chosen = list(dict.fromkeys(op)) if op else known
    declared = [registry.ops.get(name) for name in chosen]  # an unknown one is refused before anything runs
    if list_ops:
        listed = [{"op": o.name, "signature": str(o.signature) if o.signature else None, "source": o.source} for o in declared]
        rows: list[tuple[str, ...]] = [(str(o["op"]), str(o["source"]), o["signature"] or "(by its shape rule)") for o in listed]
        typer.echo(
            json.dumps({"ops": listed}) if as_json else options.table([("op", "source", "inputs -> result"), *rows], left=3)
        )
        return
    if coverage:
        with options.working("asking"):
            found = find_coverage(chosen, backend or list(registry.backends))
        typer.echo(json.dumps({"coverage": _nested(found)}) if as_json else _coverage_text(found))
        return
    others = [name for name in registry.backends if name != REFERENCE]
    pairs = [(name, on) for on in backend or others or [REFERENCE] for name in chosen]
    reports = []
    with _progress() as tell:
        for i, (name, on) in enumerate(pairs):
            tell(f"{name} on {on} ({i + 1} of {len(pairs)})")
            reports.append(check(name, on, examples=examples, seed=seed))
    failed = sum(not report.ok for report in reports)
    if as_json:
        results = [_as_json(report) for report in reports]
        typer.echo(json.dumps({"examples": examples, "failed": failed, "results": results}))
    else:
        typer.echo(_text(reports))
    if failed:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being tested, on a moving line on stderr; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("testing") as line:
        yield line.update


def _as_json(report: Report) -> dict[str, Any]:
    failure = report.failure
    told = None if failure is None else {"part": failure.part, "message": failure.message, "case": list(failure.case)}
    return {
        "op": report.op,
        "backend": report.backend,
        "seed": report.seed,
        "cases": report.cases,
        "unsupported": report.unsupported,
        "worst": report.worst if math.isfinite(report.worst) else None,
        "ok": report.ok,
        "failure": told,
    }


def _text(reports: Sequence[Report]) -> str:
    rows = [("op", "backend", "cases", "no kernel", "worst", "")]
    for r in reports:
        outcome = "FAIL" if not r.ok else "ok" if r.cases else "no kernel"
        worst = "" if not r.ok or not r.cases else f"{r.worst:.2g}"
        rows.append((r.op, r.backend, str(r.cases), str(r.unsupported), worst, outcome))
    failures = [f"{r.op} on {r.backend}, seed {r.seed}\n{r.failure}" for r in reports if not r.ok]
    legend = "worst: the largest error as a fraction of what is allowed; no kernel: cases that the backend refuses"
    total = f"{len(reports)} tested, {len(failures)} failed"
    return "\n\n".join((options.table(rows, left=2), *failures, f"{legend}\n{total}"))


def _nested(found: Sequence[Support]) -> dict[str, dict[str, dict[str, Any]]]:
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for s in found:
        table.setdefault(s.op, {})[s.backend] = {"how": s.how, "supported": s.supported, "samples": s.samples}
    return table


def _coverage_text(found: Sequence[Support]) -> str:
    backends = list(dict.fromkeys(s.backend for s in found))
    by_op: dict[str, list[str]] = {}
    for s in found:
        by_op.setdefault(s.op, []).append(str(s))
    return options.table([("op", *backends), *((op, *cells) for op, cells in by_op.items())])
