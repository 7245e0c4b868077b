"""The weight formats: each one's block layout, how it is decoded, and how it is encoded where that is a rounding."""

from tensorgraph.formats import FORMATS
from tensorgraph.ops.formats import affine, few_bits, super_blocks, tabled

__all__ = ["FORMATS", "affine", "few_bits", "super_blocks", "tabled"]
