"""What outlives a step: named streams of rows, as models declare them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from tensorgraph import registry
from tensorgraph.dtypes import DType
from tensorgraph.errors import DTypeError, StateError

Layout = Literal["rows", "rows16", "panels"]
MAX_LENGTH = 2**31 - 1  # positions are i32


@dataclass(frozen=True)
class StreamClass:
    """Streams with the same `every` and `keep`: they share page tables and vectors of rows.

    A sequence of n tokens has `n // every` rows. Readers at position p look at the last `keep` of the
    `(p + 1) // every` rows that are complete once token p is in, or at all of them where `keep` is None.
    """

    every: int
    keep: int | None

    @cached_property
    def name(self) -> str:
        """A short name for dims and inputs: "1", "4", "1w128"."""
        return str(self.every) if self.keep is None else f"{self.every}w{self.keep}"

    def n_rows(self, length: int) -> int:
        """Rows that `length` tokens have completed."""
        return length // self.every

    def first_read(self, length: int) -> int:
        """The lowest row that the next token after `length` tokens, or any later one, looks at."""
        return 0 if self.keep is None else max(0, (length + 1) // self.every - self.keep)

    def earliest(self, first_row: int) -> int:
        """The smallest length that can be gone on from when rows below `first_row` are gone."""
        return (first_row + self.keep) * self.every - 1 if first_row and self.keep is not None else 0


@dataclass(frozen=True)
class StateSpec:
    """A named stream of rows that outlives a step.

    Args:
        row_shape: shape of one row.
        dtype: type of the stored rows; None is the session's KV type.
        every: a row is completed by every `every`-th token.
        keep: how many rows back, the newest included, its readers look; None is all of them.
    Raises: StateError, DTypeError.
    """

    row_shape: tuple[int, ...]
    dtype: DType | None = None
    every: int = 1
    keep: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.row_shape, tuple) or any(n < 1 for n in self.row_shape):
            raise StateError(f"[state] wanted row_shape as a tuple of extents >= 1; got {self.row_shape!r}")
        if self.every < 1:
            raise StateError(f"[state] wanted every >= 1 tokens per row; got {self.every}")
        if self.keep is not None and self.keep < 1:
            raise StateError(f"[state] wanted keep >= 1 rows, or None for all; got {self.keep}")
        if self.dtype is not None:
            self.stored_dtype(self.dtype)

    @property
    def stream_class(self) -> StreamClass:
        return StreamClass(self.every, self.keep)

    def stored_dtype(self, kv_dtype: DType) -> DType:
        """The type its rows are stored in, when the session's KV type is `kv_dtype`."""
        dtype, width = self.dtype or kv_dtype, self.row_shape[-1] if self.row_shape else 1
        if dtype.kind != "float" and dtype.name not in registry.encoders:
            raise DTypeError(f"[state] wanted f16, bf16, f32 or q8_0 for a stream; got {dtype}")
        if width % dtype.block_size:
            raise DTypeError(f"[state] wanted rows of a multiple of {dtype.block_size} for {dtype}; got {list(self.row_shape)}")
        return dtype

    def held_row(self, kv_dtype: DType) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and NumPy type of a row as it is held: of a block type, its bytes."""
        dtype = self.stored_dtype(kv_dtype)
        if dtype.numpy is not None:
            return self.row_shape, dtype.numpy
        return (*self.row_shape[:-1], dtype.size_bytes(self.row_shape[-1])), np.dtype(np.uint8)

    def row_bytes(self, kv_dtype: DType) -> int:
        """Bytes of one stored row."""
        return self.stored_dtype(kv_dtype).size_bytes(math.prod(self.row_shape))

    def key(self, kv_dtype: DType) -> str:
        """All that a plan or a file depends on, as text: "8x128:f16:1w128"."""
        return f"{'x'.join(map(str, self.row_shape))}:{self.stored_dtype(kv_dtype)}:{self.stream_class.name}"
