"""`tensorgraph bench`: the command."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tensorgraph.errors import InputError, TensorGraphError
from tensorgraph.tools import options
from tensorgraph.tools.bench.cases import Case, cases

if TYPE_CHECKING:
    from tensorgraph.models.text.model import TextModel
    from tensorgraph.tools.bench.peer_process import Peer
    from tensorgraph.tools.bench.report import Run
    from tensorgraph.tools.bench.roofs import Roofs

Counts = list[int] | None
PEER_FAILED = 1
ROOFS_S = 0.15
"""Seconds that a measurement of the roofs takes, for each number of threads, in each round."""


def bench(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help=options.MODEL, show_default="smollm2")] = None,
    prompt: Annotated[Counts, typer.Option("-p", "--prompt", min=0, help="Tokens of a prompt.", show_default="512")] = None,
    tokens: Annotated[Counts, typer.Option("-n", "--tokens", min=0, help="Tokens to decode.", show_default="128")] = None,
    depth: Annotated[Counts, typer.Option("-d", "--depth", min=0, help="Tokens there before.", show_default="0")] = None,
    fill: options.Fill = None,
    rounds: Annotated[int, typer.Option("-r", "--rounds", min=1, help="Rounds that count.")] = 7,
    threads: Annotated[
        list[str] | None,
        typer.Option("-t", "--threads", help="Threads; auto: as the backend likes.", metavar="N|auto", show_default=options.AUTO),
    ] = None,
    backend: options.Backend = options.BACKEND,
    kv_type: options.KvType = "f16",
    exact: options.Exact = False,
    lowering: options.Lowering = None,
    packed_cache: options.PackedCache = False,
    peer: Annotated[
        str | None, typer.Option(help="Also measure llama.cpp: an interpreter that has llama-cpp-python.", metavar="PYTHON")
    ] = None,
    peer_models: Annotated[
        list[str] | None,
        typer.Option(
            "--peer-model",
            help="The peer's file, such as the same weights in its fastest type; repeated: beside each of them.",
            metavar="MODEL",
            show_default="MODEL",
        ),
    ] = None,
    busy: Annotated[int, typer.Option(min=0, help="Other processes that keep a core busy each meanwhile.", metavar="N")] = 0,
    as_json: options.Json = False,
    markdown: Annotated[bool, typer.Option("--md", help="Print tables in Markdown.")] = False,
) -> None:
    """Measure tokens a second: pp, a prompt at once, and tg, token by token; -p, -n, -d and -t may be repeated.

    A peer's rounds alternate with ours. Each round also measures what the machine reads and computes at that moment, and
    decoding is compared with it: `read` is what it reads a second, and which part that is of what could be read then.

    \b
    tensorgraph bench smollm2 -t 1 -t 2
    tensorgraph bench model.gguf -p 512 -n 128 -d 0 -d 4096 --json
    tensorgraph bench model.gguf -p 0 -n 16 -d 131072 --fill random
    tensorgraph bench model.gguf other.gguf --peer venv/bin/python --md
    tensorgraph bench model.gguf --peer venv/bin/python --peer-model model-q4_0.gguf --busy 1
    """
    names, wanted = models or ["smollm2"], cases(prompt or [512], tokens or [128], depth or [0])
    if not wanted:
        raise InputError("[bench] wanted tokens to evaluate: -p or -n above 0")
    if as_json and markdown:
        raise InputError("[bench] wanted --json or --md; got both")
    if peer_models and (peer is None or len(names) > 1):
        raise InputError("[bench] --peer-model goes with --peer and one MODEL")
    counts = thread_counts(threads or [options.AUTO])
    if backend.startswith("reference"):
        if len(counts) > 1:
            raise InputError(f"[bench] NumPy's BLAS takes its threads once; wanted one -t for {backend}, got {len(counts)}")
        options.limit_threads(counts[0])
    settings = Settings(wanted, rounds, backend, kv_type, exact, packed_cache, peer, busy, fill, tuple(lowering or ()))
    pairs = [Pair(name, other) for name in names for other in peer_models or [name]]
    runs, about = measure_all(settings, [(pair, count) for pair in pairs for count in counts])
    from tensorgraph.tools.bench import report

    if as_json:
        typer.echo(json.dumps(report.as_object(runs, about, settings.errors)))
    elif markdown or not sys.stdout.isatty():
        typer.echo(report.as_text(runs, about, markdown=markdown))
    else:
        report.show(runs, about)
    if settings.errors:
        raise typer.Exit(PEER_FAILED)


def thread_counts(given: Sequence[str]) -> list[int | None]:
    """Numbers of threads, each once; None for `auto`.

    Raises: InputError: one is neither a number of threads nor `auto`.
    """
    counts = [options.thread_count(text) for text in given]
    return list(dict.fromkeys(None if count == options.AUTO else count for count in counts))


class Pair(NamedTuple):
    """A model, and what the peer is given: the same, or other weights."""

    name: str
    peer_name: str


@dataclass
class Settings:
    """What is measured, the same for every model; `errors` are what went wrong with the peer.

    Attributes:
        python: the peer's interpreter, None where there is no peer.
        busy: how many other processes keep a core busy meanwhile.
        fill: what state the tokens have that are there before; None: what evaluating them gives.
        lowerings: forms to take.
    """

    cases: list[Case]
    rounds: int
    backend: str = options.BACKEND
    kv_type: str = "f16"
    exact: bool = False
    packed_cache: bool = False
    python: str | None = None
    busy: int = 0
    fill: options.Filling | None = None
    lowerings: tuple[str, ...] = ()
    errors: list[str] = field(default_factory=list)

    def measure(self, pair: Pair, threads: int | None, say: Callable[[str], None], place: str) -> Run:
        """All cases of one model with one number of threads, and the peer's by turns; `place` is among all that is measured."""
        from tensorgraph.tools.bench import machine
        from tensorgraph.tools.bench.ours import Ours, describe, open_model
        from tensorgraph.tools.bench.peer_process import PeerError
        from tensorgraph.tools.bench.report import Run
        from tensorgraph.tools.bench.rounds import Contest

        name, label = pair.name, options.AUTO if threads is None else str(threads)
        n_threads, context = threads or machine.cores(), max(case.end for case in self.cases)

        def told(text: str) -> None:
            say(f"{place}: {name}, {label} threads: {text}")

        told("loading")
        with open_model(name, self.backend, threads, self.kv_type, self.exact, self.packed_cache, self.lowerings) as model:
            if context > model.model.context:
                raise InputError(f"[bench] the context of {name} holds {model.model.context} tokens; wanted {context}")
            ours, vocab_size = Ours(model, context, self.fill is not None), model.model.vocab_size
            peer = self._open_peer(pair.peer_name, model, n_threads, context)
            try:
                about = {**peer.about, **main_type(pair.peer_name), "file": pair.peer_name} if peer is not None else None
                contest = Contest(ours, peer, lost=PeerError, lose=self._lose)
                ids = random_ids(context, vocab_size)
                figures = contest.run_cases(self.cases, ids, self.rounds, roofs=lambda: roofs_now(n_threads), say=told)
            finally:
                if peer is not None:
                    peer.close()
            decoding = {str(case): ours.token_bytes(case) for case in self.cases if case.kind == "tg"}
            ours.close()
            described = {"name": Path(name).stem if Path(name).suffix else name, "file": name, **describe(model)}
            return Run(described, self.backend, label, n_threads, figures, decoding, about)

    def _open_peer(self, name: str, model: TextModel, threads: int, context: int) -> Peer | None:
        """The peer with its file; None, and a sentence on stderr, where it cannot be had."""
        from tensorgraph.models.text.packaged import find_model
        from tensorgraph.tools.bench.peer_process import Peer, PeerError

        if self.python is None:
            return None
        try:
            peer = Peer(self.python, find_model(name), threads, context, self.kv_type, self.fill is not None)
        except PeerError as error:
            self._lose(error)
            return None
        if peer.about["vocab_size"] < model.model.vocab_size:
            peer.close()
            self._lose(PeerError(f"[peer] wanted a vocabulary of {model.model.vocab_size}; got {peer.about['vocab_size']}"))
            return None
        return peer

    def _lose(self, error: Exception) -> None:
        sentence = " ".join(str(error).split())
        typer.echo(f"tensorgraph: {sentence}", err=True)
        self.errors.append(sentence)


