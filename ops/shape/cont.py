"""A dense copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.op import Op

cont = Op("cont", "x[...]: any -> y[...]: x", source="ggml_cont")
"""The elements of a view, one after another in memory."""


@cont.reference
def reference(x: NDArray[Any]) -> NDArray[Any]:
    return np.array(x, order="C")


@cont.flops
def none(node: Node) -> Extent:
    return 0


@cont.law
def same_elements(run: Any, x: NDArray[Any]) -> None:
    np.testing.assert_array_equal(run(x), x)
