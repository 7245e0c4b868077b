"""What is measured, and figures of several rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["pp", "tg"]


@dataclass(frozen=True)
class Case:
    """`pp`: so many tokens evaluated at once for the logits of the last; `tg`: one after another, each with its logits.

    `depth` tokens are there before.
    """

    kind: Kind
    tokens: int
    depth: int = 0

    @property
    def end(self) -> int:
        """Tokens of the sequence when it is done."""
        return self.depth + self.tokens

    def __str__(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


def cases(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """All combinations, those of one depth together; a count of 0 leaves a kind out."""
    lengths: list[tuple[Kind, int]] = [*(("pp", n) for n in prompts if n), *(("tg", n) for n in generated if n)]
    return [Case(kind, n, depth) for depth in dict.fromkeys(depths) for kind, n in dict.fromkeys(lengths)]


def median(values: Sequence[float]) -> float:
    import statistics  # which imports much for what the commands' help needs nothing of

    return float(statistics.median(values))


def deviation(values: Sequence[float]) -> float:
    """Median absolute deviation from the median."""
    middle = median(values)
    return median([abs(v - middle) for v in values])
