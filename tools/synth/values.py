"""Random contents of tensors, piece by piece."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

from tensorgraph.models.text.gguf_writer import NewTensor
from tensorgraph.ops.formats import random_blocks

PIECE_BYTES = 8 << 20
SMALL = 0.1
"""The deviation of norms' weights from 1, and of other vectors from 0."""


def deviation(tensor: NewTensor) -> float:
    """Of a tensor's values: a product with a matrix keeps the size of what it is given."""
    vector = len(tensor.shape) == 1 or tensor.name.endswith(".bias")
    return SMALL if vector else 1.0 / math.sqrt(tensor.shape[-1])


def contents(tensor: NewTensor, seed: int, n_experts: int) -> Iterator[memoryview]:
    """A tensor's bytes; they depend on its name and the seed.

    A tensor of more than `PIECE_BYTES` repeats a drawn piece. Its number of blocks has no divisor in common with that of a
    row, so that as many rows as it has blocks are different ones.

    Args:
        n_experts: integers, which are experts by token, are below it, and those of a row are different ones.
    """
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    if tensor.dtype.kind == "int":
        yield _experts(tensor, n_experts, rng)
        return
    if len(tensor.shape) == 1:
        middle = 1.0 if "norm" in tensor.name and tensor.name.endswith(".weight") else 0.0
        vector = rng.standard_normal(tensor.shape[0], np.float32) * np.float32(SMALL) + np.float32(middle)
        yield vector.astype(tensor.dtype.numpy).data
        return
    block_bytes, in_row = tensor.dtype.block_bytes, tensor.shape[-1] // tensor.dtype.block_size
    n = math.prod(tensor.shape[:-1]) * in_row
    drawn = min(n, PIECE_BYTES // block_bytes)
    while drawn < n and math.gcd(drawn, in_row) > 1:
        drawn -= 1
    piece = _drawn(tensor, drawn, rng)
    for start in range(0, n, drawn):
        yield piece[: min(drawn, n - start) * block_bytes]


def _drawn(tensor: NewTensor, n: int, rng: np.random.Generator) -> memoryview:
    """Bytes of n blocks, or elements."""
    if tensor.dtype.is_block:
        blocks = random_blocks(tensor.dtype, n, deviation(tensor), rng)
        return blocks.reshape(-1).data
    values = rng.standard_normal(n, np.float32) * np.float32(deviation(tensor))
    return values.astype(tensor.dtype.numpy).view(np.uint8).data


def _experts(tensor: NewTensor, n_experts: int, rng: np.random.Generator) -> memoryview:
    first = rng.integers(0, n_experts, (*tensor.shape[:-1], 1))
    ids = (first + np.arange(tensor.shape[-1])) % n_experts
    return ids.astype(tensor.dtype.numpy).reshape(-1).view(np.uint8).data
