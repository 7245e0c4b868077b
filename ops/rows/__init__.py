"""Rows and elements by number: read (get_rows, gather, add_id) and written (set_rows, scatter)."""

from __future__ import annotations

from tensorgraph.ops.rows.add_id import add_id
from tensorgraph.ops.rows.gather import gather, scatter
from tensorgraph.ops.rows.get_rows import get_rows
from tensorgraph.ops.rows.set_rows import set_rows

__all__ = ["add_id", "gather", "get_rows", "scatter", "set_rows"]
