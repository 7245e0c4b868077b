"""`tensorgraph test-ops`: every op on a backend compared with its reference."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tensorgraph.errors import GraphError, InputError, UnsupportedError
from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.op import Op
    from tensorgraph.tools.conformance import Report, Support, Tested

Threads = int | Literal["auto"]
REFERENCE = "reference"
EXAMPLES = 30


class Mode(enum.StrEnum):
    """What `test-ops` does."""

    test = "test"
    perf = "perf"
    support = "support"


def test_ops(
    mode: Annotated[
        Mode,
        typer.Argument(metavar="[test|perf|support]", help="What to do: compare, measure, or list types.", show_default=True),
    ] = Mode.test,
    op: Annotated[list[str] | None, typer.Option(help="An op; may be repeated.", metavar="NAME", show_default="all")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend; may be repeated.", metavar="NAME", show_default="all but reference, if there are any"),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="test: cases drawn for each op and backend.", metavar="N")] = EXAMPLES,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="test: draws the same cases again; a report names it.", metavar="K", show_default="random"),
    ] = None,
    case: Annotated[
        str | None,
        typer.Option(help="test: run one case again, given as a failure prints it.", metavar="TEXT", show_default=False),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="perf: with the first input that takes it as a weight of this type.", metavar="TYPE", show_default=False
        ),
    ] = None,
    threads: Annotated[
        str, typer.Option("-t", "--threads", help=f"perf: {options.HELP['threads']}", metavar="N|auto")
    ] = options.AUTO,
    list_ops: Annotated[bool, typer.Option("--list", help="Only list the ops: inputs, result, source.")] = False,
    coverage: Annotated[
        bool,
        typer.Option(
            "--coverage", help="Only list which backend runs which op, with the reference unless --backend, and its tests."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compare ops on a backend with their reference, for cases drawn from each op's declaration; or measure them.

    test: inputs are dense, strided, repeated and constant, of block types too, and axes may be known only at run time. What is
    checked: the result, by a criterion that follows the op's own conditioning; its guarded forms and its expansion; the same
    bits in a second run, on other threads, and in an input's memory; memory around inputs and results; the op's laws. Of a
    failing op the smallest failing case is printed, with a --case that runs it again. Exit code 1 where an op fails.

    perf: GB/s and GFLOP/s for inputs as large models have them, and the part of the machine's measured roof that they are.

    support: which types each input may have, and which of them a backend computes.

    --coverage: exit code 1 where an op has no kernel, no law, or no case that is strided.

    \b
    tensorgraph test-ops
    tensorgraph test-ops --backend cpu --op mul_mat --op rms_norm --examples 300
    tensorgraph test-ops --op rope --seed 7
    tensorgraph test-ops --backend cpu --case 'silu([5], 7, "f32", 1, "nan", false, "dense")'
    tensorgraph test-ops perf --op mul_mat --type q4_0 -t 1
    tensorgraph test-ops support --op mul_mat
    tensorgraph test-ops --list
    tensorgraph test-ops --coverage --json
    """
    import tensorgraph.ops  # noqa: F401  (importing registers)
    from tensorgraph import registry

    known = list(registry.ops)
    chosen = list(dict.fromkeys(op)) if op else known
    declared = [registry.ops.get(name) for name in chosen]  # an unknown one is refused before anything runs
    tests = mode is Mode.test and not (list_ops or coverage)
    _refuse(not tests, "test", seed=seed, case=case, examples=None if examples == EXAMPLES else examples)
    _refuse(mode is not Mode.perf, "perf", type=type, threads=None if threads == options.AUTO else threads)
    if list_ops:
        _list(declared, as_json)
    elif coverage:
        _show_coverage(chosen, backend or list(registry.backends), as_json)
    elif mode is Mode.support:
        _show_support(chosen, backend or list(registry.backends), as_json)
    elif mode is Mode.perf:
        _show_perf(declared, _wanted(backend), type, options.thread_count(threads), as_json)
    elif case is not None:
        if op or seed is not None:
            raise InputError("[test-ops] --case names its op and needs no --seed; wanted it alone, or with --backend")
        _test([], _wanted(backend), examples, seed, case, as_json)
    else:
        _test(chosen, _wanted(backend), examples, seed, None, as_json)


def _wanted(backends: Sequence[str] | None) -> Sequence[str]:
    """Those that were asked for, or all that are here but the reference.

    Raises: UnsupportedError: one of those that were asked for has nothing to run on.
    """
    from tensorgraph.tools.conformance.here import others, start

    for backend in backends or ():
        start(backend)
    return backends or others()


def _refuse(wrong: bool, mode: str, **given: object) -> None:
    """Raises: InputError: an option was given that belongs to another mode."""
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if wrong and named:
        raise InputError(f"[test-ops] {', '.join(named)} belongs to the mode {mode}; wanted it there alone")


def _list(ops: Sequence[Op], as_json: bool) -> None:
    listed = [{"op": o.name, "signature": str(o.signature) if o.signature else None, "source": o.source} for o in ops]
    rows: list[tuple[str, ...]] = [(str(o["op"]), str(o["source"]), o["signature"] or "(by its shape rule)") for o in listed]
    typer.echo(json.dumps({"ops": listed}) if as_json else options.table([("op", "source", "inputs -> result"), *rows], left=3))


