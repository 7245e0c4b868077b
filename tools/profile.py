"""`tensorgraph profile`: where the time of a step goes, by the native loop's own clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol, runtime_checkable

import typer

from tensorgraph.errors import InputError, UnsupportedError
from tensorgraph.tools import options

if TYPE_CHECKING:
    import numpy as np

    from tensorgraph.backends.cpu.executor import ThreadCounters
    from tensorgraph.backends.cpu.kernel import Call
    from tensorgraph.models.text.model import TextModel, TextSession
    from tensorgraph.session import SessionSnapshot
    from tensorgraph.tools.bench.cases import Case
    from tensorgraph.tools.bench.roofs import Roofs
    from tensorgraph.tools.profile_groups import By, Group

GROUPINGS = ("op", "layer", "kernel", "step")
BY = "|".join(GROUPINGS)
ROOFS_S = 0.15


def profile(
    model: options.Model,
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=0, help="Tokens of a prompt, evaluated at once; 0: none.")] = 512,
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=0, help="Steps of one token each; 0: none.")] = 32,
    depth: Annotated[int, typer.Option("-d", "--depth", min=0, help="Tokens there before.")] = 0,
    fill: options.Fill = None,
    rounds: Annotated[int, typer.Option("-r", "--rounds", min=1, help="Times that the prompt is evaluated.")] = 3,
    by: Annotated[str, typer.Option(help="What a row is: all calls of an op, layer or kernel, or one.", metavar=BY)] = "op",
    top: Annotated[
        int | None, typer.Option(min=1, help="Only the K groups that took longest.", metavar="K", show_default="all")
    ] = None,
    no_roofs: Annotated[bool, typer.Option("--no-roofs", help="Do not measure what the machine can do.")] = False,
    threads: options.Threads = options.AUTO,
    backend: options.Backend = options.BACKEND,
    kv_type: options.KvType = "f16",
    exact: options.Exact = False,
    lowering: options.Lowering = None,
    as_json: options.Json = False,
) -> None:
    """Take the time of every call of a step, inside the native loop: a prompt's (pp), and those of single tokens (tg).

    Times, bytes and operations are means of a step. Bytes and operations are counted from shapes: each weight once, and no
    value that stays within a call. `of roof` is the least time in which this machine, by what it was measured to read and to
    compute, could do that, over the time it took: read, f32 or int8 says which of these limits it. What lies in caches is read
    faster than that, and attention may skip work that is counted. With auto threads, all of them take part.

    \b
    tensorgraph profile smollm2
    tensorgraph profile smollm2 -t 1 -p 0 -n 64 -d 1024 --by layer
    tensorgraph profile model.gguf -p 512 -n 0 --by kernel --top 10
    tensorgraph profile model.gguf -p 0 -n 8 -d 131072 --fill random
    tensorgraph profile model.gguf -n 8 --by step --no-roofs --json
    """
    count = options.thread_count(threads)
    if by not in GROUPINGS:
        raise InputError(f"[profile] wanted --by {', '.join(GROUPINGS)}; got {by!r}")
    if not prompt and not tokens:
        raise InputError("[profile] wanted tokens to evaluate: -p or -n above 0")
    options.limit_threads(count)
    from tensorgraph.compiler import CompileOptions
    from tensorgraph.device import get_devices
    from tensorgraph.models.text.model import load
    from tensorgraph.tools.bench import machine
    from tensorgraph.tools.bench.cases import cases
    from tensorgraph.tools.bench.command import progress
    from tensorgraph.tools.bench.ours import describe
    from tensorgraph.tools.lowerings import checked

    devices = get_devices(backend)
    if not any(isinstance(device, Timed) for device in devices):
        raise UnsupportedError(f"[profile] wanted a backend that runs a step in a native loop, such as cpu; {backend} does not")
    n_threads = machine.cores() if count == options.AUTO else count
    with progress() as say:
        say("loading")
        how = CompileOptions(exact=exact, lowerings=tuple(lowering or ()))
        with checked(load(model, backend=devices, kv_type=kv_type, options=how, threads=count)) as loaded:
            wanted, limit = cases([prompt], [tokens], [depth]), loaded.model.context
            if max(case.end for case in wanted) > limit:
                raise InputError(f"[profile] the context of {model} holds {limit} tokens; wanted {max(c.end for c in wanted)}")
            found, roofs = measure(loaded, wanted, rounds, None if no_roofs else n_threads, say, fill is not None)
            about = {"model": {"name": model, **describe(loaded)}, "backend": backend, "threads": threads, "n_threads": n_threads}
    about |= {"kv_type": kv_type, "exact": exact, "fill": fill, "lowerings": lowering or [], "by": by, **machine.describe()}
    if not all(steps.n_calls for steps in found):
        raise UnsupportedError(f"[profile] wanted steps that a native loop runs; those of {model} run elsewhere with {backend}")
    tables = [(steps, steps.groups(by, exact)) for steps in found]  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(as_object(about, tables, roofs, top)))
    else:
        typer.echo(as_text(about, tables, roofs, top))


@runtime_checkable
class Timed(Protocol):
    """A device that takes the time of its calls."""

    def profiling(self, note: Callable[..., None]) -> AbstractContextManager[None]: ...

    def thread_counters(self) -> list[ThreadCounters]: ...


class NativeRun(NamedTuple):
    """What the device tells of a run of the native loop."""

    calls: Sequence[Call]
    dims: Mapping[str, int]
    seconds: np.ndarray  # of each call
    spent_s: float  # of all, taking the times included


@dataclass
class Steps:
    """Steps of one case: the seconds of each, the native runs that it consisted of, and what threads did in all of them."""

    case: Case
    wall_s: list[float] = field(default_factory=list)
    runs: list[list[NativeRun]] = field(default_factory=list)
    threads: list[ThreadCounters] = field(default_factory=list)

    @property
    def native_s(self) -> float:
        """Seconds of a step inside the native loop."""
        return sum(float(run.seconds.sum()) for step in self.runs for run in step) / len(self.runs)

    @property
    def outside_s(self) -> float:
        """Seconds of a step outside the native loop, without those for taking times: their median, since one in many prepares
        those that follow it."""
        from tensorgraph.tools.bench.cases import median

        return median([wall - sum(run.spent_s for run in step) for wall, step in zip(self.wall_s, self.runs, strict=True)])

    @property
    def n_calls(self) -> float:
        """Calls of a step."""
        return sum(len(run.calls) for step in self.runs for run in step) / len(self.runs)

    def groups(self, by: By, exact: bool) -> list[Group]:
        """All calls in groups: the slowest first, or, by step, in order."""
        from tensorgraph.tools.profile_groups import Group, labels, works

        found: dict[str, Group] = {}
        known: dict[tuple[Call, ...], list[str]] = {}
        for step in self.runs:
            at = 0  # calls of this step so far: a prompt may take several runs
            for run in step:
                calls = tuple(run.calls)
                if calls not in known:
                    known[calls] = labels(calls, by)
                for i, (label, work) in enumerate(zip(known[calls], works(calls, run.dims, exact=exact), strict=True)):
                    key = f"{at + i} {label}" if by == "step" else label
                    found.setdefault(key, Group(label)).add(1, float(run.seconds[i]), work)
                at += len(calls)
        return list(found.values()) if by == "step" else sorted(found.values(), key=lambda g: -g.seconds)


def measure(
    model: TextModel,
    wanted: Sequence[Case],
    rounds: int,
    roofs_threads: int | None,
    say: Callable[[str], None],
    fill: bool = False,
) -> tuple[list[Steps], Roofs | None]:
    """Profile cases, each after a round that does not count; with the roofs of so many threads, measured between."""
    from tensorgraph.tools.bench.command import random_ids
    from tensorgraph.tools.bench.ours import fill_randomly
    from tensorgraph.tools.bench.roofs import fma_after_reading
    from tensorgraph.tools.bench.roofs import measure as measure_roofs

    roofs: list[Roofs] = []

    def look() -> None:
        if roofs_threads is not None:
            say("roofs")
            roofs.append(measure_roofs(roofs_threads, ROOFS_S))

    found = []
    with model.session(context=max(case.end for case in wanted)) as session:
        ids = random_ids(session.context, model.model.vocab_size)
        depth = wanted[0].depth
        if depth:
            say(f"filling to depth {depth}")
            fill_randomly(session, ids[:depth]) if fill else session.eval(ids[:depth])
        prefix = session.snapshot()
        for case in wanted:
            new = ids[depth : case.end]
            fed = [new] * rounds if case.kind == "pp" else [[token] for token in new]
            say(f"{case}, warm-up")
            feed(session, prefix, Steps(case), fed[:1] if case.kind == "pp" else fed)
            look()
            say(str(case))
            found.append(feed(session, prefix, Steps(case), fed))
        look()
        prefix.release()
    middle = _middle(roofs)
    if middle is not None and roofs_threads is not None:
        middle = replace(middle, late_fma_gflops=fma_after_reading(roofs_threads))
    return found, middle


def feed(session: TextSession, prefix: SessionSnapshot, steps: Steps, fed: Sequence[Sequence[int]]) -> Steps:
    """Evaluate tokens after a prefix: one step after another, or, of a prompt, each anew."""

    def note(calls: Sequence[Call], dims: Mapping[str, int], seconds: np.ndarray, spent_s: float) -> None:
        steps.runs[-1].append(NativeRun(calls, dict(dims), seconds, spent_s))

    timed = [device for device in session.engine.devices if isinstance(device, Timed)]
    with ExitStack() as stack:
        for device in timed:
            stack.enter_context(device.profiling(note))
        session.restore(prefix)
        before = counters(timed)
        for tokens in fed:
            if steps.case.kind == "pp":
                session.restore(prefix)
            steps.runs.append([])
            began = time.perf_counter()
            session.eval(tokens)
            steps.wall_s.append(time.perf_counter() - began)
        steps.threads = since(before, counters(timed))
    session.restore(prefix)
    return steps


def counters(devices: Sequence[Timed]) -> list[ThreadCounters]:
    """Of the threads of all devices."""
    return [counter for device in devices for counter in device.thread_counters()]


def since(before: Sequence[ThreadCounters], now: Sequence[ThreadCounters]) -> list[ThreadCounters]:
    """What was done between two looks; nothing had been where there were no threads yet."""
    zeros = [type(counter)(0, 0, 0, 0.0) for counter in now]
    pairs = zip(now, before if len(before) == len(now) else zeros, strict=True)
    return [type(a)(a.chunks - b.chunks, a.runs - b.runs, a.parks - b.parks, a.busy_s - b.busy_s) for a, b in pairs]


def _middle(found: Sequence[Roofs]) -> Roofs | None:
    from tensorgraph.tools.bench.cases import median
    from tensorgraph.tools.bench.roofs import Roofs

    if not found:
        return None
    dots = [r.dot_gops for r in found if r.dot_gops is not None]
    return Roofs(median([r.stream_gbs for r in found]), median([r.fma_gflops for r in found]), median(dots) if dots else None)


def as_object(
    about: Mapping[str, Any], tables: Sequence[tuple[Steps, Sequence[Group]]], roofs: Roofs | None, top: int | None
) -> dict[str, Any]:
    """Everything. Units: seconds, bytes, operations; of groups, means of a step."""
    found = []
    for steps, groups in tables:
        times = {"wall_s": steps.native_s + steps.outside_s, "native_s": steps.native_s, "outside_s": steps.outside_s}
        case = {"test": str(steps.case), **asdict(steps.case), "steps": len(steps.runs), "calls": steps.n_calls, **times}
        shown = [_group_object(g, steps, roofs) for g in _slowest(groups, top)]
        found.append(case | {"threads": _thread_objects(steps), "groups": shown})
    return {**about, "roofs": asdict(roofs) if roofs else None, "cases": found}


def _thread_objects(steps: Steps) -> list[dict[str, Any]]:
    """Of each thread, the calling one first; `chunks` is a mean of a step, `busy` the part of the native loop's time."""
    n, native_s = len(steps.runs), steps.native_s * len(steps.runs)
    chunks = sum(counter.chunks for counter in steps.threads) or 1
    return [
        {
            "chunks": counter.chunks / n,
            "share": counter.chunks / chunks,
            "busy": counter.busy_s / native_s,
            "runs": counter.runs,
            "parks": counter.parks,
        }
        for counter in steps.threads
    ]


