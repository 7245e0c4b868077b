"""Rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from tensorgraph.dims import Extent, Shape, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import AttributeValueError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Prepared
from tensorgraph.ops.cases import REALS, indices, numbers
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]

_BOUND = Signature.parse("x[T, *R, D]: real, pos[T]: int, freq_factors[F]?: f32 -> y[T, *R, D]: x")

ANGLE_ATTRS = {
    "base": Attr(float, 10000.0, low=1.0),
    "inverse": Attr(bool, False),
    "freq_scale": Attr(float, 1.0),
    "ext_factor": Attr(float, 0.0, low=0.0, high=1.0),
    "beta_fast": Attr(float, 32.0),
    "beta_slow": Attr(float, 1.0),
    "original_context": Attr(int, 0, low=0),
    "magnitude": Attr(float, 1.0),
}
"""What the angles depend on, beside the number of channels."""

rope = Op(
    "rope",
    attrs={
        "n_dims": Attr(int, 0, low=0),
        "base": ANGLE_ATTRS["base"],
        "layout": Attr(str, "interleaved", choices=("interleaved", "half_split")),
        "offset": Attr(int, 0, low=0),
        **ANGLE_ATTRS,
    },
    inplace={"y": "x"},
    source="arXiv:2104.09864 eq. 34; YaRN arXiv:2309.00071 section 3.2",
)
"""Rotates pairs of channels by an angle that grows with the position: `(a, b) -> (a cos - b sin, a sin + b cos)`.

The channels `offset .. offset + n_dims` are rotated (n_dims 0: all from `offset` on), the others copied. Pair i is
channels (2i, 2i + 1) for the interleaved layout, (i, i + n_dims / 2) for the half-split one, and turns by
`pos * base**(-2i / n_dims) / freq_factors[i]`, scaled by `freq_scale` and mixed by YaRN where `ext_factor` is not 0.
cos and sin are multiplied by `magnitude` and nothing else; `inverse` rotates back (-sin).

Shapes: x [T, ..., D], pos [T], freq_factors [n_dims / 2] -> x's.
Dtypes: x real; angles in f64, products in f32, in f64 where x is.

Its expansion, into `rope_table` and `rotate`, is for devices that have these two. No pattern is made of it: lengths and
attributes that are drawn apart from each other do not fit, so there is no signature for samples to be made of.
"""


@rope.prepare
def prepare(x: Node, pos: Node, freq_factors: Node | None = None, **attrs: Any) -> Prepared:
    return {"x": x, "pos": pos, "freq_factors": freq_factors}, attrs


@rope.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    found = _BOUND.infer("rope", slots, attrs)
    width, n_dims, offset = slots["x"].shape[-1], attrs["n_dims"], attrs["offset"]
    if len(slots["x"].shape) < 2 or not isinstance(width, int):
        got = shape_text(slots["x"].shape)
        raise ShapeError(f"[rope] x must be [T, ..., D], D a number; got {got} ({source_line()})")
    n_dims = n_dims or width - offset
    if n_dims % 2 or n_dims < 0 or offset + n_dims > width:
        wanted = f"an even number of channels within {width}"
        raise ShapeError(f"[rope] wanted {wanted}; got {n_dims} from channel {offset} ({source_line()})")
    check_angles("rope", n_dims, slots.get("freq_factors"), attrs)
    return found


def check_angles(op: str, n_dims: int, factors: Node | None, attrs: Mapping[str, Any]) -> None:
    """Check what the angles of n_dims channels are computed from.

    Raises: ShapeError, AttributeValueError.
    """
    if factors is not None and factors.shape[0] != n_dims // 2:
        got = shape_text(factors.shape)
        raise ShapeError(f"[{op}] freq_factors must be [{n_dims // 2}]; got {got} ({source_line()})")
    if attrs["ext_factor"] != 0 and (attrs["original_context"] == 0 or attrs["base"] == 1):
        wanted = "original_context and a base above 1 where ext_factor is not 0"
        given = f"{attrs['original_context']} and {attrs['base']}"
        raise AttributeValueError(f"[{op}] wanted {wanted}; got {given} ({source_line()})")


@rope.reference
def reference(slots: Mapping[str, Array], *, n_dims: int, layout: str, offset: int, **angles: Any) -> Array:
    x = slots["x"]
    n_dims = n_dims or x.shape[-1] - offset
    cos, sin = cos_sin(slots["pos"], slots.get("freq_factors"), n_dims=n_dims, **angles)
    return turn(x, cos, sin, n_dims=n_dims, layout=layout, offset=offset)


def turn(x: Array, cos: Array, sin: Array, *, n_dims: int, layout: str, offset: int) -> Array:
    """x [T, ..., D] with its pairs of channels turned by the angles of cos and sin [T, n_dims / 2]."""
    cos, sin = (c.reshape(len(x), *(1,) * (x.ndim - 2), n_dims // 2) for c in (cos, sin))
    half, end = n_dims // 2, offset + n_dims
    if layout == "interleaved":
        first, second = slice(offset, end, 2), slice(offset + 1, end, 2)
    else:
        first, second = slice(offset, offset + half), slice(offset + half, end)
    a, b = x[..., first], x[..., second]
    y = np.array(x)
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y


def cos_sin(
    pos: Array,
    freq_factors: Array | None,
    *,
    n_dims: int,
    base: float,
    inverse: bool,
    freq_scale: float,
    ext_factor: float,
    beta_fast: float,
    beta_slow: float,
    original_context: int,
    magnitude: float,
) -> tuple[Array, Array]:
    """cos and sin [T, n_dims / 2] of each position's angles, by which x is turned."""
    per_position = turn_per_position(n_dims, base, freq_scale, ext_factor, beta_fast, beta_slow, original_context)
    if freq_factors is not None:
        per_position = per_position / freq_factors
    angle = pos[:, None] * per_position
    cos, sin = np.cos(angle), np.sin(angle)
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    return cos, -sin if inverse else sin


