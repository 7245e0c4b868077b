"""What holds for every registered op: inferred shape and dtype, strides that do not matter, inputs left alone, its laws."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.tools.conformance.draw import is_finite
from tensorgraph.tools.conformance.watched import one_nan
from tests.ops.evaluate import evaluate, node_of, runner
from tests.ops.strategies import VIEWS, draw_case, view_of

OPS = list(registry.ops)
EXTREME = 30.0  # decades: squares beyond f32 too, which the reference computes in f64
few = settings(deadline=None, max_examples=25)


@pytest.mark.parametrize("name", OPS)
@few
@given(data=st.data())
def test_inferred_shape_and_strides(name: str, data: st.DataObject) -> None:
    op = registry.ops.get(name)
    slots, attrs = draw_case(op, data.draw, EXTREME)
    views = {slot: view_of(x, data.draw(st.sampled_from(VIEWS)), data.draw) for slot, x in slots.items()}
    before = {slot: np.array(x, order="C") for slot, x in views.items()}
    node = node_of(op, views, attrs)
    from_views = evaluate(node, views)
    for slot, x in views.items():
        assert np.array(x, order="C").tobytes() == before[slot].tobytes(), f"{name} changed its input {slot}"
    assert from_views.shape == node.shape
    stored = np.dtype(np.float32) if node.dtype.is_block else node.dtype.numpy
    assert from_views.dtype == stored
    assert one_nan(evaluate(node, before)).tobytes() == one_nan(from_views).tobytes(), f"{name} depends on its inputs' strides"


@pytest.mark.parametrize("name", [name for name in OPS if registry.ops.get(name).laws])
@few
@given(data=st.data())
def test_laws(name: str, data: st.DataObject) -> None:
    op = registry.ops.get(name)
    slots, attrs = draw_case(op, data.draw, EXTREME)
    assume(is_finite(slots))  # what laws are stated for
    for law in op.laws:
        law(runner(op), *op.arguments(slots), **op.check_attrs(attrs))


@pytest.mark.parametrize("name", [name for name in OPS if registry.ops.get(name).expansion])
@few
@given(data=st.data())
def test_expansion_is_the_op(name: str, data: st.DataObject) -> None:
    op = registry.ops.get(name)
    slots, attrs = draw_case(op, data.draw, EXTREME)
    node = node_of(op, slots, attrs)
    expanded = op.rebuild(op.expansion, node)
    assert (expanded.shape, expanded.dtype) == (node.shape, node.dtype)
    want, got = evaluate(node, slots), evaluate(expanded, slots)
    if not node.dtype.is_float:
        np.testing.assert_array_equal(got, want)
        return
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    error, size = (np.sum(np.square(x[finite].astype(np.float64))) for x in (got.astype(np.float64) - want, want))
    info = ml_dtypes.finfo(node.dtype.numpy)  # type: ignore[no-untyped-call]
    unit, least = float(info.eps), float(info.smallest_subnormal)
    # What is rounded on the way, to the least of all numbers too, is rounded again by the next op.
    assert error <= (16 * unit) ** 2 * size + (16 * least) ** 2 * want.size
