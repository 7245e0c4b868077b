"""Whether a program runs faster on all threads or on the calling one alone, found out by trying."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tensorgraph.backends.cpu import native_loop as loop

TRIAL, LONG_TRIAL = 6, 9  # runs of a try, and of one that is close; the first does not count: its threads may have to wake
FEW = 3  # runs of one that is given up early, and that make a way seem to have become slower
SHORTEST, LONGEST_S = 16, 4.0  # at least so many runs between two tries, and no more than make so many seconds
LOSS = 0.02  # the part of the time that goes into tries that change nothing; half of it after one
MARGIN, CLOSE = 0.97, 0.1  # the other way must take less than this part of the time; so near to it, more runs are made
WORSE = 1.3  # a way so much slower is given up early; a run so much slower than usual is looked at
SLOWER = 1.2  # a way that became so much slower is put to the test
RISE = 0.5  # so many more idle processors than before make all threads be tried; twice as many after a try in vain
LOOK_S, LOOK_COSTS_S = 0.1, 5e-5  # between two looks at how it goes, and what one takes
FOLLOWS = 0.25  # the part by which what is usual follows what is now
_NEVER = 1 << 62
_ALONE, _LEFT, _LIMIT, _COUNT, _LAST = (offset // 8 for offset in (loop.ALONE, loop.LEFT, loop.LIMIT, loop.COUNT, loop.LAST))
Reading = tuple[float, float]
"""A moment, and how long the machine's processors had been idle until then, in seconds."""


def idle_reading() -> Reading | None:
    """Now; None where the system does not say."""
    try:
        with open("/proc/uptime", "rb", 0) as stream:
            return time.perf_counter(), float(stream.read(64).split()[1])
    except (OSError, ValueError, IndexError):
        return None


@dataclass
class _Size:
    """Programs of about one size.

    Attributes:
        trying: why the other way is being tried, or ""; `before`, ticks of a run before.
        usual: ticks of a run of late; `suspect`: runs were slower, but some of them may be from before they became so.
        due: runs until the next try, as of the last look, which allowed `given`; `same`: the last try has changed nothing.
        reading: the last one on one thread; `idle`: processors that were so, at the fewest since the last try that more of them
            led to; a `rise` by so many leads to the next.
    """

    trying: str = ""
    before: float = 0.0
    usual: float = 0.0
    suspect: bool = False
    due: int = SHORTEST
    given: int = SHORTEST
    same: bool = False
    reading: Reading | None = None
    idle: float | None = None
    rise: float = RISE


class ThreadChoice:
    """Chooses how programs run; sizes apart by a factor of two are separate.

    Every so often the other way is tried for a few runs, so seldom that it costs little; and at once where runs have become
    slower, as they do on all threads beside a busy process, or where processors have become idle while one thread runs. The
    native loop counts runs and keeps their ticks; it asks for a `look` when it was told to, or a run was slow.

    Args:
        ticks_per_s: of the loop's clock, about.

    Attributes:
        lines: what it reads and writes, i64 [65, 16]: a line for each number of bits of a program's weight.
    """

    def __init__(self, ticks_per_s: float, idle: Callable[[], Reading | None] = idle_reading) -> None:
        self.lines = np.zeros((65, loop.LINE_BYTES // 8), np.int64)
        self.lines[:, _LEFT], self.lines[:, _LIMIT] = SHORTEST, _NEVER
        self._ticks_per_s, self._idle = ticks_per_s, idle
        self._sizes: dict[int, _Size] = {}

    def look(self, bits: int) -> None:
        """See how programs whose weight has so many bits go; begin a try of the other way, or end one that was long enough."""
        line, size = self.lines[bits], self._sizes.setdefault(bits, _Size())
        count = int(line[_COUNT])
        ticks = [int(line[_LAST + i % loop.KEPT]) for i in range(max(0, count - loop.KEPT), count)]
        if size.trying:
            self._judge(line, size, ticks[1:] if count <= loop.KEPT else ticks)
            return
        now = _typical(ticks)
        size.due -= size.given - int(line[_LEFT])
        why = self._why_try(line, size, now)
        if why == "slower" and not size.suspect:
            size.suspect, size.given = True, TRIAL
            line[_LEFT], line[_LIMIT], line[_COUNT] = TRIAL, _NEVER, 0
            return
        size.suspect = False
        if why:
            size.trying, size.before = why, size.usual if why == "due" and size.usual else now
            line[_ALONE] = 1 - line[_ALONE]
            line[_LEFT], line[_LIMIT], line[_COUNT] = FEW, _NEVER, 0
            return
        if line[_LEFT] <= 0:  # else a slow run asked for the look
            size.usual += FOLLOWS * (now - size.usual) if size.usual else now
        self._go_on(line, size)

    def _why_try(self, line: np.ndarray, size: _Size, now: float) -> str:
        has_room = bool(line[_ALONE]) and self._has_room(size)
        if line[_COUNT] >= FEW and size.usual and now > SLOWER * size.usual:
            return "slower"
        return "room" if has_room else "due" if size.due <= 0 else ""

    def _judge(self, line: np.ndarray, size: _Size, tried: list[int]) -> None:
        hopeless, other = min(tried) > WORSE * size.before, _typical(tried)
        close = abs(other - size.before) < CLOSE * size.before
        if not hopeless and len(tried) < (LONG_TRIAL if close else TRIAL) - 1:
            line[_LEFT] = 1
            return
        changes = other < MARGIN * size.before
        if changes:
            size.rise, size.idle = RISE, None
        else:
            line[_ALONE] = 1 - line[_ALONE]
            if size.trying == "room":
                size.rise, size.idle = 2 * size.rise, None
        size.trying, size.usual, size.reading = "", min(size.before, other), None
        lost = len(tried) * (max(size.before, other) - size.usual + LOOK_COSTS_S * self._ticks_per_s)
        between = min(lost / LOSS * (1 if changes or not size.same else 2), self._ticks_per_s * LONGEST_S)
        size.same, size.due = not changes, max(SHORTEST, int(between / max(size.usual, 1.0)))
        line[_COUNT] = 0
        self._go_on(line, size)

    def _go_on(self, line: np.ndarray, size: _Size) -> None:
        size.given = max(1, min(size.due, int(self._ticks_per_s * LOOK_S / max(size.usual, 1.0))))
        line[_LEFT], line[_LIMIT] = size.given, int(WORSE * size.usual)

    def _has_room(self, size: _Size) -> bool:
        """Whether processors have become idle since programs run on one thread."""
        before, now = size.reading, self._idle()
        if now is None or (before is not None and now[0] - before[0] < LOOK_S / 2):
            return False
        size.reading = now
        if before is None:
            return False
        idle = (now[1] - before[1]) / (now[0] - before[0])
        size.idle = idle if size.idle is None else min(size.idle, idle)
        return idle >= size.idle + size.rise


def _typical(ticks: list[int]) -> float:
    """The mean, in which none counts for more than three times their median."""
    most = 3 * sorted(ticks)[len(ticks) // 2]
    return sum(min(each, most) for each in ticks) / len(ticks)
