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
OWN, MODELS = "tensorgraph.", "tensorgraph.models"
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

    Of the package's own files those of models count.
    """
    name, _, number = where.rpartition(":")
    files = []
    for module, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        builds = not module.startswith(OWN) or module.rpartition(".")[0] == MODELS
        if file and Path(file).name == name and builds and file not in files:
            files.append(file)
    return linecache.getline(files[0], int(number)).strip() if len(files) == 1 and number.isdigit() else ""
