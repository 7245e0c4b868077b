"""How large what is measured is: as on a card, or small where a processor stands for one."""

from __future__ import annotations

from dataclasses import dataclass

from tensorgraph.backends.cuda.device import CudaDevice


@dataclass(frozen=True)
class Scale:
    """Sizes, and how often things are done.

    Attributes:
        buffer_bytes: that are read and copied, many times more than caches hold.
        turns: of loops of products.
        nodes: kernels in a graph of nothing else.
        instances_bytes: of all instances of an op together, many times more than caches hold.
        instances: of an op in one graph, at least and at most.
        round_s: that a round takes, about.
        divisor: by which extents are smaller than on a card.
    """

    full: bool
    buffer_bytes: int
    turns: int
    nodes: int
    instances_bytes: int
    instances: tuple[int, int]
    round_s: float
    divisor: int

    def of(self, n: int, least: int = 256) -> int:
        """An extent, as it is here."""
        return max(n // self.divisor, min(n, least))

    def times(self, seconds: float) -> int:
        """How often something is done in a round."""
        return min(max(int(self.round_s / max(seconds, 1e-9)), 1), 1000)


def scale_of(device: CudaDevice) -> Scale:
    """That of a card, or the small one."""
    if not device.name.startswith("cuda-host"):
        free = device.free_bytes() or 1 << 32
        return Scale(True, min(1 << 32, free // 4) // 4096 * 4096, 1 << 14, 256, 400 << 20, (4, 16), 0.02, 1)
    return Scale(False, 1 << 16, 2, 4, 0, (2, 2), 0.0, 64)
