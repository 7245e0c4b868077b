"""How far next-token distributions are from others of the same tokens, in natural logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
_AT_ONCE = 1 << 21  # logits


def log_probabilities(logits: NDArray[Any]) -> F64:
    """The logarithms of the softmax of each row, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


@dataclass(frozen=True)
class Rows:
    """Of each of T positions: KL(exact || other), whether both have the same likeliest token, and how the text goes on.

    Attributes:
        kl: [T].
        same_first: [T], bool.
        following: [T], minus the other's log probability of the token that follows in the text; NaN where none does.
    """

    kl: F64
    same_first: NDArray[np.bool_]
    following: F64


def compare(exact: NDArray[Any], other: NDArray[Any], following: Sequence[int | None]) -> Rows:
    """Logits [T, V] of the same positions, some rows at a time."""
    step, found = max(1, _AT_ONCE // exact.shape[-1]), []
    for start in range(0, len(exact), step):
        p, q = (log_probabilities(logits[start : start + step]) for logits in (exact, other))
        weight = np.exp(p)
        with np.errstate(invalid="ignore"):  # what is impossible in both
            kl = np.where(weight > 0, weight * (p - q), 0).sum(axis=-1)
        at = following[start : start + step]
        nll = np.array([math.nan if token is None else -q[i, token] for i, token in enumerate(at)])
        found.append(Rows(kl, p.argmax(axis=-1) == q.argmax(axis=-1), nll))
    return join(found)


def join(parts: Sequence[Rows]) -> Rows:
    """The positions of all parts, one after another."""
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("kl", "same_first", "following")))


@dataclass(frozen=True)
class Summary:
    """`standard_error` is the mean's, as if positions were independent; `p99` is exceeded by one of a hundred."""

    mean: float
    standard_error: float
    median: float
    p99: float
    largest: float
    same_first: float
    perplexity: float

    @classmethod
    def of(cls, rows: Rows) -> Summary:
        kl = rows.kl
        median, p99 = np.quantile(kl, [0.5, 0.99])
        return cls(
            mean=float(kl.mean()),
            standard_error=float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else math.nan,
            median=float(median),
            p99=float(p99),
            largest=float(kl.max()),
            same_first=float(rows.same_first.mean()),
            perplexity=perplexity(rows),
        )

    def as_object(self) -> dict[str, float]:
        return asdict(self)


def perplexity(rows: Rows) -> float:
    """Of the text's tokens; NaN where none follows any."""
    known = rows.following[~np.isnan(rows.following)]
    return math.exp(known.mean()) if len(known) else math.nan
