"""Normalisations and soft-max."""

from __future__ import annotations

from tensorgraph.ops.norm.norms import norm, rms_norm
from tensorgraph.ops.norm.soft_max import soft_max

__all__ = ["norm", "rms_norm", "soft_max"]
