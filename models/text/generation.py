"""Generating text: one token after another, with Ctrl-C only between steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import numpy as np

from tensorgraph.errors import InputError
from tensorgraph.models.text.sampling import Sampler
from tensorgraph.models.text.tokenizer import Detokenizer, Tokenizer

Ended = Literal["end", "stop", "length", "context"]


class TokenSession(Protocol):
    """What a generation needs of a session."""

    context: int
    step_tokens: int

    @property
    def length(self) -> int: ...

    @property
    def ids(self) -> list[int]: ...

    def eval(self, ids: Sequence[int]) -> np.ndarray: ...


class Generation(Iterator[str]):
    """A running generation: iterating over it gives the text as it comes.

    A token is evaluated once its text has been taken, so a session that is generated to the end holds all of it.

    Attributes:
        ids: the tokens generated so far, the one that ended it among them.
        ended: None while it runs, then why it ended: a token that ends a turn, a stop text, `max_tokens`, a full context.
        prompt_tokens, prompt_s: tokens of the prompt that were evaluated, and seconds for that.
        first_text_s: seconds to the first token.
        decode_s: seconds for the tokens after the first.
    """

    def __init__(
        self,
        session: TokenSession,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        max_tokens: int | None,
        sampler: Sampler,
        stop: Sequence[str] = (),
    ) -> None:
        if max_tokens is not None and max_tokens < 0:
            raise InputError(f"[generate] wanted max_tokens >= 0; got {max_tokens}")
        if not all(stop):
            raise InputError("[generate] wanted stop texts of at least one character; got an empty one")
        self._session, self._tokenizer, self._sampler = session, tokenizer, sampler
        self._max_tokens, self._stop = max_tokens, tuple(stop)
        self.ids: list[int] = []
        self.ended: Ended | None = None
        self.prompt_tokens, self.prompt_s = len(prompt), 0.0
        self.first_text_s = self.decode_s = 0.0
        self._text = self._run(prompt)

    def __next__(self) -> str:
        return next(self._text)

    def __iter__(self) -> Generation:
        return self

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, without the first, which the prompt gives."""
        return (len(self.ids) - 1) / self.decode_s if self.decode_s else 0.0

    def _run(self, prompt: Sequence[int]) -> Iterator[str]:
        pieces = Detokenizer(self._tokenizer, skip_special=True)
        held = HeldText(self._stop)
        for token in self._tokens(prompt):
            text = held.add(pieces.add(token))
            if text:
                yield text
            if held.found:
                self.ended = "stop"
                return
        rest = held.add(pieces.finish()) + held.rest()
        if rest:
            yield rest

    def _tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        began = time.perf_counter()
        session, rng = self._session, self._sampler.rng()
        logits = self._feed(prompt)
        self.prompt_s = time.perf_counter() - began
        while True:
            if self._max_tokens is not None and len(self.ids) >= self._max_tokens:
                self.ended = "length"
                return
            token = self._sampler.sample(logits[: self._tokenizer.vocab_size], session.ids, rng)
            if self.ids:
                self.decode_s = time.perf_counter() - began - self.first_text_s
            else:
                self.first_text_s = time.perf_counter() - began
            self.ids.append(token)
            if token in self._tokenizer.eog_ids:
                self.ended = "end"
                return
            yield token
            if session.length >= session.context:
                self.ended = "context"
                return
            logits = self._feed([token])

    def _feed(self, ids: Sequence[int]) -> np.ndarray:
        step = self._session.step_tokens
        for start in range(0, len(ids), step):
            with whole_steps():
                logits = self._session.eval(ids[start : start + step])
        return logits


class HeldText:
    """Text on its way out, less what may be the beginning of a stop text."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.found = stop, "", False

    def add(self, text: str) -> str:
        """What can be given out; once a stop text is `found`, what stood before it."""
        self._held += text
        places = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._cut(min(places))
        for length in range(min(len(self._held), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return self._cut(len(self._held) - length)
        return self._cut(len(self._held))

    def rest(self) -> str:
        """What was held and turned out to be no stop text; nothing once one is found."""
        return "" if self.found else self._cut(len(self._held))

    def _cut(self, at: int) -> str:
        given, self._held = self._held[:at], self._held[at:]
        return given


@contextmanager
def whole_steps() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that no step is left half way; elsewhere than in the main thread, nothing."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(signal.SIGINT, None)
