"""Small kernels for tests: sources from a parameter list and a body, and launches on the processor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cuda.host_compiler import LIMIT_S, HostCompiler


def source(params: str, body: str, name: str = "k") -> str:
    """A kernel, and the function beside it that takes its parameters from an array."""
    types = [each.rsplit(" ", 1)[0] for each in params.split(", ")]
    args = ", ".join(f"({type_})args[{index}]" for index, type_ in enumerate(types))
    return (
        f'extern "C" __global__ void {name}({params}) {{\n{body}\n}}\n'
        f'extern "C" void {name}__host(const long long* args) {{ {name}({args}); }}\n'
    )


def run(
    compiler: HostCompiler,
    params: str,
    body: str,
    *args: NDArray[np.generic] | int,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared_bytes: int = 0,
    schedule: int = 0,
    seconds: int = LIMIT_S,
) -> None:
    """Build a kernel of these parameters and run it; line 2 of its source is the first of the body."""
    address = compiler.load({"k": source(params, body)})["k"]
    packed = [each if isinstance(each, int) else each.ctypes.data for each in args]
    compiler.launch(address, packed, grid, block, shared_bytes, schedule, seconds)