def _test(ops: Sequence[str], backends: Sequence[str], examples: int, seed: int | None, case: str | None, as_json: bool) -> None:
    from tensorgraph.tools.conformance import check, check_case

    reports: list[Report] = []
    pairs = [(name, on) for on in backends for name in ops]
    with _progress() as tell:
        if case is not None:
            reports += [check_case(case, on) for on in backends]
        for i, (name, on) in enumerate(pairs):
            tell(f"{name} on {on} ({i + 1} of {len(pairs)})")
            reports.append(check(name, on, examples=examples, seed=seed))
    failed = sum(not report.ok for report in reports)
    if as_json:
        results = [_as_json(report) for report in reports]
        typer.echo(json.dumps({"examples": examples if case is None else 1, "failed": failed, "results": results}))
    else:
        typer.echo(_text(reports))
    if failed:
        raise typer.Exit(1)


def _show_coverage(ops: Sequence[str], backends: Sequence[str], as_json: bool) -> None:
    from tensorgraph.tools.conformance import coverage, tested

    with options.working("asking"):
        found = coverage(ops, backends)
        behind = tested(found)
    if as_json:
        tests = {t.op: {"laws": t.laws, "strided": t.strided, "samples": t.samples, "lacks": list(t.lacks)} for t in behind}
        typer.echo(json.dumps({"coverage": _nested(found), "tests": tests}))
    else:
        typer.echo(_coverage_text(found, behind))
    if any(t.lacks for t in behind):
        raise typer.Exit(1)


def _show_support(ops: Sequence[str], backends: Sequence[str], as_json: bool) -> None:
    from tensorgraph.tools.conformance.support import computed_text, support, types_text

    with options.working("asking"):
        found, unknown = support(ops, backends)
    if as_json:
        typer.echo(json.dumps({"support": [dataclasses.asdict(line) for line in found], "unknown": unknown}))
        return
    here = list(dict.fromkeys(name for line in found for name in line.own))
    rows = [(t.op, t.slot, types_text(t.accepted), *(computed_text(t, name) for name in here)) for t in found]
    table = options.table([("op", "input", "types", *here), *rows], left=3 + len(here))
    typer.echo("\n".join((table, *(f"not known: {reason}" for reason in unknown.values()))))


def _show_perf(ops: Sequence[Op], backends: Sequence[str], type: str | None, threads: Threads, as_json: bool) -> None:
    options.limit_threads(threads)
    from tensorgraph.backends.cpu.executor import usable_cores
    from tensorgraph.device import get_devices
    from tensorgraph.dtypes import as_dtype
    from tensorgraph.tools.bench.roofs import measure
    from tensorgraph.tools.conformance.perf import Speed, speeds

    dtype = None if type is None else as_dtype(type)
    found: list[Speed] = []
    left_out: list[str] = []
    with _progress() as tell:
        tell("measuring the machine")
        roofs = measure(usable_cores() if threads == options.AUTO else threads, 0.9)
        for on in backends:
            (device,) = get_devices(on)
            device.set_threads(threads)
            for op in ops:
                tell(f"{op.name} on {on}")
                try:
                    found += speeds(op, device, dtype=dtype, roofs=roofs)
                except (GraphError, UnsupportedError) as error:
                    left_out.append(f"{op.name} on {on}: {error}")
    if as_json:
        typer.echo(
            json.dumps({"roofs": dataclasses.asdict(roofs), "ops": [dataclasses.asdict(s) for s in found], "left_out": left_out})
        )
        return
    rows = [("op", "backend", "ms", "GB/s", "GFLOP/s", "of the roof", "bound by", "case")]
    for s in found:
        part = "" if s.roof is None else f"{100 * s.roof:.0f} %"
        rows.append((s.op, s.backend, f"{1e3 * s.seconds:.3g}", f"{s.gbs:.1f}", f"{s.gflops:.1f}", part, s.bound, s.case))
    machine = f"the roof: {roofs.stream_gbs:.1f} GB/s read from memory, {roofs.fma_gflops:.0f} GFLOP/s of f32 multiply-adds"
    typer.echo("\n".join((options.table(rows, left=2), "", machine, *(f"not measured: {line}" for line in left_out))))


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
    told = None
    if failure is not None:
        again = failure.again(report.backend)
        told = {
            "part": failure.part,
            "message": failure.message,
            "case": list(failure.case),
            "text": failure.text,
            "again": again,
        }
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
    failures = [
        "\n".join(filter(None, (f"{r.op} on {r.backend}, seed {r.seed}", str(r.failure), r.failure.again(r.backend))))
        for r in reports
        if r.failure is not None
    ]
    legend = "worst: the largest error as a fraction of what is allowed; no kernel: cases that the backend refuses"
    total = f"{len(reports)} tested, {len(failures)} failed"
    return "\n\n".join((options.table(rows, left=2), *failures, f"{legend}\n{total}"))


def _nested(found: Sequence[Support]) -> dict[str, dict[str, dict[str, Any]]]:
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for s in found:
        table.setdefault(s.op, {})[s.backend] = {"how": s.how, "supported": s.supported, "samples": s.samples}
    return table


def _coverage_text(found: Sequence[Support], behind: Sequence[Tested]) -> str:
    backends = list(dict.fromkeys(s.backend for s in found))
    by_op: dict[str, list[str]] = {}
    for s in found:
        by_op.setdefault(s.op, []).append(str(s))
    rows = [(t.op, *by_op[t.op], str(t.laws), f"{t.strided} of {t.samples}") for t in behind]
    lacking = [f"{t.op} lacks {', '.join(t.lacks)}" for t in behind if t.lacks]
    total = f"{len(behind)} ops, {len(lacking)} without a kernel, a law or strided cases"
    table = options.table([("op", *backends, "laws", "strided cases"), *rows], left=1 + len(backends))
    return "\n\n".join(filter(None, (table, "\n".join(lacking), total)))
