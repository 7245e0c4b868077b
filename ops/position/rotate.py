"""Rotary position embedding in two steps: the cosines and sines of a step's positions, and the turning by them.

Every layer turns by the same angles, so that a device which runs these two computes the angles once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph.dims import Extent, Shape, shape_text
from tensorgraph.dtypes import DType, f32
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op
from tensorgraph.ops.cases import indices, numbers
from tensorgraph.ops.position.rope import ANGLE_ATTRS, check_angles, cos_sin, rope, turn
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]
Slots = Mapping[str, Node]

rope_table = Op(
    "rope_table",
    "pos[T]: int, freq_factors[F]?: f32 -> y[T, F, 2]: f32",
    attrs={"n_dims": Attr(int, low=0), **ANGLE_ATTRS},
    source="arXiv:2104.09864 eq. 34; YaRN arXiv:2309.00071 section 3.2",
)
"""cos and sin of the angles by which `rope` turns n_dims channels, times its magnitude; of `-sin` where it is inverse.

Shapes: pos [T], freq_factors [n_dims / 2] -> [T, n_dims / 2, 2].
Dtypes: angles in f64 -> f32.
"""


@rope_table.shape
def table_shape(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    assert rope_table.signature is not None
    n_dims, pos = attrs["n_dims"], slots["pos"]
    if n_dims % 2:
        raise ShapeError(f"[rope_table] wanted an even number of channels; got {n_dims} ({source_line()})")
    rope_table.signature.infer("rope_table", slots, {**attrs, "F": n_dims // 2})
    check_angles("rope_table", n_dims, slots.get("freq_factors"), attrs)
    return (pos.shape[0], n_dims // 2, 2), f32


@rope_table.reference
def table_reference(pos: Array, freq_factors: Array | None, **attrs: Any) -> Array:
    return np.stack(cos_sin(pos, freq_factors, **attrs), -1)


@rope_table.flops
def table_flops(node: Node) -> Extent:
    return node.size * 2


@rope_table.law
def length_is_the_magnitude(run: Callable[..., Array], pos: Array, freq_factors: Array | None, **attrs: Any) -> None:
    """Every angle has a cos and a sin, and to turn by it changes lengths by the magnitude alone."""
    y = run(pos, freq_factors, **attrs).astype(np.float64)
    np.testing.assert_allclose(np.hypot(y[..., 0], y[..., 1]), np.full(y.shape[:-1], abs(attrs["magnitude"])), rtol=2**-22)


@rope_table.law
def inverse_is_the_conjugate(run: Callable[..., Array], pos: Array, freq_factors: Array | None, **attrs: Any) -> None:
    """The inverse turns as far the other way."""
    back = run(pos, freq_factors, **{**attrs, "inverse": not attrs["inverse"]})
    np.testing.assert_array_equal(back, run(pos, freq_factors, **attrs) * np.array([1, -1], np.float32))


@rope_table.cases
def table_cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_dims, n_tokens = draw(st.sampled_from((0, 2, 6, 16, 64))), draw(st.integers(0, 5))
    slots = {"pos": indices(draw, 0, draw(st.sampled_from((1, 50, 1 << 20))), (n_tokens,))}
    if draw(st.booleans()):
        slots["freq_factors"] = rng.uniform(0.5, 8, n_dims // 2).astype(np.float32)
    attrs: dict[str, Any] = {"n_dims": n_dims, "base": draw(st.sampled_from((1e4, 5e5))), "inverse": draw(st.booleans())}
    if draw(st.booleans()):
        attrs |= {"freq_scale": 1 / 16, "ext_factor": draw(st.sampled_from((0.0, 0.5, 1.0))), "original_context": 4096}
        attrs["magnitude"] = draw(st.sampled_from((1.0, 1.25)))
    return slots, attrs


rotate = Op(
    "rotate",
    "x[T, *R, D]: real, table[T, P, 2]: f32 -> y[T, *R, D]: x",
    attrs={
        "layout": Attr(str, "interleaved", choices=("interleaved", "half_split")),
        "offset": Attr(int, 0, low=0),
        "n_dims": Attr(int, low=0),
    },
    inplace={"y": "x"},
    source="arXiv:2104.09864 eq. 34",
)
"""Turns the pairs of the channels `offset .. offset + n_dims` by the angles of a table, and copies the others.

