"""f32, f16 and bf16 in layout r16: a unit is one element of each of 16 rows."""

from __future__ import annotations

from collections.abc import Callable

from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.ir import I64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import read_value, stored_type
from tensorgraph.backends.cpu.weights import FORMS, Interleaved
from tensorgraph.dtypes import as_dtype


def _declare(name: str) -> None:
    dtype = as_dtype(name)
    stored = stored_type(dtype)
    item = stored.size_bytes

    def write(k: Kernel, row: Callable[[Int], Value], n: Int, step: Int, to: Value) -> None:
        sources = [row(r) for r in range(ROWS)]
        with k.loop(0, n) as loop:
            loop.next()
            for r, source in enumerate(sources):
                k.store(k.load(source + loop.i * step, stored), to + loop.i * (ROWS * item) + r * item)

    def row_values(k: Kernel, unit: Value, row: Value, first: Value, lanes: int) -> Value:
        at = unit + row * item
        if item == 4:
            return k.gather(at, k.vector(range(0, lanes * ROWS * item, ROWS * item), I64), stored.x(lanes))
        out = Value(k, "poison", stored.x(lanes))
        for i in range(lanes):
            out = out.with_lane(i, k.load(at + i * (ROWS * item), stored))
        return read_value(k, out, dtype)

    FORMS[name] = Interleaved(1, ROWS * item, 1, item, write, row_values, dtype)


for _name in ("f32", "f16", "bf16"):
    _declare(_name)
