"""Which ops are measured, and with what: the shapes of decode steps and prompts of the models that there are targets for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Node, constant
from tensorgraph.ops.attention import Segment, flash_attn, index_top_k
from tensorgraph.ops.norms import rms_norm
from tensorgraph.ops.products import mul_mat, mul_mat_id
from tensorgraph.ops.select import top_k
from tensorgraph.tools.bench.cuda.drawn import without_data
from tensorgraph.tools.bench.cuda.peers import Work
from tensorgraph.tools.bench.cuda.scale import Scale

Array = np.ndarray[Any, Any]
TYPES = ("q4_k", "q6_k", "q8_0", "q4_0", "mxfp4", "iq2_xxs", "q2_k", "f16")


@dataclass
class Inputs:
    """Constants of one instance of an op: floats without data, and numbers that mean something."""

    n: int
    given: dict[str, Array] = field(default_factory=dict)

    def floats(self, slot: str, *shape: int, dtype: str = "f32") -> Node:
        name = f"{slot}{self.n}"
        self.given[name] = without_data(shape, as_dtype(dtype))
        return constant(name, shape=shape, dtype=dtype)

    def whole(self, slot: str, array: Array) -> Node:
        name = f"{slot}{self.n}"
        self.given[name] = np.ascontiguousarray(array, np.int32)
        return constant(name, shape=array.shape, dtype="i32")


Build = Callable[[Inputs, Scale], Node]


@dataclass(frozen=True)
class OpCase:
    """An op of some shape.

    Attributes:
        kind: of products, whose rate is the ceiling of its arithmetic.
        work: what others are measured with for it.
    """

    name: str
    build: Build
    kind: str = "f32"
    work: Callable[[Scale], Work] | None = None


def product(dtype: str, rows: int, i: Inputs, s: Scale) -> Node:
    return mul_mat(i.floats("w", s.of(14336), s.of(4096), dtype=dtype), i.floats("x", s.of(rows, 4), s.of(4096)))


def product_work(rows: int, s: Scale) -> Work:
    return Work("mm", (s.of(rows, 4), s.of(4096), s.of(14336)))


def experts(dtype: str, rows: int, i: Inputs, s: Scale) -> Node:
    n, used, rows = s.of(64, 4), s.of(8, 2), s.of(rows, 4)
    ids = np.random.default_rng(i.n).random((rows, n)).argsort(axis=1)[:, :used]
    return mul_mat_id(
        i.floats("w", n, s.of(2048), s.of(7168), dtype=dtype), i.floats("x", rows, 1, s.of(7168)), i.whole("ids", ids)
    )


def positions(i: Inputs, tokens: int, rows: int) -> dict[str, Node]:
    """Of the last tokens of a sequence that has so many rows."""
    at = {"pos": np.arange(rows - tokens, rows), "seq": np.zeros(tokens)}
    at |= {"row_pos": np.arange(rows), "row_seq": np.zeros(rows)}
    return {name: i.whole(name, numbers) for name, numbers in at.items()}


def attention(tokens: int, rows: int, heads: int, kv_heads: int, i: Inputs, s: Scale) -> Node:
    tokens, rows, width = s.of(tokens, 4), s.of(rows), 128
    at = positions(i, tokens, rows)
    k, v = (i.floats(slot, rows, kv_heads, width, dtype="f16") for slot in "kv")
    segment = Segment(k, v, pos=at["row_pos"], seq=at["row_seq"])
    return flash_attn(i.floats("q", tokens, heads, width), segment, scale=width**-0.5, pos=at["pos"], seq=at["seq"])


def attention_work(tokens: int, rows: int, heads: int, kv_heads: int, s: Scale) -> Work:
    return Work("sdpa", (s.of(tokens, 4), s.of(rows), heads, kv_heads, 128))


def latent(tokens: int, rows: int, listed: int, i: Inputs, s: Scale) -> Node:
    """MLA over rows of 576, of which 512 are the value: all of them, or those that are listed."""
    tokens, rows, heads = s.of(tokens, 4), s.of(rows), s.of(128, 16)
    at = positions(i, tokens, rows)
    ids = None
    if listed:
        rng = np.random.default_rng(i.n)
        ids = i.whole("ids", np.stack([np.sort(rng.permutation(rows)[: s.of(listed, 64)]) for _ in range(tokens)]))
    segment = Segment(i.floats("k", rows, 1, 576, dtype="f16"), pos=at["row_pos"], seq=at["row_seq"], ids=ids)
    q = i.floats("q", tokens, heads, 576)
    return flash_attn(q, segment, scale=192**-0.5, pos=at["pos"], seq=at["seq"], d_v=512)


def indexer(rows: int, i: Inputs, s: Scale) -> Node:
    rows, heads = s.of(rows), s.of(64, 16)
    at = positions(i, 1, rows)
    q, k, w = i.floats("q", 1, heads, 128), i.floats("k", rows, 128, dtype="f16"), i.floats("w", 1, heads)
    return index_top_k(q, k, w, at["pos"], at["seq"], at["row_pos"], at["row_seq"], top_k=s.of(2048, 64))


def selection(rows: int, width: int, k: int, i: Inputs, s: Scale) -> Node:
    return top_k(i.floats("x", s.of(rows, 4), s.of(width)), k=min(k, s.of(k, 64)))


def selection_work(rows: int, width: int, k: int, s: Scale) -> Work:
    return Work("topk", (s.of(rows, 4), s.of(width), min(k, s.of(k, 64))))


def norm(rows: int, i: Inputs, s: Scale) -> Node:
    return rms_norm(i.floats("x", s.of(rows, 4), s.of(4096)), eps=1e-6)


def norm_work(rows: int, s: Scale) -> Work:
    return Work("rms_norm", (s.of(rows, 4), s.of(4096)))


def cases() -> Iterator[OpCase]:
    """In order of importance."""
    for dtype in TYPES:
        kind = "f16" if dtype == "f16" else "dp4a"
        yield OpCase(f"mul_mat {dtype}, 1 row", partial(product, dtype, 1), kind, partial(product_work, 1))
    for name, rows in (("4k", 4096), ("32k", 32768)):
        work = partial(attention_work, 1, rows, 32, 8)
        yield OpCase(f"flash_attn of 1 token, {name}", partial(attention, 1, rows, 32, 8), "f16", work)
    yield OpCase("latent attention of 1 token, 4k", partial(latent, 1, 4096, 0), "f16")
    yield OpCase("latent attention of 1 token, 2,048 rows of 128k", partial(latent, 1, 131072, 2048), "f16")
    yield OpCase("index_top_k of 1 token, 2,048 of 128k", partial(indexer, 131072), "f16")
    for dtype in ("q4_k", "q2_k", "iq2_xxs"):
        yield OpCase(f"mul_mat_id {dtype}, 1 row, 8 of 64", partial(experts, dtype, 1), "dp4a")
    for dtype in TYPES:
        yield OpCase(f"mul_mat {dtype}, 512 rows", partial(product, dtype, 512), "f16", partial(product_work, 512))
    work = partial(attention_work, 512, 4096, 32, 8)
    yield OpCase("flash_attn of 512 tokens, 4k", partial(attention, 512, 4096, 32, 8), "f16", work)
    yield OpCase("top_k 512 of 131,072", partial(selection, 1, 131072, 512), "f32", partial(selection_work, 1, 131072, 512))
    yield OpCase("top_k 8 of 256, 512 rows", partial(selection, 512, 256, 8), "f32", partial(selection_work, 512, 256, 8))
    for rows in (1, 512):
        yield OpCase(f"rms_norm, {rows} rows".replace("1 rows", "1 row"), partial(norm, rows), "f32", partial(norm_work, rows))
    for dtype in TYPES:
        kind = "f16" if dtype == "f16" else "dp4a"
        yield OpCase(f"mul_mat {dtype}, 4 rows", partial(product, dtype, 4), kind, partial(product_work, 4))
    yield OpCase("mul_mat_id q4_k, 512 rows, 8 of 64", partial(experts, "q4_k", 512), "f16")
    yield OpCase("latent attention of 512 tokens, 4k", partial(latent, 512, 4096, 0), "f16")
