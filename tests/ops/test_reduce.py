"""Sums against exact ones (`math.fsum`)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tensorgraph import ops
from tensorgraph.compiler import run_op
from tensorgraph.errors import ShapeError
from tensorgraph.graph import Node, input
from tensorgraph.op import Op


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 17), (2, 3, 130), (4, 0), (0, 4)])
def test_sums(shape: tuple[int, ...], dtype: type) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) + 1).astype(dtype)
    rows = x.reshape(int(np.prod(shape[:-1])), shape[-1]).tolist()
    want = np.array([math.fsum(row) for row in rows]).reshape(*shape[:-1], 1)
    np.testing.assert_array_equal(run_op("sum_rows", x), want.astype(dtype))
    np.testing.assert_array_equal(run_op("sum", x), np.array([math.fsum(sum(rows, []))], dtype))
    prefixes = np.array([[math.fsum(row[: i + 1]) for i in range(len(row))] for row in rows]).reshape(shape)
    np.testing.assert_allclose(run_op("cumsum", x), prefixes.astype(dtype), rtol=1e-7)
    if shape[-1]:
        np.testing.assert_array_equal(run_op("mean", x), (want / shape[-1]).astype(dtype))


def test_mean_of_nothing_is_not_a_number() -> None:
    assert np.isnan(run_op("mean", np.zeros((2, 0), np.float32))).all()


def test_sums_are_wide() -> None:
    """What the type cannot hold on the way is not lost."""
    x = np.array([[65504.0, 65504.0, -65504.0, -65504.0, 1.0]], np.float16)
    assert run_op("sum_rows", x).tolist() == [[1.0]]
    assert run_op("sum", np.array([1e8, 1.0, -1e8], np.float32)).tolist() == [1.0]


@pytest.mark.parametrize(("op", "shape"), [(ops.sum, (1,)), (ops.sum_rows, (2, 1)), (ops.mean, (2, 1)), (ops.cumsum, (2, 8))])
def test_shapes_and_work(op: Op, shape: tuple[int, ...]) -> None:
    node: Node = op(input("x", [2, 8]))
    assert node.shape == shape
    assert op.cost(node, {}).flops == 16


def test_a_number_has_no_rows() -> None:
    with pytest.raises(ShapeError, match=r"\[sum_rows\] x must be"):
        ops.sum_rows(input("x", []))
