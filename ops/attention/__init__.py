"""Attention: over segments of rows, and what selects, masks and pools those rows."""

from __future__ import annotations

from tensorgraph.ops.attention.attn_mask import attn_mask
from tensorgraph.ops.attention.block_pool import block_pool
from tensorgraph.ops.attention.flash_attn import Segment, flash_attn
from tensorgraph.ops.attention.index_top_k import index_top_k

__all__ = ["Segment", "attn_mask", "block_pool", "flash_attn", "index_top_k"]
