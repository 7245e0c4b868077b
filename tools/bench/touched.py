"""What a step of one token reads, as its plan counts it and as the system saw it: `python -m tensorgraph.tools.bench.touched`.

Linux marks the pages of memory that a process touches, 4 KiB each. What lies apart, as rows that are listed do, is touched in
whole pages; how many these should be follows from the rows.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tensorgraph.errors import InputError, UnsupportedError
from tensorgraph.models.text.model import TextSession, load
from tensorgraph.session import SessionSnapshot
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

    def stand_apart(self, apart: bool) -> None:
        """Have the system count its pages apart from those beside them, or no longer: by advice that changes nothing here."""
        libc = ctypes.CDLL(None, use_errno=True)
        advice = mmap.MADV_DONTDUMP if apart else mmap.MADV_DODUMP
        if libc.madvise(ctypes.c_void_p(self.start), ctypes.c_size_t(self.stop - self.start), advice):
            raise UnsupportedError(f"[touched] madvise: {os.strerror(ctypes.get_errno())}")


def referenced(memories: Sequence[Memory]) -> int:
    """Bytes of pages that were touched since `forget`, of parts that stand apart or are all of some mapping."""
    total = start = stop = 0
    for line in SMAPS.read_text().splitlines():
        match = _RANGE.match(line)
        if match is not None:
            start, stop = (int(text, 16) for text in match.groups())
        elif line.startswith("Referenced:") and any(memory.start < stop and start < memory.stop for memory in memories):
            total += int(line.split()[1]) * 1024
    return total


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
    ids = listed_rows(session)
    kinds = list(dict.fromkeys(map(kind, session._store.specs)))
    seen = {name: touched_by(session, before, name) for name in ("weights", *kinds)}
    before.release()
    weights, streams = read_bytes(session.plan, session.model.model, session.length, 1)
    counted: dict[str, float] = {"weights": weights}
    in_pages: dict[str, float] = {"weights": weights}
    for stream, size in streams.items():
        counted[kind(stream)] = counted.get(kind(stream), 0) + size
        listed = ids.get(stream)
        in_pages[kind(stream)] = in_pages.get(kind(stream), 0) + (size if listed is None else pages_of(session, stream, listed))
    return {
        name: {"counted": counted.get(name, 0), "in_pages": in_pages.get(name, 0), "touched": size} for name, size in seen.items()
    }


def touched_by(session: TextSession, before: SessionSnapshot, name: str) -> int:
    """Bytes of pages that a step touches of what `name` says: the weights, or the rows of a kind."""
    moved, seen = -1, 0
    while moved != session._store.moved:  # code is compiled, and memory there, after a step or two
        session.restore(before)
        session.eval([1])
        moved = session._store.moved
        session.restore(before)
        with memory_of(session, name) as memories:
            forget()
            session.eval([1])
            seen = referenced(memories)
    return seen


@contextmanager
def memory_of(session: TextSession, name: str) -> Iterator[list[Memory]]:
    """Where the weights lie, or rows of a kind, which stand apart as long as the block lasts."""
    if name == "weights":  # these have mappings of their own
        yield [Memory.of(held.data) for held in session.engine._uploaded.values()]
        return
    memories = [Memory.of(session._store.pages(stream)) for stream in session._store.specs if kind(stream) == name]
    try:
        for memory in memories:
            memory.stand_apart(True)
        yield memories
    finally:
        for memory in memories:
            memory.stand_apart(False)


def listed_rows(session: TextSession) -> dict[str, np.ndarray[Any, Any]]:
    """The rows that a step of one token lists, by stream."""
    names: dict[str, str] = {}
    for node in session.plan.graph:
        for slot, ids in zip(node.slots, node.inputs, strict=True) if node.op == "flash_attn" else ():
            if slot.startswith("ids") and ids.name:
                rows = (node.at(f"k{slot[3:]}"), node.at(f"v{slot[3:]}"))
                names |= {
                    str(x.base.attrs["stream"]): ids.name for x in rows if x is not None and x.base.op in ("append", "read")
                }
    values = session.eval([1], outputs=list(dict.fromkeys(names.values()))) if names else {}
    return {stream: np.asarray(values[name]).reshape(-1) for stream, name in names.items()}


def pages_of(session: TextSession, stream: str, ids: np.ndarray[Any, Any]) -> int:
    """Bytes of the pages of memory in which some rows lie, the pages of a stream being in order."""
    rows = session._store.pages(stream)
    row_bytes = rows.nbytes // (len(rows) * 16)
    first = rows.ctypes.data + ids[ids >= 0].astype(np.int64) * row_bytes
    return PAGE * len(np.unique(np.concatenate([first // PAGE, (first + row_bytes - 1) // PAGE])))


def kind(stream: str) -> str:
    return stream.rpartition(".")[2]


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
