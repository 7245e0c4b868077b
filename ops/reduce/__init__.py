"""Reductions."""

from __future__ import annotations

from tensorgraph.ops.reduce.sums import cumsum, mean, sum, sum_rows

__all__ = ["cumsum", "mean", "sum", "sum_rows"]
