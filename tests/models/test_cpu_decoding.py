"""Tokens one by one on the CPU, by steps prepared in advance: the bits of other steps, whatever comes in between."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.replay import MOST_ROWS, Replay
from tensorgraph.engine import Engine
from tensorgraph.errors import InputError
from tensorgraph.session import Session
from tests.models import tiny

Array = np.ndarray[Any, Any]
PROMPT, TOKENS = list(range(5, 22)), [int(i) for i in np.random.default_rng(2).integers(3, 200, 60)]


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    found = CpuDevice()
    found.set_threads(1)
    yield found


@pytest.fixture
def session(device: CpuDevice) -> Iterator[Session]:
    with Session(Engine(tiny.model("llama", "q4_1"), device), context=256) as found:
        found.eval(PROMPT)
        yield found


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that were prepared and made."""
    found: list[int] = []
    run = Replay.run

    def counted(self: Replay, i: int, x: int) -> Array | None:
        row = run(self, i, x)
        if row is not None:
            found.append(i)
        return row

    monkeypatch.setattr(Replay, "run", counted)
    return found


def by_batches(tokens: list[int]) -> list[Array]:
    """Logits after each token, by steps that are not prepared."""
    with Session(Engine(tiny.model("llama", "q4_1"), CpuDevice()), context=256) as one:
        one.eval(PROMPT)
        found = []
        for token in tokens:
            one._decoding = None
            found.append(np.array(one.eval([token])))
        return found


def test_prepared_steps_give_the_bits_of_others(session: Session, prepared: list[int]) -> None:
    """Also in arrays that are kept while later steps run, and in views of them alone."""
    kept = [session.eval([token]) if i % 2 else session.eval([token])[None][0] for i, token in enumerate(TOKENS)]
    assert len(prepared) >= len(TOKENS) - 3
    for got, wanted in zip(kept, by_batches(TOKENS), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_an_array_that_nobody_holds_is_used_again(session: Session, prepared: list[int]) -> None:
    places = {session.eval([token]).ctypes.data for token in TOKENS[:30]}
    assert len(prepared) >= 28 and len(places) <= MOST_ROWS
    kept = [session.eval([token]) for token in TOKENS[:20]]
    assert len({logits.ctypes.data for logits in kept}) == len(kept)


def test_what_a_caller_does_to_an_array_is_his_own_affair(session: Session, prepared: list[int]) -> None:
    """Its shape, type and flags; and a weak reference dies with it."""
    for token in TOKENS[:10]:
        logits = session.eval([token])
        gone = weakref.ref(logits)
        logits.shape = (2, -1)
        logits.setflags(write=False)
        del logits
    last = session.eval([TOKENS[10]])
    assert prepared and gone() is None
    assert last.shape == (session.engine.vocab_size,) and last.flags.writeable
    np.testing.assert_array_equal(last, by_batches(TOKENS[:11])[-1])


Check = Callable[[], bool] | None
"""What must hold after some more steps."""


def more_threads(session: Session, device: CpuDevice, stack: ExitStack) -> Check:
    device.set_threads(2)
    return lambda: device.code.executor.max_threads == 2


def other_threads_elsewhere(session: Session, device: CpuDevice, stack: ExitStack) -> Check:
    other = CpuDevice()
    other.set_threads(2)
    with Session(Engine(tiny.model("llama", "q4_1"), other), context=64) as one:
        one.eval(PROMPT)
    return lambda: device.code.executor.max_threads == 1


def profiling(session: Session, device: CpuDevice, stack: ExitStack) -> Check:
    told: list[int] = []
    stack.enter_context(device.profiling(lambda calls, dims, seconds, spent_s: told.append(len(calls))))
    return lambda: len(told) == 18 and set(told) == {told[0]}


def a_step_of_another_session(session: Session, device: CpuDevice, stack: ExitStack) -> Check:
    with session.sibling() as other:
        other.eval(PROMPT[:1])
    return None


def another_reader_of_the_program(session: Session, device: CpuDevice, stack: ExitStack) -> Check:
    """Whose results lie in the arena again, where kernels wrote before."""
    with Session(session.engine, context=256) as other:
        first = other.eval(PROMPT[:1])
        other._decoding = None
        second = other.eval(PROMPT[1:2])
    assert not np.array_equal(first, second)
    return None


def a_token_that_is_none(session: Session, device: CpuDevice, stack: ExitStack) -> Check:
    length = session.length
    for token in (-1, session.engine.vocab_size):
        with pytest.raises(InputError):
            session.eval([token])
    assert session.length == length
    return None


def a_larger_arena(session: Session, device: CpuDevice, stack: ExitStack) -> Check:
    """The one before, which others may have by then, is not written to any more."""
    before = device.arena
    device.require(2 * len(before), 0)
    before[:] = 0xA5
    return lambda: bool((before == 0xA5).all())


EVENTS: list[Callable[[Session, CpuDevice, ExitStack], Check]] = [
    more_threads,
    other_threads_elsewhere,
    profiling,
    a_step_of_another_session,
    another_reader_of_the_program,
    a_token_that_is_none,
    a_larger_arena,
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: str(event.__name__))
def test_what_comes_in_between_changes_no_bit(
    event: Callable[[Session, CpuDevice, ExitStack], Check], session: Session, device: CpuDevice, prepared: list[int]
) -> None:
    kept = [session.eval([token]) for token in TOKENS[:12]]
    with ExitStack() as stack:
        before = len(prepared)
        check = event(session, device, stack)
        kept += [session.eval([token]) for token in TOKENS[12:30]]
        assert check is None or check()
    assert device.code.executor.counters()[0]["runs"] >= 14  # by the threads that there are
    assert before >= 9 and len(prepared) - before >= 14
    for got, wanted in zip(kept, by_batches(TOKENS[:30]), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("move", [lambda d: d.require(2 * len(d.arena), 0), lambda d: d.set_threads(2)])
def test_an_interrupt_before_memory_moves_moves_nothing(
    move: Callable[[CpuDevice], None], session: Session, device: CpuDevice, prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    kept = [session.eval([token]) for token in TOKENS[:5]]
    arena, threads = device.arena, device.threads
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(device.code.executor, "halt", interrupted)
        move(device)
    assert device.arena is arena and device.threads == threads
    kept += [session.eval([token]) for token in TOKENS[5:10]]
    for got, wanted in zip(kept, by_batches(TOKENS[:10]), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_an_interrupt_as_profiling_begins_ends_it(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([KeyboardInterrupt, None])

    def interrupted() -> None:
        if (error := next(told)) is not None:
            raise error

    monkeypatch.setattr(device.code.executor, "halt", interrupted)
    with pytest.raises(KeyboardInterrupt), device.profiling(lambda *_: None):
        pass
    assert device.note is None and next(told, "used up") == "used up"


def test_a_step_prepared_before_a_fork(session: Session, device: CpuDevice) -> None:
    """The lock that another thread held when the process forked is nobody's in the child."""
    session.eval([TOKENS[0]])
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with device.code.executor.lock:
            holding.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        right = np.array_equal(session.eval([TOKENS[1]]), by_batches(TOKENS[:2])[1])
        os._exit(0 if right else 1)
    done.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0


def test_the_context_is_not_exceeded(device: CpuDevice) -> None:
    with Session(Engine(tiny.model("llama", "q4_1"), device), context=40) as short:
        short.eval(PROMPT)
        for token in TOKENS[: 40 - len(PROMPT)]:
            short.eval([token])
        with pytest.raises(InputError, match="context"):
            short.eval([TOKENS[0]])
        assert short.ids == [*PROMPT, *TOKENS[: 40 - len(PROMPT)]]
