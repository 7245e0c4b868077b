"""The block types that streams may have, as kernels write them; importing this declares them."""

from __future__ import annotations

from tensorgraph.backends.cpu.ir import I8, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.streams import CODED, Coded
from tensorgraph.ops.formats.rounding_cpu import nearest, times_reciprocal


def encode_q8_0(k: Kernel, values: Value) -> tuple[Value, Value]:
    """Signed codes, 127 for the largest magnitude."""
    scale = k.fold(k.unary("fabs", values), k.max) / 127.0
    return k.f32_to_half(scale), k.convert(k.convert(nearest(k, times_reciprocal(k, values, scale)), I32), I8)


CODED["q8_0"] = Coded(encode_q8_0)
