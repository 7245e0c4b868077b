"""Normalisations and soft-max."""

from __future__ import annotations

from tensorgraph.ops.norms.group_norm import group_norm
from tensorgraph.ops.norms.norms import l1_norm, l2_norm, norm, rms_norm
from tensorgraph.ops.norms.soft_max import soft_max

__all__ = ["group_norm", "l1_norm", "l2_norm", "norm", "rms_norm", "soft_max"]
