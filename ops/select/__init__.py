"""Selection: the largest elements of a row, the largest one, and its order."""

from __future__ import annotations

from tensorgraph.ops.select.argmax import argmax
from tensorgraph.ops.select.argsort import argsort
from tensorgraph.ops.select.top_k import top_k

__all__ = ["argmax", "argsort", "top_k"]