`(a, b) -> (a cos - b sin, a sin + b cos)`, for pairs as `rope` describes them.

Shapes: x [T, ..., D], table [T, n_dims / 2, 2] -> x's.
Dtypes: x real; products in f32, in f64 where x is.
"""


@rotate.shape
def rotate_shape(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    assert rotate.signature is not None
    found = rotate.signature.infer("rotate", slots, attrs)
    n_dims, end, pairs, width = attrs["n_dims"], attrs["offset"] + attrs["n_dims"], slots["table"].shape[1], found[0][-1]
    if n_dims % 2 or not isinstance(width, int) or end > width:
        wanted = f"an even number of channels within {shape_text(found[0])}"
        raise ShapeError(f"[rotate] wanted {wanted}; got {n_dims} from channel {attrs['offset']} ({source_line()})")
    if pairs != n_dims // 2:
        got = shape_text(slots["table"].shape)
        raise ShapeError(f"[rotate] table must be [T, {n_dims // 2}, 2]; got {got} ({source_line()})")
    return found


@rotate.reference
def rotate_reference(x: Array, table: Array, **attrs: Any) -> Array:
    return turn(x, table[..., 0], table[..., 1], **attrs)


@rotate.flops
def rotate_flops(node: Node) -> Extent:
    return node.size * 3


@rotate.law
def conjugate_restores(run: Callable[..., Array], x: Array, table: Array, **attrs: Any) -> None:
    """To turn by the conjugate as well is to multiply pairs by their angle's squared length; other channels stay."""
    table = table / np.maximum(np.hypot(table[..., :1], table[..., 1:]), 2**-20)
    table[np.hypot(table[..., 0], table[..., 1]) < 0.5] = 1, 0  # no angle
    y = run(x, table, **attrs)
    back = run(y, table * np.array([1, -1], table.dtype), **attrs)
    unit = {"float16": 2**-7, "bfloat16": 2**-5}.get(x.dtype.name, 2**-19)
    top = np.abs(np.float64(x)).max(initial=0.0)
    np.testing.assert_allclose(np.float64(back), np.float64(x), rtol=0, atol=unit * top)
    rest = np.delete(np.arange(x.shape[-1]), slice(attrs["offset"], attrs["offset"] + attrs["n_dims"]))
    np.testing.assert_array_equal(y[..., rest], x[..., rest])


@rotate.cases
def rotate_cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_dims, before, after = draw(st.sampled_from((0, 2, 6, 16, 64))), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    rows, n_tokens = draw(st.sampled_from(((), (1,), (3,), (2, 5)))), draw(st.integers(0, 5))
    x = numbers(draw, (n_tokens, *rows, before + n_dims + after))
    angle = rng.uniform(-4, 4, (n_tokens, n_dims // 2))
    table = np.stack([np.cos(angle), np.sin(angle)], -1) * draw(st.sampled_from((1.0, 1.25)))
    layout = draw(st.sampled_from(("interleaved", "half_split")))
    return {"x": x, "table": table.astype(np.float32)}, {"offset": before, "n_dims": n_dims, "layout": layout}


@rope.expand
def expand(slots: Slots, *, n_dims: int, layout: str, offset: int, **angles: Any) -> Node:
    width = slots["x"].shape[-1]
    assert isinstance(width, int)
    n_dims = n_dims or width - offset
    table = rope_table(slots["pos"], slots.get("freq_factors"), n_dims=n_dims, **angles)
    return rotate(slots["x"], table, layout=layout, offset=offset, n_dims=n_dims)


@rope_table.typical
def table_typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({"pos": np.arange(131072, dtype=np.int32)}, {"n_dims": 128, "base": 5e5})]


@rotate.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    slots = {"x": np.zeros((2048, 32, 128), np.float32), "table": np.zeros((2048, 64, 2), np.float32)}
    return [(slots, {"layout": "half_split", "n_dims": 128})]
