"""Commands that write a GGUF file: where it may lie, writing it whole or not at all, and what is said of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.models.text.gguf_writer import NewTensor

Out = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT.gguf if it is there.")]


def check(command: str, out: Path, force: bool) -> None:
    """Raises: InputError: no file can be written there, or one is there that is not to be replaced."""
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"[{command}] wanted the name of a file in a folder that is there; got {out}")
    if out.exists() and not force:
        raise InputError(f"[{command}] {out} is there already; --force replaces it")


def write_file(
    command: str,
    out: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    content: Callable[[NewTensor], Iterable[memoryview]],
) -> int:
    """Write the file, which appears whole or not at all; its bytes.

    Raises: InputError: there is no room for it.
    """
    from tensorgraph.models.text.gguf_writer import header, size_bytes, write

    head = header(metadata, tensors)
    total = size_bytes(head, tensors)
    free = shutil.disk_usage(out.parent).free
    if total > free:
        raise InputError(f"[{command}] {out} takes {options.size_text(total)}; there is room for {options.size_text(free)}")
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("wb") as stream, _progress(total, out.name) as advance:
            write(stream, head, tensors, lambda tensor: advance(content(tensor)))
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


def totals_table(totals: Iterable[Mapping[str, Any]]) -> str:
    """Of each element type of a file."""
    rows = [(t["dtype"], str(t["tensors"]), f"{t['parameters']:,}", options.size_text(t["size_bytes"])) for t in totals]
    return options.table([("type", "tensors", "parameters", "size"), *rows])
