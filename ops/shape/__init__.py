"""Operators that move elements, leave some out, or put them in."""

from __future__ import annotations

from tensorgraph.ops.shape.concat import concat
from tensorgraph.ops.shape.cont import cont
from tensorgraph.ops.shape.diag import diag
from tensorgraph.ops.shape.pad import pad
from tensorgraph.ops.shape.repeat import repeat
from tensorgraph.ops.shape.roll import roll
from tensorgraph.ops.shape.triangle import diag_mask_inf, diag_mask_zero, tri
from tensorgraph.ops.shape.window import acc, set

__all__ = ["acc", "concat", "cont", "diag", "diag_mask_inf", "diag_mask_zero", "pad", "repeat", "roll", "set", "tri"]