def measure_all(
    settings: Settings, wanted: Sequence[tuple[Pair, int | None]], told: Callable[[Run], None] = lambda run: None
) -> tuple[list[Run], dict[str, Any]]:
    """Measure pairs with numbers of threads, one after another; and what the figures are of. `told` is given each run at once."""
    from tensorgraph.tools.bench import machine
    from tensorgraph.tools.bench.busy import busy

    about = {"rounds": settings.rounds, "kv_type": settings.kv_type, "exact": settings.exact, "busy": settings.busy}
    about |= {"packed_cache": settings.packed_cache, "fill": settings.fill, "lowerings": settings.lowerings}
    about |= machine.describe()
    runs: list[Run] = []
    with busy(settings.busy), progress() as say:
        for i, (pair, count) in enumerate(wanted, 1):
            runs.append(settings.measure(pair, count, say, f"{i} of {len(wanted)}"))
            told(runs[-1])
    return runs, about


def main_type(name: str) -> dict[str, str]:
    """`type` of a GGUF file, the one of most bytes; nothing where it cannot be read here."""
    from tensorgraph.models.text.gguf import GGUF
    from tensorgraph.models.text.packaged import find_model
    from tensorgraph.tools.bench.ours import most_bytes

    try:
        with GGUF.open(find_model(name)) as file:
            return {"type": most_bytes(file)}
    except TensorGraphError:
        return {}


def random_ids(n: int, vocab_size: int) -> list[int]:
    """The same ones each time."""
    return random.Random(0).choices(range(vocab_size), k=n)


def roofs_now(threads: int) -> Mapping[int, Roofs]:
    """The roofs of one thread and of so many."""
    from tensorgraph.tools.bench.roofs import measure

    return {n: measure(n, ROOFS_S) for n in sorted({1, threads})}


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is measured, where that is a terminal; no thread moves it meanwhile."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns, console = (TextColumn("{task.description}"), TimeElapsedColumn()), Console(stderr=True)
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def say(text: str) -> None:
            bar.update(task, description=text)
            bar.refresh()

        yield say
