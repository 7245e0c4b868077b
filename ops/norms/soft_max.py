"""Soft-max over the last axis, with an additive mask, ALiBi slopes and attention sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent, Shape, divide_exact, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Slots
from tensorgraph.ops.cases import THOUSANDS, at_times_long, numbers
from tensorgraph.source import source_line

Array = NDArray[Any]

soft_max = Op(
    "soft_max",
    "x[..., N]: real, mask[*M, N]?: real, sinks[H]?: real -> y[..., N]: x",
    attrs={"scale": Attr(float, 1.0), "max_bias": Attr(float, 0.0, low=0.0)},
    inplace={"y": "x"},
    source="ggml_soft_max_ext",
)
"""Of `scale * x + slope(head) * mask` over the last axis; a row with nothing left (all -inf) gives zeros.

`max_bias` > 0 gives head h of H the slope of ALiBi, else every slope is 1.

Shapes: x [..., H, R, N]; mask [..., R or more, N], its leading axes tiled to x's; sinks [H], one further logit of each
head that takes its share and is not written.
"""


def _heads(shape: tuple[Any, ...]) -> Any:
    return shape[-3] if len(shape) > 2 else 1


@soft_max.shape
def like_x(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    assert soft_max.signature is not None
    shape, dtype = soft_max.signature.infer("soft_max", slots, attrs)
    mask, sinks = slots.get("mask"), slots.get("sinks")
    if mask is not None and not _fits(mask.shape, shape):
        wanted = f"[..., {', '.join(map(str, shape[-2:]))}], more rows or tiles allowed, for x {shape_text(shape)}"
        raise ShapeError(f"[soft_max] mask must be {wanted}; got {shape_text(mask.shape)} ({source_line()})")
    if sinks is not None and sinks.shape != (_heads(shape),):
        wanted = f"[{_heads(shape)}], one for each head of x {shape_text(shape)}"
        raise ShapeError(f"[soft_max] sinks must be {wanted}; got {shape_text(sinks.shape)} ({source_line()})")
    return shape, dtype


def _fits(mask: Shape, x: Shape) -> bool:
    if len(mask) > len(x):
        return False
    rows: Extent = mask[-2] if len(mask) > 1 else 1
    wanted: Extent = x[-2] if len(x) > 1 else 1
    more = isinstance(rows, int) and isinstance(wanted, int) and rows >= wanted
    tiles = zip(reversed(x[:-2]), reversed(mask[:-2]), strict=False)
    return (rows == wanted or more) and all(n == m or (m != 0 and divide_exact(n, m) is not None) for n, m in tiles)


def alibi_slopes(n_head: int, max_bias: float) -> Array:
    """The slope of each head; powers of a ratio, and of its root for heads beyond the last power of two."""
    if max_bias <= 0 or n_head == 0:
        return np.ones(n_head)
    low = 2 ** int(np.floor(np.log2(n_head)))
    h = np.arange(n_head)
    exponent = np.where(h < low, (h + 1) / low, (2 * (h - low) + 1) / (2 * low))
    slopes: Array = np.exp2(-max_bias * exponent)
    return slopes


@soft_max.reference
def reference(x: Array, mask: Array | None, sinks: Array | None, *, scale: float, max_bias: float) -> Array:
    z = np.ascontiguousarray(x) * scale  # dense, so that the order of summation is the logical one
    if mask is not None:
        z = z + _tiled(mask, z.shape) * alibi_slopes(_heads(z.shape), max_bias).reshape(_column(z))
    logits = None if sinks is None else sinks.reshape(_column(z))
    peak = np.max(z, axis=-1, keepdims=True, initial=-np.inf)
    peak = peak if logits is None else np.maximum(peak, logits)
    peak = np.where(peak == -np.inf, 0.0, peak)
    y = np.exp(z - peak)
    total = np.sum(y, axis=-1, keepdims=True)
    total = total if logits is None else total + np.exp(logits - peak)
    return y / np.where(total == 0, 1.0, total)


def _column(z: Array) -> tuple[int, ...]:
    """Shape in which one number a head meets z."""
    return (_heads(z.shape), 1, 1) if z.ndim > 2 else (1,) * z.ndim


def _tiled(mask: Array, shape: tuple[int, ...]) -> Array:
    if mask.ndim > 1:
        mask = mask[..., : shape[-2], :]
    lead = shape[len(shape) - mask.ndim : -2]
    times = [n // m if m else 1 for n, m in zip(lead, mask.shape, strict=False)]
    return np.tile(mask, [*times, *(1,) * min(mask.ndim, 2)])


@soft_max.flops
def five_an_element(node: Node) -> Extent:
    return 5 * node.size


@soft_max.cases
def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as arrays

    shape = at_times_long(draw, draw(st.lists(st.sampled_from((0, 1, 2, 3, 7, 33)), min_size=1, max_size=4)))
    attrs = {"scale": draw(st.sampled_from((1.0, 0.125, 2.0))), "max_bias": draw(st.sampled_from((0.0, 8.0)))}
    plain = max(shape) in THOUSANDS or draw(st.booleans())
    values = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-9, 9, width=16)
    slots = {"x": numbers(draw, shape) if plain else draw(arrays.arrays(np.float32, shape, elements=values))}
    if len(shape) > 1 and draw(st.booleans()):
        lead = [draw(st.sampled_from((1, n))) for n in shape[:-2]][draw(st.integers(0, len(shape) - 2)) :]
        masked = st.just(-np.inf) | st.floats(-9, 9, width=16)
        extra = draw(st.integers(0, 2))
        covering = (*lead, shape[-2] + extra, shape[-1])
        slots["mask"] = numbers(draw, covering) if plain else draw(arrays.arrays(np.float16, covering, elements=masked))
    if draw(st.booleans()):
        slots["sinks"] = numbers(draw, (_heads(shape),))
    return slots, attrs


@soft_max.law
def parts_of_one(run: Callable[..., Array], x: Array, mask: Array | None, sinks: Array | None, **attrs: float) -> None:
    y = run(x, mask, sinks, **attrs)
    assert np.all(y >= 0)
    total = np.sum(y, axis=-1, dtype=np.float64)
    unit = {"float16": 2**-10, "bfloat16": 2**-8}.get(y.dtype.name, 1e-5)
    assert np.all(total <= 1 + unit)
    if sinks is None:
        assert np.all((np.abs(total - 1) < unit) | (total == 0))


@soft_max.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    """Scores of 16 heads with a mask of 512 tokens and 2048 rows."""
    x, mask = np.zeros((16, 512, 2048), np.float32), np.zeros((512, 2048), np.float32)
    return [({"x": x, "mask": mask, "sinks": np.zeros(16, np.float32)}, {"scale": 0.125})]
