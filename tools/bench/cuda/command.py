"""The program: ceilings first, then ops, then models, as far as the minutes go."""

from __future__ import annotations

import gc
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.runtime import OutOfMemoryError
from tensorgraph.device import get_devices
from tensorgraph.errors import InputError, TensorGraphError
from tensorgraph.tools import options
from tensorgraph.tools.bench import machine
from tensorgraph.tools.bench.command import progress
from tensorgraph.tools.bench.cuda import ceilings, models, ops, results
from tensorgraph.tools.bench.cuda.drawn import Drawing
from tensorgraph.tools.bench.cuda.kernels import Noted
from tensorgraph.tools.bench.cuda.model_cases import CASES, ModelCase
from tensorgraph.tools.bench.cuda.op_cases import OpCase, cases
from tensorgraph.tools.bench.cuda.peers import give_back, installed
from tensorgraph.tools.bench.cuda.results import Budget, Ceilings, Row
from tensorgraph.tools.bench.cuda.scale import scale_of
from tensorgraph.tools.bench.measurements import by_lines
from tensorgraph.tools.cli import Commands

PARTS = ("ceilings", "ops", "models")
FAILED = 1
OPS_SHARE = 0.45
"""Of the minutes: the models have the rest."""
OP_S = 3.0
"""What an op takes, about, its code included."""


