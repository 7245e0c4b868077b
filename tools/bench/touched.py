"""What a step of one token reads, as its plan counts it and as the system saw it: `python -m tensorgraph.tools.bench.touched`.

Linux marks the pages of memory that a process touches, 4 KiB each. What lies apart, as rows that are listed do, is touched in
whole pages; how many these should be follows from the rows.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tensorgraph.errors import InputError, UnsupportedError
from tensorgraph.models.text.model import TextSession, load
from tensorgraph.tools import options
from tensorgraph.tools.bench import machine
from tensorgraph.tools.bench.ours import fill_randomly, read_bytes
from tensorgraph.tools.cli import Commands

PAGE = 4096
SMAPS, CLEAR = Path("/proc/self/smaps"), Path("/proc/self/clear_refs")
PR_SET_THP_DISABLE = 41
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@dataclass(frozen=True)
class Memory:
    """A part of memory that is told from others: some whole pages."""

    start: int
    stop: int

    @staticmethod
    def of(array: np.ndarray[Any, Any]) -> Memory:
        return Memory(array.ctypes.data // PAGE * PAGE, -(-(array.ctypes.data + array.nbytes) // PAGE) * PAGE)

    def stand_apart(self, advice: int) -> None:
        """Have the system count its pages apart from those beside them, which were given other advice."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.madvise(ctypes.c_void_p(self.start), ctypes.c_size_t(self.stop - self.start), advice):
            raise UnsupportedError(f"[touched] madvise: {ctypes.get_errno()}")


def referenced(parts: Mapping[str, Sequence[Memory]]) -> dict[str, int]:
    """Bytes of pages that were touched since `forget`, of what lies within each of some parts."""
    found = dict.fromkeys(parts, 0)
    start = stop = 0
    for line in SMAPS.read_text().splitlines():
        match = _RANGE.match(line)
        if match is not None:
            start, stop = (int(text, 16) for text in match.groups())
        elif line.startswith("Referenced:"):
            for name, memories in parts.items():
                if any(memory.start < stop and start < memory.stop for memory in memories):
                    found[name] += int(line.split()[1]) * 1024
    return found


def forget() -> None:
    """No page was touched."""
    CLEAR.write_text("1")


def touched(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=options.MODEL)],
    depth: Annotated[list[int], typer.Option("-d", "--depth", min=1, help="Tokens there before, random; may be repeated.")],
    threads: options.Threads = "1",
    as_json: options.Json = False,
) -> None:
    """Print, for each depth, the bytes that a step counts, and those of the pages that it touched: weights, and rows by kind."""
    if sys.platform != "linux" or not CLEAR.exists():
        raise UnsupportedError("[touched] wanted Linux, whose /proc says which pages a process has touched")
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a large page is touched as a whole
    found = []
    with load(model, threads=options.thread_count(threads)) as loaded:
        if max(depth) + 2 > loaded.model.context:
            raise InputError(f"[touched] the context of {model} holds {loaded.model.context} tokens; wanted {max(depth) + 2}")
        for n in depth:
            with loaded.session(context=max(depth) + 2) as session:
                fill_randomly(session, [1] * n)
                found.append({"depth": n, **measure(session)})
    typer.echo(json.dumps({"model": model, "rows": found, **machine.describe()}) if as_json else as_text(model, found))


def measure(session: TextSession) -> dict[str, dict[str, float]]:
    """Of the weights and of each kind of rows: bytes that are counted, those of pages in which these lie, and those touched."""
    before = session.snapshot()
    ids = tapped_ids(session)
    session.restore(before)
    session.eval([1])  # code is compiled, memory is there
    session.restore(before)
    parts = parts_of(session)
    forget()
    session.eval([1])
    seen = referenced(parts)
    before.release()
    weights, streams = read_bytes(session.plan, session.model.model, session.length, 1)
    counted: dict[str, float] = {"weights": weights}
    in_pages: dict[str, float] = {"weights": weights}
    for stream, size in streams.items():
        counted[kind(stream)] = counted.get(kind(stream), 0) + size
        listed = ids.get(layer(stream)) if "index" not in stream else None
        in_pages[kind(stream)] = in_pages.get(kind(stream), 0) + (size if listed is None else pages_of(session, stream, listed))
    names = [name for name in seen if name in counted]
    return {name: {"counted": counted[name], "in_pages": in_pages[name], "touched": seen[name]} for name in names}


def parts_of(session: TextSession) -> dict[str, list[Memory]]:
    """Where weights lie, and the rows of each kind, each with advice of its own."""
    advice = iter((mmap.MADV_DONTDUMP, mmap.MADV_NOHUGEPAGE, mmap.MADV_DONTFORK, mmap.MADV_RANDOM, mmap.MADV_SEQUENTIAL))
    parts: dict[str, list[Memory]] = {"weights": [Memory.of(held.data) for held in session.engine._uploaded.values()]}
    for stream in session._store.specs:
        parts.setdefault(kind(stream), []).append(Memory.of(session._store.pages(stream)))
    for name, memories in parts.items():
        wanted = next(advice, None) if name != "weights" else None
        for memory in memories if wanted is not None else ():
            memory.stand_apart(wanted)  # type: ignore[arg-type]
    return parts


def tapped_ids(session: TextSession) -> dict[str, np.ndarray[Any, Any]]:
    """The rows that a step of one token lists, by layer."""
    names = [node.name for node in session.plan.graph if node.name.endswith("index_ids")]
    values = session.eval([1], outputs=names) if names else {}
    return {layer(name): np.asarray(ids).reshape(-1) for name, ids in values.items()}


def pages_of(session: TextSession, stream: str, ids: np.ndarray[Any, Any]) -> int:
    """Bytes of the pages of memory in which some rows lie, the pages of a stream being in order."""
    rows = session._store.pages(stream)
    row_bytes = rows.nbytes // (len(rows) * 16)
    first = rows.ctypes.data + ids[ids >= 0].astype(np.int64) * row_bytes
    return PAGE * len(np.unique(np.concatenate([first // PAGE, (first + row_bytes - 1) // PAGE])))


def kind(stream: str) -> str:
    return stream.rpartition(".")[2]


def layer(name: str) -> str:
    return name.rpartition(".")[0]


def as_text(model: str, found: Sequence[Mapping[str, Any]]) -> str:
    rows: list[Sequence[str]] = [("tokens before", "what", "counted MB", "its pages MB", "touched MB", "touched / its pages")]
    for one in found:
        for name, sizes in _sizes(one):
            counted, pages, seen = (sizes[key] for key in ("counted", "in_pages", "touched"))
            figures = (f"{n / 1e6:.3f}" for n in (counted, pages, seen))
            rows.append((str(one["depth"]), name, *figures, f"{seen / max(pages, 1):.3f}"))
    return f"{model}, a step of one token\n\n{options.table(rows, left=2)}"


def _sizes(one: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    return ((name, sizes) for name, sizes in one.items() if name != "depth")


def main() -> None:
    """The program."""
    app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(touched)
    app.callback()(lambda: None)
    app(["touched", *sys.argv[1:]])


if __name__ == "__main__":
    main()