@lru_cache(maxsize=64)
def turn_per_position(
    n_dims: int, base: float, scale: float, ext_factor: float, fast: float, slow: float, original: int
) -> Array:
    """Angle of each pair at position 1, without freq_factors."""
    i = np.arange(n_dims // 2)
    frequency: Array = base ** (-2.0 * i / max(n_dims, 1))
    if ext_factor == 0:
        return frequency * scale

    def pair_turning(turns: float) -> float:
        return _pair_turning(turns, n_dims, base, original)

    low, high = math.floor(pair_turning(fast)), math.ceil(pair_turning(slow))
    extrapolated = _unstretched(n_dims, low, high) * ext_factor
    return frequency * (scale * (1 - extrapolated) + extrapolated)


def _unstretched(n_dims: int, low: float, high: float) -> Array:
    """How far each pair keeps its own angle: 1 up to pair `low`, 0 from `high` on."""
    low, high = max(0, low), min(n_dims - 1, high)
    stretched: Array = np.clip((np.arange(n_dims // 2) - low) / max(0.001, high - low), 0, 1)
    return 1 - stretched


def _pair_turning(turns: float, n_dims: int, base: float, original: int) -> float:
    """Which pair makes so many turns within the original context."""
    return n_dims * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))


def yarn_freq_factors(n_dims: int, base: float, factor: float, fast: float, slow: float, original: int) -> Array:
    """Divisors of the angles by which YaRN stretches a context where its ramp is not rounded to whole pairs.

    Shapes: -> f32 [n_dims / 2], for `rope`'s freq_factors.
    Source: gpt-oss's published configuration, rope_type "yarn" with truncate false.
    """
    own = _unstretched(n_dims, *(_pair_turning(turns, n_dims, base, original) for turns in (fast, slow)))
    return (1 / ((1 - own) / factor + own)).astype(np.float32)


def llama3_freq_factors(
    n_dims: int, base: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> Array:
    """Divisors of the angles by which Llama 3.1 stretches its context: 1 for short waves, `factor` for long ones.

    Shapes: -> f32 [n_dims / 2], for `rope`'s freq_factors.
    Source: Llama 3.1's published configuration, rope_type "llama3".
    """
    wavelength = 2 * math.pi * base ** (2.0 * np.arange(n_dims // 2) / n_dims)
    waves = original_context / wavelength  # how many waves the original context holds
    unstretched = np.clip((waves - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return (1 / ((1 - unstretched) / factor + unstretched)).astype(np.float32)


@rope.flops
def flops(node: Node) -> Extent:
    return node.size * 3


@rope.law
def inverse_restores(run: Callable[..., Array], slots: Mapping[str, Array], **attrs: Any) -> None:
    """Rotating back restores x where the magnitude is 1."""
    attrs["magnitude"], x = 1.0, slots["x"]
    y = run(slots, **attrs)
    back = run({**slots, "x": y}, **{**attrs, "inverse": not attrs["inverse"]})
    unit = {"float16": 2**-7, "bfloat16": 2**-5}.get(x.dtype.name, 2**-19)
    top = np.abs(np.float64(x)).max(initial=0.0)
    np.testing.assert_allclose(np.float64(back), np.float64(x), rtol=0, atol=unit * top)


@rope.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_dims, before, after = draw(st.sampled_from((2, 6, 16, 64))), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    rows = draw(st.sampled_from(((), (1,), (3,), (2, 5))))
    n_tokens = draw(st.integers(0, 5))
    types = tuple(t for t in REALS if t is not np.float64)  # the table of its expansion is f32
    x = numbers(draw, (n_tokens, *rows, before + n_dims + after), types)
    slots = {"x": x, "pos": indices(draw, 0, draw(st.sampled_from((1, 50, 4000))), (n_tokens,))}
    if draw(st.booleans()):
        slots["freq_factors"] = rng.uniform(0.5, 8, n_dims // 2).astype(np.float32)
    attrs: dict[str, Any] = {"n_dims": n_dims, "offset": before, "base": draw(st.sampled_from((1e4, 5e5)))}
    attrs["layout"] = draw(st.sampled_from(("interleaved", "half_split")))
    attrs["inverse"] = draw(st.booleans())
    if draw(st.booleans()):
        attrs |= {"freq_scale": 1 / 16, "ext_factor": draw(st.sampled_from((0.0, 0.5, 1.0))), "original_context": 4096}
        attrs["magnitude"] = draw(st.sampled_from((1.0, 1.25)))
    return slots, attrs


@rope.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    x = np.zeros((2048, 32, 128), np.float32)
    return [({"x": x, "pos": np.arange(len(x), dtype=np.int32)}, {"n_dims": 128, "base": 5e5, "layout": "half_split"})]