def bench(
    backend: Annotated[str, typer.Option(help="cuda, cuda:N, or cuda-host, at small sizes.", metavar="NAME")] = "cuda",
    minutes: Annotated[float, typer.Option(min=0, help="What there is no time for is listed as not run.")] = 10,
    only: Annotated[
        list[str] | None, typer.Option(help="A part alone; repeated. The ceilings are always measured.", metavar="|".join(PARTS))
    ] = None,
    match: Annotated[str, typer.Option(help="Ops and models whose names match.", metavar="GLOB")] = "*",
    rounds: Annotated[int, typer.Option("-r", "--rounds", min=1, help="Rounds that count.")] = 7,
    record: Annotated[Path | None, typer.Option(help="The folder for cuda.md and cuda.json.", show_default="none")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure a GPU: what it does at most, what kernels reach of it, and models with weights drawn in its memory.

    Ops stand beside torch, cuBLAS and Triton where these are installed, by turns. Nothing is read but the checkout.

    \b
    python -m tensorgraph.tools.bench.cuda --record docs/measurements
    python -m tensorgraph.tools.bench.cuda --only ops --match 'mul_mat q4_k*' --json
    """
    (device, *more) = get_devices(backend)
    if more or not isinstance(device, CudaDevice):
        raise InputError(f"[bench] wanted --backend cuda, cuda:N or cuda-host; got {backend!r}")
    chosen = set(only or PARTS)
    if not chosen <= set(PARTS):
        raise InputError(f"[bench] wanted --only {', '.join(PARTS)}; got {', '.join(sorted(chosen - set(PARTS)))}")
    found_ops = [case for case in cases() if "ops" in chosen and fnmatchcase(case.name, match)]
    found_models = [case for case in CASES if "models" in chosen and fnmatchcase(case.name, match)]
    if match != "*" and not found_ops and not found_models:
        known = ", ".join([*(case.name for case in cases()), *(case.name for case in CASES)])
        raise InputError(f"[bench] nothing is called {match!r}; there are {known}")
    about = {"rounds": rounds, "minutes": minutes, "backend": backend, "device": device.runtime.describe(), **machine.describe()}
    about["versions"] |= {**versions(), **installed()}
    work = Work(device, rounds, Budget(minutes), about)
    with progress() as say:
        for _ in work.parts(found_ops, found_models, say):
            if record is not None:
                write(record, work)
    if as_json:
        typer.echo(json.dumps(work.as_object()))
    else:
        typer.echo(results.text(work.rows, work.budget.not_run, about))
    for error in work.errors:
        typer.echo(f"tensorgraph: {error}", err=True)
    if record is not None:
        typer.echo(f"\nwritten: {record / 'cuda.md'}, {record / 'cuda.json'}", err=as_json)
    if work.errors:
        raise typer.Exit(FAILED)


@dataclass
class Work:
    """What is measured on a device, and what came of it."""

    device: CudaDevice
    rounds: int
    budget: Budget
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def parts(self, found_ops: Iterable[OpCase], found_models: Iterable[ModelCase], say: Callable[[str], None]) -> Iterator[None]:
        """Measure; something is there to be written after each of them."""
        scale = scale_of(self.device)
        if not self.budget.has("ceilings", "all", 0):
            self._leave_all(found_ops, found_models)
            yield
            return
        most, rows = ceilings.measure(self.device, scale, self.rounds, say)
        self.rows += rows
        yield
        noted, drawing = Noted(self.device.runtime), Drawing(self.device)
        for case in found_ops:
            say(f"{self._spent} {case.name}")
            if self.budget.has("ops", case.name, OP_S if scale.full else 0, OPS_SHARE if found_models else 1.0):
                with self._kept("ops", case.name):
                    self.rows.append(ops.measure(case, self.device, noted, scale, most, self.rounds))
            yield
        yield from self._models(found_models, drawing, noted, most, say, small=not scale.full)

    def _models(
        self,
        found: Iterable[ModelCase],
        drawing: Drawing,
        noted: Noted,
        most: Ceilings,
        say: Callable[[str], None],
        *,
        small: bool,
    ) -> Iterator[None]:
        bench = models.Bench(self.device, drawing, noted, most, self.rounds, small, lambda text: say(f"{self._spent} {text}"))
        for case in found:
            if small and not case.small:
                self.budget.leave("models", case.name, f"it is too large for {self.device.name}")
            elif self.budget.has("models", case.name, case.estimate_s if not small else 0):
                with self._kept("models", case.name):
                    self.rows.extend(models.measure(case, bench))
            yield

    @property
    def _spent(self) -> str:
        return f"{self.budget.spent_s:.0f} s of {self.budget.minutes:g} minutes:"

    def _leave_all(self, found_ops: Iterable[OpCase], found_models: Iterable[ModelCase]) -> None:
        for part, found in (("ops", found_ops), ("models", found_models)):
            for case in found:
                self.budget.has(part, case.name, 0)

    def _kept(self, part: str, name: str) -> _Kept:
        return _Kept(self, part, name)

    def as_object(self) -> dict[str, Any]:
        """Everything, every round of it. Units: seconds, bytes."""
        runs = [row.as_object() for row in self.rows]
        return {**self.about, "runs": runs, "not_run": self.budget.not_run, "errors": self.errors}


@dataclass
class _Kept:
    """What goes wrong inside is said and listed, and the rest goes on; memory is given back."""

    work: Work
    part: str
    name: str

    def __enter__(self) -> None:
        gc.collect()
        give_back()

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> bool:
        if isinstance(error, OutOfMemoryError):
            self.work.budget.leave(self.part, self.name, " ".join(str(error).split()))
        elif isinstance(error, TensorGraphError):
            self.work.errors.append(f"{self.part}, {self.name}: {' '.join(str(error).split())}")
        return isinstance(error, TensorGraphError)


def versions() -> dict[str, str]:
    """Of what the backend runs on, where it is installed."""
    found = {}
    for package in ("cupy-cuda13x", "cupy-cuda12x"):
        try:
            found["cupy"] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(record: Path, work: Work) -> None:
    """The page and the figures that are kept."""
    record.mkdir(parents=True, exist_ok=True)
    said = "Weights are drawn in the card's memory. Times are of recorded graphs, by events; tokens a second are of whole steps, "
    said = textwrap.fill(f"{said}logits on the host included. Targets are estimates.", 130)
    head = f"# CUDA kernels and models on {work.about['device']['name']}\n\n{said}\n\n"
    head += f"    make bench-cuda\n\nMeasured {work.about['date']}.\n\n"
    failed = "".join(f"\n- failed: {error}" for error in work.errors)
    page = results.text(work.rows, work.budget.not_run, work.about, markdown=True)
    (record / "cuda.md").write_text(f"{head}{page}{failed}\n")
    (record / "cuda.json").write_text(by_lines({"name": "cuda", "command": "make bench-cuda", **work.as_object()}))


def main() -> None:
    """The program."""
    app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(bench)
    app.callback()(lambda: None)
    app(["bench", *sys.argv[1:]])
