"""`tensorgraph synth`: a GGUF file with random weights in any shape, for measuring where no weights can be had."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options
from tensorgraph.tools.inspect import totals

if TYPE_CHECKING:
    from tensorgraph.tools.synth.shape import Shape

TYPE = "Type of all matrices, or GLOB=TYPE of those whose names match; the last match wins. TYPE/TYPE: where rows do not fit."
LAYERS = "Keep some layers: N, the first N, or numbers and ranges such as 0,2-5."
SET = "Change a field of the configuration, spelled as in config.json; repeated."
VOCAB = "auto, gpt2 (byte-level BPE), llama (SentencePiece-style), bert (WordPiece) or none; auto: gpt2, or bert for encoders."


def synth(
    model: Annotated[str, typer.Argument(metavar="MODEL|CONFIG.json|NAME", help=options.DESCRIBED, show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", show_default=False)],
    types: Annotated[list[str] | None, typer.Option("--type", help=TYPE, metavar="[GLOB=]TYPE", show_default="f16")] = None,
    layers: Annotated[str | None, typer.Option(help=LAYERS, metavar="LIST", show_default="all")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Keep so many experts.", show_default="all")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help=SET, metavar="NAME=VALUE")] = None,
    vocab: Annotated[str, typer.Option(help=VOCAB, metavar="KIND")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.gguf if it is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a GGUF file with random weights in a model's shape, to measure shapes and types without the model.

    Norms and other vectors stay f32, and so do routers unless a rule names them.

    \b
    tensorgraph synth deepseek-v3 out.gguf --layers 2-4 --experts 16 --type q4_k/q8_0 --type 'output*=q6_k'
    tensorgraph synth llama-3.1-8b out.gguf --type q4_0/f16 --set hidden_size=2048 --set num_hidden_layers=8
    tensorgraph synth model.gguf out.gguf --type bf16 --vocab none
    """
    from tensorgraph.tools.model_argument import described_model
    from tensorgraph.tools.synth.rules import TypeRules
    from tensorgraph.tools.synth.shape import shape_of
    from tensorgraph.tools.synth.vocabulary import vocabulary

    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"[synth] wanted the name of a file in a folder that is there; got {out}")
    if out.exists() and not force:
        raise InputError(f"[synth] {out} is there already; --force replaces it")
    rules = TypeRules(["f16", *(types or ())])
    with described_model(model) as described:
        with options.working("planning"):
            shape = shape_of(described, rules, layers=layers, experts=experts, changes=changes or ())
        words = vocabulary(vocab, shape.model.vocab_size, encodes=described.encodes)
    began = time.perf_counter()
    size_bytes = _write(out, shape, words, seed)
    tensors = [{"dtype": str(t.dtype), "shape": list(t.shape), "size_bytes": t.size_bytes} for t in shape.tensors]
    report = {
        "file": str(out),
        "architecture": shape.model.architecture.name,
        "vocab": words["tokenizer.ggml.model"],
        "size_bytes": size_bytes,
        "write_s": time.perf_counter() - began,
        "totals": totals(tensors),
    }
    typer.echo(json.dumps(report) if as_json else _report_text(report))


def _write(out: Path, shape: Shape, words: dict[str, Any], seed: int) -> int:
    """Write the file, which appears whole or not at all; its bytes.

    Raises: InputError: there is no room for it.
    """
    from tensorgraph.models.text.gguf_writer import NewTensor, header, size_bytes, write
    from tensorgraph.tools.synth.values import contents

    head = header({**shape.metadata, **words}, shape.tensors)
    total = size_bytes(head, shape.tensors)
    free = shutil.disk_usage(out.parent).free
    if total > free:
        raise InputError(f"[synth] {out} takes {options.size_text(total)}; there is room for {options.size_text(free)}")
    n_experts = next((v for k, v in shape.metadata.items() if k.endswith(".expert_count")), 0)

    def content(tensor: NewTensor) -> Iterable[memoryview]:
        return [shape.given[tensor.name].data] if tensor.name in shape.given else contents(tensor, seed, n_experts)

    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("wb") as stream, _progress(total, out.name) as advance:
            write(stream, head, shape.tensors, lambda tensor: advance(content(tensor)))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return total


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[Iterable[memoryview]], Iterable[memoryview]]]:
    """A function that passes pieces on, and counts their bytes in a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda pieces: pieces
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)

        def passed(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
            for piece in pieces:
                yield piece
                bar.advance(task, piece.nbytes)
                bar.refresh()

        yield passed


def _report_text(report: dict[str, Any]) -> str:
    rows = [(t["dtype"], str(t["tensors"]), f"{t['parameters']:,}", options.size_text(t["size_bytes"])) for t in report["totals"]]
    written = f"{options.size_text(report['size_bytes'])} in {report['write_s']:.1f} s"
    head = f"{report['file']} ({report['architecture']}, vocabulary {report['vocab']}): {written}"
    return f"{head}\n\n{options.table([('type', 'tensors', 'parameters', 'size'), *rows])}"
