"""`tensorgraph embed`: vectors of texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options

if TYPE_CHECKING:
    import numpy as np

MOST_IN_TABLE = 12
"""Texts that are compared each with each; of more, each with its nearest."""
SHOWN_CHARACTERS, SHOWN_NUMBERS = 48, 6


def embed(
    model: options.Model,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts; - or nothing reads one a line from stdin.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Texts, one a line, after those given.", metavar="FILE")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="What of its tokens makes a text's vector: their mean, the first (cls), the last, or none: a vector each.",
            metavar="mean|cls|last|none",
            show_default="the model's",
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Give vectors the length 1.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Most tokens of several texts evaluated in one step.")] = 512,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are longer than the model's positions.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also print each text's token ids.")] = False,
    threads: options.Threads = options.AUTO,
    backend: options.Backend = options.BACKEND,
    exact: options.Exact = False,
    packed_cache: options.PackedCache = False,
    as_json: options.Json = False,
) -> None:
    """Compare texts by their vectors; with --json print the vectors.

    Printed are the cosines between all texts, or of many texts each one's nearest. JSON has `vectors`, a list of numbers for each
    text, or with --pooling none for each of its tokens.

    \b
    tensorgraph embed minilm "A man is eating." "Somebody has lunch." "The sky is blue."
    tensorgraph embed minilm --file sentences.txt --json
    cat sentences.txt | tensorgraph embed model.gguf - --pooling cls --no-normalize
    """
    count = options.thread_count(threads)
    given = read_texts(texts or [], file)
    options.limit_threads(count)
    from tensorgraph.compiler import CompileOptions
    from tensorgraph.models.text import embedding
    from tensorgraph.models.text.model import load

    chosen = None if pooling is None else embedding.as_pooling(pooling)
    with options.working("loading"):
        compiled = CompileOptions(exact=exact)
        loaded = load(model, backend=backend, options=compiled, threads=count, packed_cache=packed_cache)
    with loaded:
        how = loaded.pooling if chosen is None else chosen
        ids = embedding.encode(loaded, given, truncate=truncate)
        rows = embedding.hidden_states(loaded, ids, batch=batch)
        vectors = list(embedding.embed(options.shown(rows, len(ids), "embedding"), how, normalize=normalize))
    report: dict[str, Any] = {"dimensions": vectors[0].shape[-1], "pooling": how, "normalized": normalize}
    report["n_tokens"] = [len(each) for each in ids]
    if as_json:
        more = {"texts": given, **({"ids": ids} if tokens else {})}
        typer.echo(json.dumps(report | more | {"vectors": [numbers(v) for v in vectors]}))
        return
    if tokens:
        typer.echo("\n".join(f"{n}  {' '.join(map(str, each))}" for n, each in enumerate(ids, 1)) + "\n")
    typer.echo(as_text(report, given, vectors))


def read_texts(given: Sequence[str], file: Path | None) -> list[str]:
    """The texts that a command line means, in its order; those of stdin where `-` stands, those of a file last.

    Raises:
        InputError: there is none, or no such file, or it is no UTF-8.
    """
    if given.count("-") > 1:
        raise InputError("[embed] stdin is read once; got - twice")
    if not given and file is None and not sys.stdin.isatty():
        given = ["-"]
    found = [line for text in given for line in (lines(options.stdin_text("embed")) if text == "-" else [text])]
    if file is not None:
        try:
            found += lines(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"[embed] {file} is no UTF-8: {error}") from None
    if not found:
        raise InputError("[embed] wanted texts: TEXT ..., --file FILE, or - and texts on stdin; got none")
    return found


def lines(text: str) -> list[str]:
    """Without what ends them; those that are empty too, so that the n-th line is the n-th text."""
    return text.removesuffix("\n").split("\n") if text else []


def numbers(vector: np.ndarray) -> list[Any]:
    """Numbers in f32 with as many digits as tell them apart. Shapes: [D] or [n, D]."""
    return [numbers(row) for row in vector] if vector.ndim > 1 else [float(str(x)) for x in vector]


def as_text(report: dict[str, Any], texts: Sequence[str], vectors: Sequence[np.ndarray]) -> str:
    """For people: what there is, and how alike the texts are."""
    import numpy as np

    from tensorgraph.models.text.embedding import normalized

    each = "a token" if report["pooling"] == "none" else "a text"
    head = f"{report['dimensions']} dimensions {each}, pooling {report['pooling']}"
    named = [(str(i), cut(text)) for i, text in enumerate(texts, 1)]
    counts = [str(n) for n in report["n_tokens"]]
    if report["pooling"] == "none" or len(texts) == 1:
        first = [" ".join(f"{x:.5f}" for x in vector.reshape(-1)[:SHOWN_NUMBERS]) for vector in vectors]
        rows = [("", "text", "begins with", "tokens")]
        rows += [(*name, f"{some} ...", n) for name, some, n in zip(named, first, counts, strict=True)]
        return f"{head}\n\n{options.table(rows, left=3)}"
    unit = normalized(np.stack(vectors))
    if len(texts) <= MOST_IN_TABLE:
        table: list[tuple[str, ...]] = [("", "text", "tokens", *(number for number, _ in named))]
        for name, n, cosines in zip(named, counts, unit @ unit.T, strict=True):
            table.append((*name, n, *(f"{x:.4f}" for x in cosines)))
        return f"{head}; cosines\n\n{options.table(table, left=2)}"
    listed = [("", "text", "", "nearest", "tokens", "cosine")]
    for i, (name, n) in enumerate(zip(named, counts, strict=True)):
        cosines = unit @ unit[i]
        cosines[i] = -np.inf
        nearest = int(np.argmax(cosines))
        listed.append((*name, *named[nearest], n, f"{cosines[nearest]:.4f}"))
    return f"{head}; each text's nearest\n\n{options.table(listed, left=4)}"


def cut(text: str) -> str:
    """A text as one line of a table."""
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}...")
