"""A norm as Triton's users write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit  # type: ignore[untyped-decorator]
def _norm(x, y, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * width + at, mask=at < width, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    tl.store(y + row * width + at, values * scale, mask=at < width)


def norms(torch: Any, rows: int, width: int, instances: int) -> list[Callable[[], Any]]:
    """A call for each instance, over an input of its own."""

    def one() -> Callable[[], Any]:
        x = torch.randn(rows, width, device="cuda")
        y = torch.empty_like(x)
        return lambda: _norm[(rows,)](x, y, width, 1e-6, BLOCK=triton.next_power_of_2(width))

    return [one() for _ in range(instances)]
