"""Choosing the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.errors import InputError

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. In this order:

    1. repetition penalty: the logit of each token among the last `repetition_window` ones is divided by
       `repetition_penalty` where it is positive and multiplied by it otherwise, once, however often the token is there;
    2. temperature: 0 takes the token of the highest logit (the lowest id of equals) and ends here, otherwise logits are
       divided by it;
    3. top-k: the `top_k` most likely tokens stay (0: all), the lower id first of equals;
    4. top-p: of those, the fewest most likely ones stay whose probabilities reach `top_p` in sum;
    5. min-p: of those, the ones stay that are at least `min_p` times as likely as the most likely one;
    6. one of the rest is drawn with its probability, renormalised.

    Source: repetition penalty: arXiv:1909.05858, with the sign rule of its published code; top-p: arXiv:1904.09751;
    min-p: arXiv:2407.01082.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises: InputError.
        """
        for name, value, fits, wanted in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "a finite number above 0",
            ),
            ("repetition_window", self.repetition_window, self.repetition_window >= 0, "0 (no tokens) or more"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "none, 0 or more"),
        ):
            if not fits:
                raise InputError(f"[sampling] wanted {name}: {wanted}; got {value}")

    def rng(self) -> np.random.Generator | None:
        """A new random generator: the same draws for the same seed, other ones each time without a seed.

        None at temperature 0, where nothing is drawn: NumPy's generators take a while to import.
        """
        return np.random.default_rng(self.seed) if self.temperature else None

    def sample(self, logits: np.ndarray[Any, Any], recent: Sequence[int], rng: np.random.Generator | None) -> int:
        """The id of the next token.

        `recent` are the tokens so far, the latest last; `rng` is what `rng()` gave.

        Shapes: logits [V].
        Raises: InputError where logits hold NaN or +inf, nothing but -inf, or no vector; or an id is not below V.
        """
        if self.temperature == 0:
            return int(np.argmax(self._penalised(logits, recent)))
        assert rng is not None
        ids, probabilities = self.distribution(logits, recent)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])

    def distribution(self, logits: np.ndarray[Any, Any], recent: Sequence[int]) -> tuple[Ids, Floats]:
        """The tokens that may come next, most likely first, and their probabilities.

        Shapes: logits [V] -> ids [n], probabilities [n] with sum 1.
        Raises: InputError as `sample` does.
        """
        scores = self._penalised(logits, recent)
        if self.temperature == 0:
            return np.array([np.argmax(scores)], np.int64), np.ones(1)
        with np.errstate(over="ignore"):
            weights = np.exp((scores - scores.max()) / self.temperature)  # [V], the largest is 1
        top_k = self.top_k if self.top_k < len(weights) else 0
        candidates = self._candidates(weights, top_k)
        ids = candidates[np.argsort(-weights[candidates], kind="stable")]
        if top_k:
            ids = ids[:top_k]
        kept = weights[ids]
        if self.top_p < 1:
            total = kept.sum() if top_k else weights.sum()
            kept = kept[: int(np.searchsorted(np.cumsum(kept), self.top_p * total)) + 1]
        kept = kept[kept >= self.min_p * kept[0]]
        return ids[: len(kept)], kept / kept.sum()

    def _candidates(self, weights: Floats, top_k: int) -> Ids:
        """Ids, ascending, of a superset of the tokens that stay: sorting all of a large vocabulary takes longest."""
        n_tokens = len(weights)
        if top_k:
            lowest = np.partition(weights, n_tokens - top_k)[n_tokens - top_k]
        elif self.top_p < 1:
            # All tokens below this together have half of what top-p may leave out, so none of them is needed.
            lowest = weights.sum() * (1 - self.top_p) / (2 * n_tokens)
        else:
            lowest = self.min_p
        return np.flatnonzero((weights >= lowest) & (weights > 0))

    def _penalised(self, logits: np.ndarray[Any, Any], recent: Sequence[int]) -> Floats:
        """Checked logits after the repetition penalty, as f64."""
        scores = np.array(logits, np.float64)
        if scores.ndim != 1 or not scores.size:
            raise InputError(f"[sampling] wanted logits [V]; got {list(scores.shape)}")
        highest = scores.max()
        if not np.isfinite(highest):
            found = "NaN" if np.isnan(highest) else "+inf" if highest > 0 else "-inf for every token"
            raise InputError(f"[sampling] wanted finite logits (-inf for tokens that are ruled out); got {found}")
        if self.repetition_penalty != 1 and self.repetition_window:
            seen = np.unique(np.asarray(recent[-self.repetition_window :], np.int64))
            if seen.size and not 0 <= seen[0] <= seen[-1] < scores.size:
                wrong = seen[0] if seen[0] < 0 else seen[-1]
                raise InputError(f"[sampling] wanted recent token ids below {scores.size}; got {wrong}")
            some = scores[seen]
            scores[seen] = np.where(some > 0, some / self.repetition_penalty, some * self.repetition_penalty)
        return scores
