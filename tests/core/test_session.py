"""Sessions: what they refuse, and steps that are whole or have not been."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.compiler import PlanCache
from tensorgraph.engine import Engine
from tensorgraph.errors import FormatError, InputError, StateError, TensorGraphError, UnknownNameError
from tensorgraph.session import Session, SessionSnapshot
from tensorgraph.state_step import Step
from tests.models import tiny

Array = np.ndarray[Any, Any]


def session(architecture: str = "llama", **options: Any) -> Session:
    return Session(tiny.engine(architecture), **options)


REFUSED: dict[str, tuple[Callable[[Session], Any], type[Exception], str]] = {
    "no tokens": (lambda s: s.eval([]), InputError, r"\[eval\] wanted at least one token id; got float64\[0\]"),
    "fractions": (lambda s: s.eval([1.5]), InputError, r"wanted at least one token id; got float64\[1\]"),
    "no list": (lambda s: s.eval(5), InputError, r"\[eval\] wanted a list of token ids; got 5"),  # type: ignore[arg-type]
    "a ragged table": (lambda s: s.eval([[1], [2, 3]]), InputError, "wanted a list of token ids"),  # type: ignore[list-item]
    "a table": (lambda s: s.eval(np.zeros((2, 2), np.int32)), InputError, r"wanted at least one token id; got int32\[2, 2\]"),
    "an unknown token": (
        lambda s: s.eval([1, 2, 512]),
        InputError,
        r"token id 512 \(number 2\) is outside the vocabulary of 512",
    ),
    "a negative token": (lambda s: s.eval([-1]), InputError, r"token id -1 \(number 0\) is outside the vocabulary of 512"),
    "too long": (lambda s: s.eval([1] * 38), InputError, r"the context holds 40 tokens; 3 tokens are there and 38 are new"),
    "an unknown name": (
        lambda s: s.eval([1], outputs=["blk.9.out"]),
        UnknownNameError,
        r"no node is named 'blk.9.out'. Named: .*blk.0.out",
    ),
    "a trim forward": (lambda s: s.trim(4), TensorGraphError, "trim"),
    "a file that is not there": (lambda s: s.load("nowhere/at/all.tg"), (OSError, TensorGraphError), "nowhere"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_leaves_the_session_as_it_was(name: str) -> None:
    act, error, said = REFUSED[name]
    with session(context=40) as s, session(context=40) as fresh:
        s.eval([3, 1, 4])
        with pytest.raises(error, match=said):
            act(s)
        assert s.ids == [3, 1, 4] and s.length == 3
        fresh.eval([3, 1, 4])
        assert s.eval([1, 5]).tobytes() == fresh.eval([1, 5]).tobytes()


@pytest.mark.parametrize("options", [{"context": -1}, {"context": 0}, {"step_tokens": 0}])
def test_sizes_of_a_session(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"\[session\] wanted context and step_tokens >= 1"):
        session(**options)


def test_a_closed_session() -> None:
    s = session()
    s.eval([1])
    s.close()
    s.close()
    for act in (lambda: s.eval([1]), s.fork, s.snapshot, lambda: s.trim(0)):
        with pytest.raises(StateError, match=r"\[session\] wanted an open session; this one was closed"):
            act()


TOUCHING: dict[str, Callable[[Session, Path], Any]] = {
    "length": lambda s, _: s.length,
    "ids": lambda s, _: s.ids,
    "eval": lambda s, _: s.eval([1]),
    "sibling": lambda s, _: s.sibling(),
    "fork": lambda s, _: s.fork(),
    "trim": lambda s, _: s.trim(1),
    "snapshot": lambda s, _: s.snapshot(),
    "restore": lambda s, _: s.restore(SNAPSHOTS[s]),
    "release": lambda s, _: SNAPSHOTS[s].release(),
    "save": lambda s, folder: s.save(folder / "new.tg"),
    "load": lambda s, folder: s.load(folder / "old.tg"),
    "close": lambda s, _: s.close(),
}
SNAPSHOTS: dict[Session, SessionSnapshot] = {}


@pytest.mark.parametrize("name", TOUCHING)
def test_what_touches_the_store_waits_for_the_step_of_another_thread(name: str, tmp_path: Path) -> None:
    """The store may be shared, and a step of another session of it may be half done."""
    with session(context=10) as s:
        s.eval([3, 1, 4])
        s.save(tmp_path / "old.tg")
        SNAPSHOTS[s] = s.snapshot()
        done = threading.Event()

        def act() -> None:
            TOUCHING[name](s, tmp_path)
            done.set()

        thread = threading.Thread(target=act)
        with s.engine.lock:
            thread.start()
            assert not done.wait(0.02)
        thread.join()
        assert done.is_set()
        del SNAPSHOTS[s]


def test_a_batch_is_of_one_store() -> None:
    with session() as a, session() as b:
        with pytest.raises(StateError, match=r"\[batch\] wanted sessions of one store"):
            Session.batch([(a, [1]), (b, [2])])
        assert a.length == b.length == 0


def test_a_session_is_in_a_batch_once() -> None:
    with session(context=10, step_tokens=4) as s:
        with pytest.raises(StateError, match=r"\[batch\] wanted each session once"):
            Session.batch([(s, [1] * 6), (s, [2] * 6)])
        assert s.length == 0


@pytest.mark.parametrize("ids", ["[Infinity, 1]", "[" * 100_000, "[1]", '{"1": 2}', "[1, null]"])
def test_saved_ids_that_do_not_fit(tmp_path: Path, ids: str) -> None:
    with session() as s:
        s.eval([3, 1])
        s._store.save(s._open(), tmp_path / "saved", {"ids": ids})
        used = s._store.used_pages
        with pytest.raises(FormatError, match="token ids do not fit"):
            s.load(tmp_path / "saved")
        assert s.ids == [3, 1] and s._store.used_pages == used


def test_a_bad_member_stops_the_whole_batch() -> None:
    with session() as a, a.sibling() as b:
        with pytest.raises(InputError, match="token id 999"):
            Session.batch([(a, [1, 2]), (b, [999])])
        assert a.length == b.length == 0


class Stopper:
    """Makes an op raise after a number of calls, as Ctrl-C in the middle of a step does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, op: str, error: type[BaseException]) -> None:
        self.left: int | None = None
        self.calls = 0
        wrapped = registry.ops.get(op).reference_fn

        def reference(*arrays: Any, **attrs: Any) -> Any:
            self.calls += 1
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise error
            return wrapped(*arrays, **attrs)

        monkeypatch.setattr(registry.ops.get(op), "reference_fn", reference)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    ("architecture", "op"), [("llama", "flash_attn"), ("deepseek_v32", "mul_mat"), ("deepseek_v4", "rms_norm")]
)
def test_a_step_that_is_cut_off_has_not_been(
    monkeypatch: pytest.MonkeyPatch, architecture: str, op: str, error: type[BaseException]
) -> None:
    """In the first layer, in the middle and in the last op: lengths, state and all later results are as if it never began."""
    stop = Stopper(monkeypatch, op, error)
    ids = tiny.tokens(architecture)[:22]
    with session(architecture) as s, session(architecture) as fresh:
        fresh.eval(ids[:9])
        s.eval(ids[:9])
        stop.calls = 0
        wanted = [fresh.eval(ids[9:20], all_logits=True), fresh.eval(ids[20:21]), fresh.eval(ids[21:22])]
        in_a_step = stop.calls // 3
        fork = s.fork()
        for after in {0, in_a_step // 2, in_a_step - 1}:
            stop.left = after
            with pytest.raises(error):
                s.eval(ids[9:20], all_logits=True)
            stop.left = None
            assert s.length == 9 and s.ids == ids[:9].tolist()
        assert s.eval(ids[9:20], all_logits=True).tobytes() == wanted[0].tobytes()
        assert s.eval(ids[20:21]).tobytes() == wanted[1].tobytes()
        assert fork.eval(ids[9:20], all_logits=True).tobytes() == wanted[0].tobytes()
        assert s.eval(ids[21:22]).tobytes() == wanted[2].tobytes()
        fork.close()


def test_a_batch_that_is_cut_off_has_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stopper(monkeypatch, "flash_attn", KeyboardInterrupt)
    ids = tiny.tokens("llama").tolist()
    with session() as a, a.sibling() as b, session() as c, c.sibling() as d:
        for one, other in ((a, b), (c, d)):
            Session.batch([(one, ids[:7]), (other, ids[:3])])
        stop.left = 1  # in the second of two layers: the first has appended
        with pytest.raises(KeyboardInterrupt):
            Session.batch([(a, ids[7:9]), (b, ids[3:9])])
        stop.left = None
        assert (a.length, b.length) == (7, 3)
        got = Session.batch([(a, ids[7:9]), (b, ids[3:9])])
        wanted = Session.batch([(c, ids[7:9]), (d, ids[3:9])])
        assert [g.tobytes() for g in got] == [w.tobytes() for w in wanted]


def test_a_commit_that_is_cut_off_has_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.tokens("llama").tolist()

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with session() as s, session() as fresh:
        s.eval(ids[:5])
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Step, "commit", stop)
            s.eval(ids[5:9])
        assert s.ids == ids[:5] and s.length == 5
        fresh.eval(ids[:5])
        assert s.eval(ids[9:11]).tobytes() == fresh.eval(ids[9:11]).tobytes()
        assert s.ids == ids[:5] + ids[9:11]


