"""Where the console script begins: before anything else is imported."""

from __future__ import annotations

import gc

OBJECTS = 1_000_000
"""New objects between two searches for cycles: a vocabulary and a plan have 10^5 to 10^6 that stay, and a search visits all."""


def main() -> None:
    """The console script."""
    gc.set_threshold(OBJECTS)
    from tensorgraph.tools import cli

    cli.main()
