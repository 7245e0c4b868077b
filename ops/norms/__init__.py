"""Normalisations and soft-max."""

from __future__ import annotations

from tensorgraph.ops.norms.norms import norm, rms_norm
from tensorgraph.ops.norms.soft_max import soft_max

__all__ = ["norm", "rms_norm", "soft_max"]
