"""Gated units: an activation of the gate times the other half, from one operand of 2n channels or from two of n."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Shape, divide_exact, shape_text
from tensorgraph.dtypes import DType
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, Slots
from tensorgraph.ops.cases import a_type, at_times_long, numbers
from tensorgraph.ops.elementwise.affine import clamp, scale
from tensorgraph.ops.elementwise.binary import mul
from tensorgraph.ops.elementwise.unary import gelu, gelu_erf, gelu_quick, relu, sigmoid, silu
from tensorgraph.source import source_line

Array = NDArray[Any]
Attrs = Mapping[str, Any]


def _glu(
    name: str,
    formula: Callable[..., Array],
    plain: Callable[..., Node],
    attrs: Mapping[str, Attr] | None = None,
    source: str = "arXiv:2002.05202",
) -> Op:
    op = Op(
        name,
        "a[..., D]: real, b[..., D]?: a -> y[..., D]: a",
        attrs={"swapped": Attr(bool, False), **(attrs or {})},
        source=source,
    )

    @op.shape
    def halved(slots: Slots, given: Attrs) -> tuple[Shape, DType]:
        assert op.signature is not None
        shape, dtype = op.signature.infer(name, slots, given)
        if "b" in slots:
            return shape, dtype
        half = divide_exact(shape[-1], 2)
        if half is None:
            raise ShapeError(f"[{name}] a must be [..., 2 * n] without b; got {shape_text(shape)} ({source_line()})")
        return (*shape[:-1], half), dtype

    @op.reference
    def reference(a: Array, b: Array | None, *, swapped: bool, **given: float) -> Array:
        first, second = (a, b) if b is not None else np.split(a, 2, axis=-1)
        gate, up = (second, first) if swapped else (first, second)
        return formula(gate, up, **given)

    @op.expand
    def expansion(a: Node, b: Node | None, *, swapped: bool, **given: float) -> Node:
        n = a.shape[-1] // 2
        first, second = (a, b) if b is not None else (a[..., :n], a[..., n:])
        gate, up = (second, first) if swapped else (first, second)
        return plain(gate, up, **given)

    @op.law
    def nothing_passes_a_gate_of_zero(run: Callable[..., Array], a: Array, b: Array | None, **given: Any) -> None:
        zeros = (np.zeros_like(a), b) if b is None or not given["swapped"] else (a, np.zeros_like(b))
        np.testing.assert_array_equal(run(*zeros, **given), 0)

    @op.cases
    def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
        from hypothesis import strategies as st

        n, split = draw(st.sampled_from((0, 1, 3, 8, 33))), draw(st.booleans())
        *rows, n = at_times_long(draw, (*draw(st.sampled_from(((), (0,), (1,), (2, 3)))), n))
        types = [a_type(draw)]
        slots = {slot: numbers(draw, (*rows, n if split else 2 * n), types, size=3.0) for slot in ("a", "b")[: 1 + split]}
        return slots, {"swapped": draw(st.booleans())} | {key: draw(st.floats(0.5, 2)) for key in attrs or {}}

    return op


def _activated(name: str, activation: Op) -> Op:
    def formula(gate: Array, up: Array) -> Array:
        assert activation.reference_fn is not None
        result: Array = activation.reference_fn(gate) * up
        return result

    return _glu(name, formula, lambda gate, up: mul(activation(gate), up))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


reglu = _activated("reglu", relu)
geglu = _activated("geglu", gelu)
swiglu = _activated("swiglu", silu)
geglu_erf = _activated("geglu_erf", gelu_erf)
geglu_quick = _activated("geglu_quick", gelu_quick)


def _oai(gate: Array, up: Array, *, alpha: float, limit: float) -> Array:
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * _sigmoid(alpha * gate) * (up + 1.0)


def _oai_plain(gate: Node, up: Node, *, alpha: float, limit: float) -> Node:
    gate, up = clamp(gate, min=-math.inf, max=limit), clamp(up, min=-limit, max=limit)
    return mul(mul(gate, sigmoid(scale(gate, scale=alpha))), scale(up, scale=1.0, bias=1.0))


def _clamped(gate: Array, up: Array, *, limit: float) -> Array:
    gate = np.minimum(gate, limit)
    up = np.clip(up, -limit, limit)
    return gate * _sigmoid(gate) * up


def _clamped_plain(gate: Node, up: Node, *, limit: float) -> Node:
    return mul(silu(clamp(gate, min=-math.inf, max=limit)), clamp(up, min=-limit, max=limit))


_limit = Attr(float, 7.0, low=0.0)
swiglu_oai = _glu("swiglu_oai", _oai, _oai_plain, {"alpha": Attr(float, 1.702), "limit": _limit}, "ggml_swiglu_oai")
"""The gate has no lower clamp: `g * sigmoid(alpha * g) * (u + 1)` with g = min(a, limit), u = b within +-limit."""
swiglu_clamp = _glu("swiglu_clamp", _clamped, _clamped_plain, {"limit": _limit}, "ggml_swiglu_clamp")
"""`silu(min(a, limit)) * b` with b within +-limit: DeepSeek V4's experts."""
