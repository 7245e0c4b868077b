"""Numbers at equal distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Shape
from tensorgraph.dtypes import DType, f32
from tensorgraph.errors import AttributeValueError, DTypeError
from tensorgraph.op import Attr, Op, Slots
from tensorgraph.source import source_line

Array = NDArray[Any]

arange = Op(
    "arange",
    "-> y[N]: dtype",
    attrs={"start": Attr(float, 0.0), "stop": Attr(float), "step": Attr(float, 1.0), "dtype": Attr(DType, f32)},
    source="ggml_arange",
)
"""`start + step * i` for i below `(stop - start) / step`, computed in f64.

Shapes: -> [ceil((stop - start) / step)].
Dtypes: -> `dtype`, f32 where not given; integers toward zero.
Raises: AttributeValueError: step is 0, or one of these numbers or their quotient is not finite.
"""


@arange.shape
def as_many(slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    start, stop, step, dtype = (attrs[name] for name in ("start", "stop", "step", "dtype"))
    given = f"start {start}, stop {stop}, step {step} ({source_line()})"
    if step == 0 or not all(map(math.isfinite, (start, stop, step))):
        raise AttributeValueError(f"[arange] start, stop and step must be finite, and step not 0; got {given}")
    if not math.isfinite((stop - start) / step):
        raise AttributeValueError(f"[arange] (stop - start) / step must be finite; got {given}")
    if dtype.kind not in ("float", "int"):
        raise DTypeError(f"[arange] dtype must be a real or int type; got {dtype} ({source_line()})")
    return (_count(start, stop, step),), dtype


def _count(start: float, stop: float, step: float) -> int:
    return max(0, math.ceil((stop - start) / step))


@arange.reference
def reference(*, start: float, stop: float, step: float, dtype: DType) -> Array:
    y = start + step * np.arange(_count(start, stop, step))
    return y if dtype.is_float else y.astype(dtype.numpy)


@arange.law
def ends_before_the_stop(run: Callable[..., Array], *, start: float, stop: float, step: float, dtype: DType) -> None:
    y = run(start=start, stop=stop, step=step, dtype="f64")
    assert list(y[:1]) in ([], [start])
    assert np.all((y < stop) if step > 0 else (y > stop)) and len(y) == _count(start, stop, step)


@arange.cases
def cases(draw: Callable[[Any], Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    whole = draw(st.booleans())
    start = float(draw(st.integers(-20, 20) if whole else st.floats(-20, 20, width=16)))
    step = draw(st.sampled_from((1.0, 2.0, -1.0) if whole else (0.25, -0.5, 3.0, 0.828125)))
    stop = start + step * draw(st.sampled_from((-1.0, 0.0, 0.5, 1.0, 7.0, 33.0, 130.25)))
    return {}, {
        "start": start,
        "stop": stop,
        "step": step,
        "dtype": draw(st.sampled_from(("f32", "f16", "bf16", "f64", "i32", "i64", "i16", "i8", "u8"))),
    }


@arange.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    return [({}, {"start": 0.0, "stop": float(1 << 24), "step": 1.0, "dtype": f32})]
