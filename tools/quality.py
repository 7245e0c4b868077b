"""`tensorgraph quality`: what quantised activations and a shorter cache change of a model's predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.models.text.model import TextModel
    from tensorgraph.models.text.tokenizer import Tokenizer

STEP = 128  # tokens whose logits are held at once
SUFFIXES = (".md", ".txt")
Logits = Callable[[Sequence[int], int], Any]
"""`logits(ids, start)`: f32 [T, V] of tokens that follow the `start` ones before; those before are forgotten where that is 0."""


def quality(
    model: options.Model,
    text: Annotated[
        list[Path],
        typer.Option(
            help="A text, or a folder, whose .md and .txt files are joined by name; may be repeated.",
            metavar="FILE|FOLDER",
            show_default=False,
        ),
    ],
    positions: Annotated[int, typer.Option(min=2, help="How many positions of the text are compared.")] = 2000,
    window: Annotated[int, typer.Option(min=2, help="Tokens after which all that came before is forgotten.")] = 512,
    peer: Annotated[
        str | None,
        typer.Option(help="Also llama.cpp, with flash attention: an interpreter that has llama-cpp-python.", metavar="PYTHON"),
    ] = None,
    threads: options.Threads = options.AUTO,
    backend: options.Backend = options.BACKEND,
    kv_type: options.KvType = "f16",
    as_json: options.Json = False,
) -> None:
    """Compare next-token distributions with those of exact mode, whose activations and cache are f32.

    Printed are, over the positions of a text, the Kullback-Leibler divergence from exact mode in nats, how often the likeliest
    token is the same, and the perplexity. Windows of the text are evaluated one by one, the same ones by everybody.

    \b
    tensorgraph quality smollm2 --text docs/decisions
    tensorgraph quality model.gguf --text book.txt --positions 5000 --window 1024 --peer venv/bin/python --json
    """
    count = options.thread_count(threads)
    options.limit_threads(count)
    from tensorgraph.compiler import CompileOptions
    from tensorgraph.models.text.model import load
    from tensorgraph.models.text.packaged import find_model
    from tensorgraph.tools.bench import machine
    from tensorgraph.tools.bench.peer_process import Peer, PeerError

    content, about_text = read_text(text)
    with ExitStack() as stack:
        with options.working("loading"):
            how: dict[str, Any] = {"backend": backend, "threads": count}
            exact = stack.enter_context(load(model, kv_type="f32", options=CompileOptions(exact=True), **how))
            ours = stack.enter_context(load(model, kv_type=kv_type, **how))
        if window > exact.model.context:
            raise InputError(f"[quality] the context of {model} holds {exact.model.context} tokens; wanted {window}")
        steps = [*cut(content, ours.tokenizer, positions, window)]
        sides: dict[str, Logits] = {"exact": _session(exact, window), "ours": _session(ours, window)}
        about_peer = None
        if peer is not None:
            n_threads = count if isinstance(count, int) else machine.cores()
            theirs = stack.enter_context(Peer(peer, find_model(model), n_threads, window, kv_type))
            if theirs.about["vocab_size"] != exact.model.vocab_size:
                raise PeerError(f"[peer] wanted a vocabulary of {exact.model.vocab_size}; got {theirs.about['vocab_size']}")
            sides, about_peer = sides | {"peer": theirs.logits}, theirs.about
        figures = compare_sides(options.shown(steps, len(steps), "evaluating"), sides)
    settings = {"model": model, "backend": backend, "threads": threads, "kv_type": kv_type, "window": window}
    ratio = figures["ours"]["mean"] / figures["peer"]["mean"] if "peer" in figures and figures["peer"]["mean"] else None
    about = {**settings, "positions": positions, "text": about_text, "peer_is": about_peer, "ratio": ratio, **machine.describe()}
    typer.echo(json.dumps(about | {"figures": figures}) if as_json else as_text(about, figures))


def read_text(paths: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    """The joined text, and what tells it from others.

    Raises: InputError: there is no such file, or one is no UTF-8.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and f.is_file()) if path.is_dir() else [path]
        if not found:
            raise InputError(f"[quality] wanted {' or '.join(SUFFIXES)} files in {path}; there are none")
        files += found
    parts = []
    for file in files:
        try:
            parts.append(file.read_bytes().decode().replace("\r\n", "\n"))
        except FileNotFoundError:
            raise InputError(f"[quality] there is no file {str(file)!r}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"[quality] {file} is no UTF-8: {error}") from None
    content = "\n".join(parts)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return content, {"paths": [str(path) for path in paths], "files": len(files), "sha256": digest}


@dataclass(frozen=True)
class Step:
    """Tokens that are evaluated together.

    Attributes:
        start: how many of their window come before.
        following: the token that comes after each in the text; None after the last.
    """

    ids: list[int]
    start: int
    following: list[int | None]


def cut(text: str, tokenizer: Tokenizer, positions: int, window: int) -> Iterator[Step]:
    """Windows, each with the tokens that begin a sequence, in steps; as many tokens in all as positions are wanted.

    Raises: InputError: the text has fewer.
    """
    ids, around = tokenizer.encode(text, add_special=False), tokenizer.encode("", add_special=True)
    prefix, left = around[: len(around) - len(tokenizer.suffix)], positions
    room = window - len(prefix)
    for at in range(0, len(ids), room):
        listed = [*prefix, *ids[at : at + room + 1]]
        taken = listed[: min(window, left)]
        for start in range(0, len(taken), STEP):
            stop = min(start + STEP, len(taken))
            after: list[int | None] = [*listed[start + 1 : stop + 1]]
            yield Step(taken[start:stop], start, after + [None] * (stop - start - len(after)))
        left -= len(taken)
        if not left:
            return
    raise InputError(f"[quality] wanted a text of {positions} positions; got one of {positions - left}")


def _session(model: TextModel, window: int) -> Logits:
    session = model.session(context=window, step_tokens=min(STEP, window))

    def logits(ids: Sequence[int], start: int) -> Any:
        if not start:
            session.trim(0)
        return session.eval(ids, all_logits=True)

    return logits


def compare_sides(steps: Iterable[Step], sides: Mapping[str, Logits]) -> dict[str, dict[str, float]]:
    """Figures of each side but `exact` against that one, and its perplexity; one step at a time is in memory."""
    from tensorgraph.tools.divergence import Rows, Summary, compare, join

    rows: dict[str, list[Rows]] = {name: [] for name in sides}
    for step in steps:
        want = sides["exact"](step.ids, step.start)
        for name, logits in sides.items():
            got = want if name == "exact" else logits(step.ids, step.start)
            rows[name].append(compare(want, got, step.following))
    figures = {name: Summary.of(join(parts)).as_object() for name, parts in rows.items()}
    return figures | {"exact": {"perplexity": figures["exact"]["perplexity"]}}


def as_text(about: Mapping[str, Any], figures: Mapping[str, Mapping[str, float]]) -> str:
    """The table, then what it is of."""
    rows: list[tuple[str, ...]] = [("", "KL, mean", "±", "median", "99 %", "largest", "same first", "perplexity")]
    rows.append(("exact", *("",) * 6, f"{figures['exact']['perplexity']:.4f}"))
    for name in ("ours", "peer"):
        if f := figures.get(name):
            kl = (f"{f[key]:.3g}" for key in ("mean", "standard_error", "median", "p99", "largest"))
            rows.append((name, *kl, f"{f['same_first']:.2%}", f"{f['perplexity']:.4f}"))
    text, machine = about["text"], about["machine"]
    paths = ", ".join(text["paths"])
    lines = [f"{about['positions']} positions in windows of {about['window']} of {paths} (sha256 {text['sha256'][:12]})"]
    lines.append(f"ours: {about['model']} on {about['backend']}, cache {about['kv_type']}; exact: activations and cache f32")
    if about["peer_is"] is not None:
        library = f" (llama.cpp {about['peer_is']['library']})" if about["peer_is"]["library"] else ""
        package = f"llama-cpp-python {about['peer_is']['package']}{library}"
        lines.append(f"peer: {package}, flash attention on, cache {about['kv_type']}")
    lines.append(f"machine: {machine['processor']}{', '.join(['', *machine['features']])}")
    ratio = [] if about["ratio"] is None else [f"mean KL, ours / peer: {about['ratio']:.3f}"]
    return "\n\n".join([options.table(rows), "\n".join([*ratio, *lines])])
