"""Tokens one by one by steps prepared in advance, on the device: the bits of other steps, whatever comes in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from tensorgraph.engine import Engine
from tensorgraph.errors import InputError
from tensorgraph.session import Session
from tests.backends.cuda import where
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("machine")
Array = np.ndarray[Any, Any]
KINDS = {"llama": "q8_0", "deepseek_v32": "f32"}
PROMPT, TOKENS = list(range(5, 19)), [int(i) for i in np.random.default_rng(2).integers(3, 200, 20)]
"""From 14 rows to 34: grids are for 16, 32 and 64."""


def session_of(architecture: str) -> Session:
    session = Session(Engine(tiny.model(architecture, KINDS[architecture]), where.device()), context=256)
    session.eval(PROMPT)
    return session


@pytest.fixture
def session() -> Iterator[Session]:
    with session_of("llama") as found:
        yield found


@cache
def unprepared(architecture: str = "llama") -> list[Array]:
    """Logits after each of TOKENS, by steps that are not prepared."""
    found = []
    with session_of(architecture) as one:
        for token in TOKENS:
            one._decoding = None
            found.append(one.eval([token]))
        assert one.engine.stats.prepared == 0
    return found


@pytest.mark.parametrize("architecture", ["llama", pytest.param("deepseek_v32", marks=pytest.mark.deep)])
def test_prepared_steps_give_the_bits_of_others(architecture: str) -> None:
    with session_of(architecture) as session:
        kept = [session.eval([token]) for token in TOKENS]
        stats = session.engine.stats
        assert stats.prepared >= len(TOKENS) - 3 and stats.steps == 1 + len(TOKENS)
        assert session.ids == [*PROMPT, *TOKENS]
    for got, wanted in zip(kept, unprepared(architecture), strict=True):
        np.testing.assert_array_equal(got, wanted)


def a_step_of_another_session(session: Session) -> None:
    with session.sibling() as other:
        other.eval(PROMPT[:1])


def another_reader_of_the_program(session: Session) -> None:
    """Whose numbers stand in what is written before a run."""
    with Session(session.engine, context=256) as other:
        first = other.eval(PROMPT[:1])
        other._decoding = None
        second = other.eval(PROMPT[1:2])
    assert not np.array_equal(first, second)


def a_larger_arena(session: Session) -> None:
    """The one before may be somebody else's by then."""
    device: Any = session.engine.devices[0]
    before = device.arena
    device.require(2 * before.size_bytes)
    device.runtime.write(before.address, np.full(before.size_bytes, 0xA5, np.uint8))


def more_scratch(session: Session) -> None:
    device: Any = session.engine.devices[0]
    device.scratch_for(device.scratch.size_bytes + 1)


def a_token_that_is_none(session: Session) -> None:
    for token in (-1, session.engine.vocab_size):
        with pytest.raises(InputError):
            session.eval([token])


def a_trim(session: Session) -> None:
    ids = session.ids
    session.trim(len(ids) - 3)
    session.eval(ids[-3:])


EVENTS = [a_step_of_another_session, another_reader_of_the_program, a_larger_arena, more_scratch, a_token_that_is_none, a_trim]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: str(event.__name__))
def test_what_comes_in_between_changes_no_bit(event: Callable[[Session], None], session: Session) -> None:
    kept = [session.eval([token]) for token in TOKENS[:6]]
    before = session.engine.stats.prepared
    event(session)
    kept += [session.eval([token]) for token in TOKENS[6:]]
    assert before >= 3 and session.engine.stats.prepared - before >= len(TOKENS) - 9
    for got, wanted in zip(kept, unprepared(), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_results_are_the_callers_own(session: Session) -> None:
    first = session.eval([TOKENS[0]])
    again = [session.eval([token]) for token in TOKENS[1:8]]
    assert session.engine.stats.prepared >= 5
    again[-1][:] = 0
    np.testing.assert_array_equal(first, unprepared()[0])
    assert len({each.ctypes.data for each in (first, *again)}) == 8


def test_memory_that_nobody_views_is_used_again(session: Session) -> None:
    """What a caller has changed of his array, but for its numbers, is his own affair."""
    places = set()
    for token in TOKENS[:12]:
        logits = session.eval([token])
        places.add(logits.ctypes.data)
        logits.shape = (2, -1)
        logits.setflags(write=False)
        del logits
    assert session.engine.stats.prepared >= 10 and len(places) <= 3
    last = session.eval([TOKENS[12]])
    assert last.shape == (session.engine.vocab_size,) and last.flags.writeable
    np.testing.assert_array_equal(last, unprepared()[12])


def test_the_context_is_not_exceeded() -> None:
    with Session(Engine(tiny.model("llama", "q8_0"), where.device()), context=20) as short:
        short.eval(PROMPT)
        for token in TOKENS[: 20 - len(PROMPT)]:
            short.eval([token])
        with pytest.raises(InputError, match="context"):
            short.eval([TOKENS[0]])
        assert short.ids == [*PROMPT, *TOKENS[: 20 - len(PROMPT)]]
