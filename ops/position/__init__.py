"""Positions: rotary embeddings in every variant that a model of this project has."""

from __future__ import annotations

from tensorgraph.ops.position.rope import llama3_freq_factors, rope, yarn_freq_factors
from tensorgraph.ops.position.rotate import rope_table, rotate

__all__ = ["llama3_freq_factors", "rope", "rope_table", "rotate", "yarn_freq_factors"]
