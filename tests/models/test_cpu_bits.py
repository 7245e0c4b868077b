"""Models on the CPU give the same bits from any number of threads, and to any number of callers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import pytest

from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.compiler import CompileOptions, PlanCache
from tensorgraph.engine import Engine
from tensorgraph.models.architecture import Model, model_from_gguf
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.packaged import find_packaged
from tensorgraph.session import Session
from tests.models import tiny

CASES = [
    ("llama", "f32", True),
    ("llama", "q4_1", False),
    ("llama", "q8_0", False),
    ("llama", "q5_0", True),
    ("deepseek_v32", "f32", True),
    ("deepseek_v3", "q8_0", False),
    ("deepseek_v4", "mxfp4", False),
    ("smollm2", "q4_1", False),
    ("smollm2", "q4_1", True),
]
cases = pytest.mark.parametrize(("name", "kind", "exact"), CASES)


@cache
def model(name: str, kind: str) -> Model:
    return model_from_gguf(GGUF.open(find_packaged("smollm2"))) if name == "smollm2" else tiny.model(name, kind)


def text(of: Model, n: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, min(of.vocab_size, 30_000), n).tolist()
    return found


def logits(engine: Engine) -> list[bytes]:
    """A prefill, tokens one by one, and ragged batches in which a sequence begins."""
    of = engine.model
    assert isinstance(of, Model)
    ids, other = text(of, 130, 0), text(of, 60, 1)
    with Session(engine, context=256) as a, a.sibling() as b, a.sibling() as c:
        found = [a.eval(ids, all_logits=True)]
        found += [a.eval([i]) for i in other[:6]]
        found += Session.batch([(b, other[:50]), (a, ids[:3]), (c, ids[7:8])], all_logits=True)
        found += Session.batch([(b, other[50:51]), (a, ids[3:4]), (c, ids[8:9])], all_logits=True)
        return [f.tobytes() for f in found]


@cases
def test_any_number_of_threads_gives_the_same_bits(name: str, kind: str, exact: bool) -> None:
    """Four is more than there may be processors: then who does what changes from step to step."""
    engine = Engine(model(name, kind), "cpu", options=CompileOptions(exact=exact))
    found = []
    for threads in (1, 2, 4, 4, "auto", 3):
        engine.devices[0].set_threads(threads)  # type: ignore[arg-type]
        found.append(logits(engine))
    assert [each == found[0] for each in found] == [True] * len(found)


# Callers in threads of their own.


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns far more often than they usually do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*tasks: Callable[[], list[bytes]]) -> list[list[bytes]]:
    """What tasks return that begin at once in threads of their own."""
    ready = threading.Barrier(len(tasks))
    found: list[list[bytes]] = [[] for _ in tasks]

    def run(number: int) -> None:
        ready.wait()
        found[number] = tasks[number]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def steps(session: Session, ids: Sequence[int], n: int) -> list[bytes]:
    """The logits of n steps, of one token or now and then of three."""
    found = []
    for i in range(n):
        logits: np.ndarray = session.eval(ids[session.length : session.length + (1 if i % 9 else 3)])
        found.append(logits.tobytes())
    return found


HARD = [("llama", "q4_1", False), ("deepseek_v3", "q8_0", False), ("deepseek_v4", "f32", True)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("name", "kind", "exact"), HARD)
def test_two_python_threads_step_two_sessions_of_one_engine(
    name: str, kind: str, exact: bool, shared: bool, switching: None
) -> None:
    """Of one store or of two."""
    of = model(name, kind)
    engine = Engine(of, "cpu", options=CompileOptions(exact=exact))
    texts, n_steps = (text(of, 300, 3), text(of, 300, 4)), 200

    def alone(ids: list[int]) -> list[bytes]:
        with Session(engine, context=300) as session:
            return steps(session, ids, n_steps)

    wanted = [alone(ids) for ids in texts]
    with Session(engine, context=300) as a, a.sibling() if shared else Session(engine, context=300) as b:
        found = together(lambda: steps(a, texts[0], n_steps), lambda: steps(b, texts[1], n_steps))
    assert [of_one == of_one_alone for of_one, of_one_alone in zip(found, wanted, strict=True)] == [True, True]
    assert len(engine.cache) == 1 and wanted[0] != wanted[1]


class Louder(Model):
    """Another model of the same topology."""

    def weight(self, name: str) -> np.ndarray:
        found = super().weight(name)
        return found * np.float32(1.5) if name.endswith("attn_norm.weight") else found


@pytest.mark.parametrize("threads", [(1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("devices", ["one", "two"])
def test_two_python_threads_run_two_executables_of_one_plan(devices: str, threads: tuple[int, int], switching: None) -> None:
    """Of two models, on one device with its one arena, or on two that share their code and threads."""
    plain = tiny.model("llama", "q4_1")
    models = plain, Louder(plain.architecture, plain.config, plain.catalog, plain.file)
    cache, first = PlanCache(), CpuDevice()
    engines = [Engine(of, first if devices == "one" else CpuDevice(), cache=cache) for of in models]
    for engine, n in zip(engines, threads, strict=True):
        engine.devices[0].set_threads(n)
    ids, n_steps = text(plain, 300, 5), 200 if threads[0] == threads[1] else 60

    def task(engine: Engine) -> Callable[[], list[bytes]]:
        def run() -> list[bytes]:
            with Session(engine, context=300) as session:
                return steps(session, ids, n_steps)

        return run

    alone = [task(engine)() for engine in engines]
    found = together(*map(task, engines))
    assert [of_one == of_one_alone for of_one, of_one_alone in zip(found, alone, strict=True)] == [True, True]
    assert len(cache) == 1 and alone[0] != alone[1]
