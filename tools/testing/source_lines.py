"""Source lines within the files that models share, which a node's own line leaves out."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorgraph import source

BUILDER = "builder.py"
"""What model files call to build nodes: no line of it says more than theirs."""
OWN = "tensorgraph"
N_OWN = 2  # the core and the ops, which stay hidden


@contextmanager
def shared_files_shown() -> Iterator[None]:
    """Until the block ends, nodes that are built carry the line of the building block that made them."""
    hidden = list(source._hidden)
    source._hidden[N_OWN:] = [file for file in hidden[N_OWN:] if Path(file).name == BUILDER]
    source._is_internal.clear()
    try:
        yield
    finally:
        source._hidden[:] = hidden
        source._is_internal.clear()


def source_text(where: str) -> str:
    """The line that `file.py:31` means, of the only imported file of that name; empty where there is none, or several.

    Users' files come before the package's own.
    """
    name, _, number = where.rpartition(":")
    own = tuple(source._hidden[:N_OWN])  # no node's line is there
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for module, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        if file and Path(file).name == name and not file.startswith(own):
            found[module.partition(".")[0] == OWN].add(file)
    files = list(found[False] or found[True])
    return linecache.getline(files[0], int(number)).strip() if len(files) == 1 and number.isdigit() else ""
