"""The choice of how many threads take part, by runs whose durations are made up: what the native loop does is done here."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tensorgraph.backends.cpu import native_loop
from tensorgraph.backends.cpu.thread_choice import LOOK_S, SHORTEST, ThreadChoice, idle_reading

TICKS_PER_S = 1e9
WORDS = {name: getattr(native_loop, name) // 8 for name in ("ALONE", "LEFT", "LIMIT", "COUNT", "LAST")}
NOTICED_S = 0.3
Draw = Callable[[], float]


class Machine:
    """Two processors, a clock, and what is run on them; `hint` is whether idle time can be read."""

    def __init__(self, hint: bool = True) -> None:
        self.now_s = self.idle_s = 0.0
        self.looks = 0
        self.choice = ThreadChoice(TICKS_PER_S, lambda: (self.now_s, self.idle_s) if hint else None)

    def run(self, for_s: float, alone: Draw, all_: Draw, *, idle: float = 1.0, weight: int = 900) -> list[tuple[float, bool]]:
        """Programs for some seconds: when each began, and whether it ran alone.

        Args:
            alone, all_: seconds that a run takes.
            idle: processors that are idle while a run is alone.
        """
        line, ran, end = self.choice.lines[weight.bit_length()], list[tuple[float, bool]](), self.now_s + for_s
        began = self.now_s
        while self.now_s < end:
            is_alone = bool(line[WORDS["ALONE"]])
            ran.append((self.now_s - began, is_alone))
            spent_s = alone() if is_alone else all_()
            self.now_s += spent_s
            self.idle_s += idle * spent_s if is_alone else 0.0
            ticks = int(spent_s * TICKS_PER_S)
            line[WORDS["LAST"] + line[WORDS["COUNT"]] % native_loop.KEPT] = ticks
            line[WORDS["COUNT"]] += 1
            line[WORDS["LEFT"]] -= 1
            if line[WORDS["LEFT"]] <= 0 or ticks > line[WORDS["LIMIT"]]:
                self.looks += 1
                self.choice.look(weight.bit_length())
        return ran


def near(milliseconds: float, by: float = 0.05) -> Draw:
    draw = random.Random(3)
    return lambda: milliseconds / 1000 * draw.uniform(1 - by, 1 + by)


def stalled(milliseconds: float, stalls: float, part: float) -> Draw:
    """A part of the runs takes `stalls` milliseconds: a thread was put off by a neighbour."""
    draw, usual = random.Random(5), near(milliseconds)
    return lambda: stalls / 1000 if draw.random() < part else usual()


def part_alone(ran: list[tuple[float, bool]], after_s: float = 0.0) -> float:
    found = [alone for at, alone in ran if at >= after_s]
    return sum(found) / len(found)


def idle() -> tuple[Draw, Draw]:
    """Seconds alone and on all threads."""
    return near(9), near(6)


def busy() -> tuple[Draw, Draw]:
    """The same beside a neighbour."""
    return near(9.5), stalled(6.5, 22, 0.4)


def test_all_threads_on_an_idle_machine() -> None:
    machine = Machine()
    assert part_alone(machine.run(20, *idle())) < 0.04
    assert machine.looks < 15 * 20


def test_a_neighbour_is_noticed_when_it_comes_and_when_it_goes() -> None:
    machine = Machine()
    machine.run(5, *idle())
    for _ in range(5):
        came = machine.run(6, *busy(), idle=0.0)
        went = machine.run(6, *idle())
        assert next(at for at, alone in came if alone) < NOTICED_S and part_alone(came, NOTICED_S) > 0.85
        assert next(at for at, alone in went if not alone) < NOTICED_S and part_alone(went, NOTICED_S) < 0.06


def test_long_steps_are_noticed_after_some() -> None:
    """At 60 ms a run: what became slower after some twenty of them, and idle processors at once."""
    machine = Machine()
    machine.run(10, near(90), near(60))
    assert part_alone(machine.run(30, near(95), near(140), idle=0.0), 20 * 0.14) > 0.85
    assert part_alone(machine.run(20, near(90), near(60)), NOTICED_S) < 0.1


def test_where_idle_time_cannot_be_read_tries_find_it() -> None:
    machine = Machine(hint=False)
    machine.run(5, *idle())
    assert part_alone(machine.run(6, *busy()), NOTICED_S) > 0.85
    assert part_alone(machine.run(20, *idle()), 5) < 0.06


def test_a_slow_run_now_and_then_changes_nothing() -> None:
    machine = Machine()
    machine.run(2, *idle())
    ran = machine.run(20, near(9), stalled(6, 25, 0.02))
    assert part_alone(ran) < 0.05


def test_idle_processors_that_do_not_help_are_tried_ever_less() -> None:
    """A neighbour that comes and goes beside programs that are faster alone: tries stay few."""
    machine = Machine()
    machine.run(2, near(5), near(10))
    changes = 0
    for i in range(200):
        ran = machine.run(0.3, near(5), near(10), idle=float(i % 2))
        changes += any(not alone for _, alone in ran)
    assert changes < 80


def test_sizes_have_answers_of_their_own() -> None:
    machine = Machine()
    machine.run(3, *idle())
    assert part_alone(machine.run(1, near(0.02), near(0.04), weight=3)) > 0.9
    assert part_alone(machine.run(1, *idle())) < 0.1


def test_little_time_goes_into_looking() -> None:
    """Of programs that are over in microseconds, too: a look takes as long as many of them."""
    machine = Machine()
    ran = machine.run(1, near(0.005), near(0.004))
    assert machine.looks < len(ran) / 200 and machine.looks * 5e-5 < 0.05


def test_the_first_try_comes_early() -> None:
    machine = Machine()
    ran = machine.run(SHORTEST * 0.02 + 0.2, near(9), near(18))
    assert part_alone(ran, SHORTEST * 0.02) > 0.9


def test_idle_time_is_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [idle_reading() for _ in range(2)]
    assert all(r is None or r[1] >= 0 for r in readings)

    def nothing(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", nothing)
    assert idle_reading() is None and LOOK_S < NOTICED_S / 2
