"""Row numbers as the kernels of this family read them."""

from __future__ import annotations

from tensorgraph.backends.cpu.ir import I64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel


def checked(k: Kernel, op: str, number: Value, n: Int) -> tuple[Value, Value]:
    """A number as i64, and whether it names one of n entries; the run ends with an InputError where it is neither that nor -1."""
    number, n = k.convert(number, I64), k.i64(n)
    k.refuse((number + 1).below(n + 1).invert(), f"[{op}] ids must be below {{1}}, or -1 for none; got {{0}}", number, n)
    return number, number.below(n)
