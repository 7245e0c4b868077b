"""The weight formats: each one's block layout, how it is decoded, and how it is encoded where that is a rounding."""

from tensorgraph.ops.formats import affine, few_bits, gridded, super_blocks, tabled
from tensorgraph.ops.formats.blocks import FORMATS, BlockFormat, block_format
from tensorgraph.ops.formats.blocks import decode_rows as decode
from tensorgraph.ops.formats.blocks import encode_rows as encode
from tensorgraph.ops.formats.drawn import random_blocks

__all__ = [
    "FORMATS",
    "BlockFormat",
    "affine",
    "block_format",
    "decode",
    "encode",
    "few_bits",
    "gridded",
    "random_blocks",
    "super_blocks",
    "tabled",
]