def _group_object(group: Group, steps: Steps, roofs: Roofs | None) -> dict[str, Any]:
    n, work = len(steps.runs), group.work
    operations = work.flops + work.int8_ops
    spent = group.seconds or float("inf")  # calls of no rows take no time
    found: dict[str, Any] = {
        "label": " ".join(group.label.split()),
        "calls": group.calls / n,
        "total_s": group.seconds / n,
        "mean_s": group.seconds / group.calls,
        "share": group.seconds / n / steps.native_s,
        "size_bytes": work.size_bytes / n,
        "flops": work.flops / n,
        "int8_ops": work.int8_ops / n,
        "gbs": work.size_bytes / spent / 1e9,
        "gflops": operations / spent / 1e9,
    }
    if roofs is not None:
        least_s, limit = work.roof(roofs)
        found |= {"roof_fraction": least_s / spent, "roof": limit}
    return found


def _slowest(groups: Sequence[Group], top: int | None) -> list[Group]:
    """The `top` groups that took longest, in the order given."""
    chosen = sorted(groups, key=lambda g: -g.seconds)[:top]
    return [g for g in groups if g in chosen]


def as_text(
    about: Mapping[str, Any], tables: Sequence[tuple[Steps, Sequence[Group]]], roofs: Roofs | None, top: int | None
) -> str:
    """A table for each case, below what it is of."""
    model, n = about["model"], about["n_threads"]
    said = f"{model['name']} ({model['architecture']} {model['type']}), {about['backend']}, {n} thread{'' if n == 1 else 's'}"
    lines = [said + f", rows {about['kv_type']}" + (", exact" if about["exact"] else "")]
    if roofs is not None:
        dot = f", {roofs.dot_gops:.0f} int8 GOP/s" if roofs.dot_gops is not None else ""
        late = f" ({roofs.late_fma_gflops:.0f} just after reading)" if roofs.late_fma_gflops is not None else ""
        lines.append(f"roofs: {roofs.stream_gbs:.1f} GB/s read, {roofs.fma_gflops:.0f} f32 GFLOP/s{late}{dot}")
    return "\n\n".join(["\n".join(lines), *(_case_text(steps, groups, about["by"], roofs, top) for steps, groups in tables)])


