"""Options that several commands have, and what they mean."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

import typer

from tensorgraph.errors import InputError

T = TypeVar("T")
MODEL = (
    "A GGUF file (of a split one, any part), a folder with config.json and safetensors, "
    "or the name of a model in installed packages: smollm2, minilm, gemma3-270m."
)
DESCRIBED = (
    "A GGUF file, a published folder or config.json, smollm2, minilm, gemma3-270m, or a configuration that comes with "
    "tensorgraph: deepseek-v2-lite, deepseek-v3, deepseek-v3.2, deepseek-v4-flash, gemma3-1b, gpt-oss-20b, llama-3.1-8b, "
    "qwen2.5-0.5b, qwen3-0.6b, qwen3-30b-a3b."
)
HELP = {
    "backend": "The backend that computes, or several by commas in order of preference; cuda has the CPU for what has no room.",
    "kv_type": "Type of the rows that a sequence keeps: f16, bf16, f32 or q8_0.",
    "threads": "Threads that compute; auto: as the backend likes. The reference backend passes a number to NumPy's BLAS.",
    "exact": "Keep activations in f32, and weights as they are; the reference backend always does.",
    "packed_cache": "Keep the repacked weights of a GGUF file in the cache folder, and map them from there at later starts.",
    "gpu_layers": "Layers of the model, its last ones, that run on the first of two backends; auto: as many as it has room for.",
    "cpu_experts": "Experts of mixtures run on the second of two backends.",
    "json": "Print one JSON object.",
    "lowering": "A form to take wherever there is one of that name, whatever it costs; may be repeated (tensorgraph lowerings).",
    "fill": "Give tokens that are there before random state instead of evaluating them; a peer repeats the state of 128.",
}

AUTO: Literal["auto"] = "auto"
MOST_THREADS = 1024
BACKEND = "cpu"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
Backend = Annotated[str, typer.Option(help=HELP["backend"], metavar="NAME")]
KvType = Annotated[str, typer.Option(help=HELP["kv_type"], metavar="TYPE")]
Threads = Annotated[str, typer.Option("-t", "--threads", help=HELP["threads"], metavar="N|auto")]
Exact = Annotated[bool, typer.Option("--exact", help=HELP["exact"])]
Lowering = Annotated[list[str] | None, typer.Option("--lowering", help=HELP["lowering"], metavar="FORM", show_default=False)]
PackedCache = Annotated[bool, typer.Option("--packed-cache", help=HELP["packed_cache"])]
GpuLayers = Annotated[str, typer.Option("--gpu-layers", help=HELP["gpu_layers"], metavar="N|auto")]
CpuExperts = Annotated[bool, typer.Option("--cpu-experts", help=HELP["cpu_experts"])]
Filling = Literal["random"]
Fill = Annotated[Filling | None, typer.Option(help=HELP["fill"])]
Json = Annotated[bool, typer.Option("--json", help=HELP["json"])]


def thread_count(text: str) -> int | Literal["auto"]:
    """What `--threads` was given.

    Raises: InputError: it is neither a number of threads nor `auto`.
    """
    if text == AUTO:
        return AUTO
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MOST_THREADS):
        raise InputError(f"[threads] wanted a number from 1 to {MOST_THREADS}, or {AUTO}; got {text!r}")
    return int(text)


def placed(
    backend: str, gpu_layers: str, cpu_experts: bool, context: int | None = None, step_tokens: int = 512
) -> dict[str, Any]:
    """What `load` is told of `--backend`, `--gpu-layers` and `--cpu-experts`; a GPU alone has the CPU for what has no room there.

    Raises: InputError: `--gpu-layers` is neither a number of layers nor `auto`.
    """
    if gpu_layers != AUTO and not (gpu_layers.isascii() and gpu_layers.isdigit() and len(gpu_layers) < 6):
        raise InputError(f"[gpu-layers] wanted a number of layers, or {AUTO}; got {gpu_layers!r}")
    alone = backend.partition(":")[0] == "cuda" and "," not in backend
    n_layers = None if gpu_layers == AUTO else int(gpu_layers)
    devices = f"{backend},cpu" if alone else backend
    room = {"context": context, "step_tokens": step_tokens}
    return {"backend": devices, "gpu_layers": n_layers, "cpu_experts": cpu_experts, **room}


def limit_threads(count: int | Literal["auto"] | None) -> None:
    """Tell NumPy's BLAS how many threads to use, where that is a number; it reads it once, when NumPy is first imported."""
    if isinstance(count, int):
        os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(count)))


@contextmanager
def working(what: str) -> Iterator[None]:
    """A line on stderr while something takes long; nothing where that is no terminal.

    It stands still: a thread that moved it would keep the CPU backend from compiling in child processes, side by side.
    """
    shown = sys.stderr.isatty()
    if shown:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def shown(steps: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The steps, with a bar on stderr where that is a terminal; no thread moves it (see `working`)."""
    if not sys.stderr.isatty():
        yield from steps
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, what, total, console=Console(stderr=True), transient=True, auto_refresh=False)


def stdin_text(command: str) -> str:
    """All of standard input, as UTF-8 whatever the locale is.

    Raises: InputError: it is none.
    """
    stream = getattr(sys.stdin, "buffer", None)  # programs may put a text in its place
    try:
        return sys.stdin.read() if stream is None else stream.read().decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"[{command}] stdin is no UTF-8: {error}") from None


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
