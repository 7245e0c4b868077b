"""Operators that move elements and change none."""

from __future__ import annotations

from tensorgraph.ops.shape.concat import concat
from tensorgraph.ops.shape.cont import cont
from tensorgraph.ops.shape.pad import pad
from tensorgraph.ops.shape.repeat import repeat

__all__ = ["concat", "cont", "pad", "repeat"]