def test_ids_follow_a_trim() -> None:
    ids = tiny.tokens("llama").tolist()
    with session() as s, s.fork() as other:
        s.eval(ids[:9])
        s.trim(4)
        assert s.ids == ids[:4] and s.length == 4
        s.eval(ids[20:22])
        assert s.ids == ids[:4] + ids[20:22] and other.ids == []
        s.trim(0)
        assert s.ids == [] and s.eval(ids[:3]).tobytes() == other.eval(ids[:3]).tobytes()


def test_chunks_before_the_one_that_is_cut_off_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long input is several steps; Ctrl-C ends it within one and what was evaluated counts."""
    stop = Stopper(monkeypatch, "flash_attn", KeyboardInterrupt)
    ids = tiny.tokens("llama").tolist()
    with session(step_tokens=4) as s, session(step_tokens=4) as fresh:
        stop.left = 2 * 2 + 1  # two layers a step: in the third step
        with pytest.raises(KeyboardInterrupt):
            s.eval(ids[:20])
        stop.left = None
        assert s.ids == ids[:8]
        assert s.eval(ids[8:20]).tobytes() == fresh.eval(ids[:20]).tobytes()


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v32", "deepseek_v4"])
def test_sessions_of_two_models_share_a_cache(architecture: str) -> None:
    """One cache, two engines with weights of their own: the second compiles nothing and answers for itself."""
    cache = PlanCache()
    model = tiny.model(architecture)
    one, two = Engine(model, kv_dtype="f32", cache=cache), Engine(_negated(model), kv_dtype="f32", cache=cache)
    with Session(one) as a, Session(two) as b:
        first = a.eval([5, 6, 7])
        misses = cache.misses
        second = b.eval([5, 6, 7])
        assert cache.misses == misses and cache.hits >= 1
        np.testing.assert_array_equal(second, -first)
        assert a.eval([8]).tobytes() != b.eval([8]).tobytes()


def _negated(model: Any) -> Any:
    """The same model with its output weights negated."""

    class Negated:
        vocab_size, context = model.vocab_size, model.context
        states, graph = model.states, model.graph

        def weight(self, name: str) -> Array:
            value: Array = model.weight(name)
            return -value if name == "output.weight" else value

    return Negated()


def test_named_nodes_are_given_beside_the_logits() -> None:
    ids = tiny.tokens("llama")[:6]
    with session() as s, session() as fresh:
        taps = s.eval(ids, outputs=["blk.0.out", "blk.1.attn_out", "logits"])
        assert {k: v.shape for k, v in taps.items()} == {"blk.0.out": (6, 128), "blk.1.attn_out": (6, 128), "logits": (1, 512)}
        logits = fresh.eval(ids)
        assert taps["logits"].tobytes() == logits.tobytes()
        again = s.eval([1, 2], outputs=["blk.0.out"])["blk.0.out"]
        fresh.eval([1])
        assert again[1].tobytes() == fresh.eval([2], outputs=["blk.0.out"])["blk.0.out"][0].tobytes()
