"""The formula of fill on the CPU: a number."""

from __future__ import annotations

import numpy as np

from tensorgraph.backends.cpu.elementwise import cpu_formula
from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import computed_type
from tensorgraph.dtypes import DType
from tensorgraph.ops.elementwise.fill import fill


@cpu_formula(fill)
def emit_fill(k: Kernel, *, value: float, dtype: DType) -> Value:
    with np.errstate(over="ignore"):
        rounded = np.asarray(value).astype(dtype.numpy)
    return k.const(float(rounded) if dtype.is_float else int(rounded), computed_type(dtype).x(k.lanes))
