"""Whether a program runs faster on all threads or on the calling one alone, found out by trying."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorgraph.backends.cpu import native_loop as loop

TRIAL = 6  # runs of a try; the first does not count, since its threads may have to wake
FEW = 3  # runs of one that is given up early
SHORTEST, LONGEST = 32, 256  # runs between two tries
MARGIN = 0.97  # the other way must take less than this part of the time to be taken up
WORSE = 1.3  # a way so much slower is given up early, and one that became so is put to the test
_NEVER = 1 << 62
_ALONE, _LEFT, _LIMIT, _COUNT, _LAST = (offset // 8 for offset in (loop.ALONE, loop.LEFT, loop.LIMIT, loop.COUNT, loop.LAST))


@dataclass
class _Size:
    """Programs of about one size: whether the other way is being tried, ticks of the one before, runs between two tries."""

    trying: bool = False
    before: int = 0
    interval: int = SHORTEST


class ThreadChoice:
    """Chooses how programs run; sizes apart by a factor of two are separate.

    Every so often the other way is tried for a few runs, half as often each time that the answer is the same; soon, where the
    machine seems to have become busier. The native loop counts runs and keeps their ticks; it asks for a `look` when something
    may have to change.

    Attributes:
        lines: what it reads and writes, i64 [65, 16]: a line for each number of bits of a program's weight.
    """

    def __init__(self) -> None:
        self.lines = np.zeros((65, loop.LINE_BYTES // 8), np.int64)
        self.lines[:, _LEFT], self.lines[:, _LIMIT] = SHORTEST, _NEVER
        self._sizes: dict[int, _Size] = {}

    def look(self, bits: int) -> None:
        """Begin a try of programs whose weight has so many bits, or end one that has lasted long enough."""
        line, size = self.lines[bits], self._sizes.setdefault(bits, _Size())
        count = int(line[_COUNT])
        ticks = [int(line[_LAST + i % loop.KEPT]) for i in range(max(0, count - loop.KEPT), count)][-TRIAL:]
        if size.trying:
            self._judge(line, size, ticks[1:])
        elif line[_LEFT] <= 0 or (count >= SHORTEST and _middle(ticks) > line[_LIMIT]):
            size.trying, size.before = True, _middle(ticks)
            line[_ALONE] = 1 - line[_ALONE]
            self._for(line, FEW, _NEVER)

    def _judge(self, line: np.ndarray, size: _Size, tried: list[int]) -> None:
        hopeless = min(tried) > WORSE * size.before
        if not hopeless and len(tried) < TRIAL - 1:
            line[_LEFT] = 1
            return
        other = _middle(tried)
        changes = other < MARGIN * size.before
        if not changes:
            line[_ALONE] = 1 - line[_ALONE]
        size.trying, size.interval = False, SHORTEST if changes else min(2 * size.interval, LONGEST)
        self._for(line, size.interval, int(WORSE * min(size.before, other)))

    @staticmethod
    def _for(line: np.ndarray, runs: int, limit: int) -> None:
        line[_LEFT], line[_LIMIT], line[_COUNT] = runs, limit, 0


def _middle(ticks: list[int]) -> int:
    """The median, the larger of two: `statistics`, which has it, imports fractions and decimals."""
    return sorted(ticks)[len(ticks) // 2]
