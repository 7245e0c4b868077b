"""Rows and elements by number: read (get_rows, gather) and written (set_rows, scatter)."""

from __future__ import annotations

from tensorgraph.ops.rows.gather import gather, scatter
from tensorgraph.ops.rows.get_rows import get_rows
from tensorgraph.ops.rows.set_rows import set_rows

__all__ = ["gather", "get_rows", "scatter", "set_rows"]