def _case_text(steps: Steps, groups: Sequence[Group], by: str, roofs: Roofs | None, top: int | None) -> str:
    from tensorgraph.tools.profile_groups import Group

    native, outside, n = steps.native_s, steps.outside_s, len(steps.runs)
    rate = steps.case.tokens * (n if steps.case.kind == "pp" else 1) / (n * (native + outside))
    head = f"{steps.case}: {n} step{'' if n == 1 else 's'} of {steps.n_calls:g} calls, {rate:.1f} t/s"
    split = f"{native * 1e3:.3f} ms inside the native loop, {outside * 1e3:.3f} ms outside"
    shown = _slowest(groups, top)
    rest, whole = Group(f"{len(groups) - len(shown)} others"), Group("all")
    for group in groups:
        whole.add(group.calls, group.seconds, group.work)
        if group not in shown:
            rest.add(group.calls, group.seconds, group.work)
    first = (by, "calls", "ms a step", "us a call", "share", "MB", "MFLOP", "GB/s", "GFLOP/s")
    listed = [*shown, *([rest] if rest.calls else ()), whole]
    rows = [(*first, "of roof") if roofs else first, *(_row(group, steps, roofs) for group in listed)]
    tables = "\n\n".join([options.table(rows), *([options.table(_thread_rows(steps))] if steps.threads else [])])
    return f"{head}\na step: {(native + outside) * 1e3:.3f} ms = {split}\n\n{tables}"


def _thread_rows(steps: Steps) -> list[tuple[str, ...]]:
    """Below their heads."""
    rows: list[tuple[str, ...]] = [("thread", "chunks a step", "of all", "busy", "runs", "slept")]
    for i, t in enumerate(_thread_objects(steps)):
        row = (f"{t['chunks']:.1f}", f"{t['share']:.1%}", f"{t['busy']:.1%}", str(t["runs"]), str(t["parks"]))
        rows.append((f"{i}{' (calling)' if i == 0 else ''}", *row))
    return rows


def _row(group: Group, steps: Steps, roofs: Roofs | None) -> tuple[str, ...]:
    found = _group_object(group, steps, roofs)
    operations = found["flops"] + found["int8_ops"]
    row = (
        group.label,
        f"{found['calls']:g}",
        f"{found['total_s'] * 1e3:.3f}",
        f"{found['mean_s'] * 1e6:.2f}",
        f"{found['share']:.1%}",
        f"{found['size_bytes'] / 1e6:.3f}",
        f"{operations / 1e6:.3f}",
        f"{found['gbs']:.1f}",
        f"{found['gflops']:.1f}",
    )
    return (*row, f"{found['roof_fraction']:.0%} {found['roof']}") if roofs else row
