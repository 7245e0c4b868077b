"""Whether a program runs faster on all threads or on the calling one alone, found out by trying."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

TRIAL = 6  # runs of a try; the first does not count, since its threads may have to wake
SHORTEST, LONGEST = 32, 256  # runs between two tries
MARGIN = 0.97  # the other way must take less than this part of the time to be taken up
WORSE = 1.3  # a way so much slower is given up early, and one that became so is put to the test


@dataclass
class _Size:
    """Programs of about one size: how they run now, and what is known."""

    alone: bool = False
    trying: bool = False
    interval: int = SHORTEST
    left: int = SHORTEST  # runs until the next try
    limit: float = inf  # ticks of a run that seems slow, by the last try
    times: list[int] = field(default_factory=list)  # since then, as it runs now
    tried: list[int] = field(default_factory=list)  # in this try


class ThreadChoice:
    """Chooses how programs run; sizes apart by a factor of two are separate.

    Every so often the other way is tried for a few runs, half as often each time that the answer is the same; soon, where the
    machine seems to have become busier.

    Attributes:
        alone_sizes: bit i is set where programs of a weight of i bits are to run on the calling thread alone.
    """

    def __init__(self) -> None:
        self.alone_sizes = 0
        self._sizes: dict[int, _Size] = {}

    def note(self, weight: int, ticks: int) -> int:
        """A run, as chosen, of that much work took so long; gives `alone_sizes`, which may have changed."""
        bit = 1 << weight.bit_length()
        size = self._sizes.setdefault(bit, _Size())
        if size.trying:
            size.tried.append(ticks)
            self._judge(size)
        else:
            size.times.append(ticks)
            size.left -= 1
            if size.left == 0 or (ticks > size.limit and self._became_slow(size)):
                size.trying, size.tried = True, []
        self.alone_sizes = self.alone_sizes | bit if size.alone != size.trying else self.alone_sizes & ~bit
        return self.alone_sizes

    @staticmethod
    def _became_slow(size: _Size) -> bool:
        return len(size.times) >= SHORTEST and _middle(size.times[-TRIAL:]) > size.limit

    @staticmethod
    def _judge(size: _Size) -> None:
        """End a try that has lasted long enough."""
        now, tried = _middle(size.times[-TRIAL:]), size.tried[1:]
        hopeless = len(tried) >= 2 and min(tried) > WORSE * now
        if not hopeless and len(size.tried) < TRIAL:
            return
        other = _middle(tried)
        changes = other < MARGIN * now
        size.alone, size.trying = size.alone != changes, False
        size.interval = SHORTEST if changes else min(2 * size.interval, LONGEST)
        size.left, size.limit, size.times = size.interval, WORSE * min(now, other), []


def _middle(ticks: list[int]) -> int:
    """The median, the larger of two: `statistics`, which has it, imports fractions and decimals."""
    return sorted(ticks)[len(ticks) // 2]
