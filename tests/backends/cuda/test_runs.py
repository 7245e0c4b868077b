"""What a device does over many runs: recorded steps give the same bits, memory is given back, and it works on after a failure."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.runtime import OutOfMemoryError
from tensorgraph.compiler import run_op
from tensorgraph.device import get_devices
from tensorgraph.dtypes import as_dtype
from tensorgraph.engine import Engine
from tensorgraph.errors import KernelError, UnsupportedError
from tensorgraph.models.text.model import load
from tensorgraph.session import Session
from tests.backends.cuda import where
from tests.models import tiny
from tests.reference import reference_path

MEMORY_BYTES = 1 << 30
"""Of a device on the host."""
SIZES = (1, 3)
"""Tokens of steps, each of a class of its own."""
N_SESSIONS = 4 if where.ON_HOST else 50
ARCHITECTURES = ("llama", pytest.param("deepseek_v4", marks=pytest.mark.deep))
on_a_machine = pytest.mark.usefixtures("machine")


def device() -> CudaDevice:
    return where.device(MEMORY_BYTES)


@on_a_machine
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_recorded_step_gives_the_same_bits(architecture: str) -> None:
    """Launched one by one, recorded, and replayed: of two size classes by turns, and after memory has moved."""
    on, ids = device(), tiny.tokens(architecture).tolist()
    engine = Engine(tiny.model(architecture), on, kv_dtype="f16")
    with Session(engine, step_tokens=64) as session:
        session.eval(ids[:9])
        before = session.snapshot()

        def step(n: int) -> bytes:
            session.restore(before)
            logits: np.ndarray[Any, Any] = session.eval(ids[9 : 9 + n], all_logits=True)
            return logits.tobytes()

        first = {n: step(n) for n in SIZES}
        for _ in range(3):
            assert {n: step(n) for n in SIZES} == first
        version = on.version
        with Session(engine, step_tokens=128) as other:  # whose steps want more room
            other.eval(ids[:23])
        on.require(on.arena.size_bytes + 1)
        assert on.version > version
        for _ in range(3):
            assert {n: step(n) for n in SIZES} == first


@on_a_machine
def test_sessions_leave_no_memory_behind() -> None:
    on, ids = device(), tiny.tokens("llama").tolist()
    engine = Engine(tiny.model("llama"), on, kv_dtype="f16")

    def one() -> int:
        with Session(engine) as session:
            session.eval(ids[:5])
            session.eval(ids[5:6])
        gc.collect()
        return on.runtime.held_bytes()

    one()
    held = one()
    assert held > 0 and {one() for _ in range(N_SESSIONS)} == {held}


@on_a_machine
def test_a_model_that_is_closed_leaves_no_memory_behind() -> None:
    gc.collect()
    runtime = (on := device()).runtime
    held = runtime.held_bytes()
    with load(reference_path("llama/llama-f32.gguf"), backend=on) as model, model.session() as session:
        session.eval([1, 5, 9])
        weights = sum(model.model.weight(name).nbytes for name in ("token_embd.weight", "output.weight"))
        assert runtime.held_bytes() - held >= weights
    del model, session, on
    gc.collect()
    assert runtime.held_bytes() == held


@on_a_machine
def test_without_room_it_says_so_and_works_on() -> None:
    on, ids = device(), tiny.tokens("llama").tolist()
    with Session(Engine(tiny.model("llama"), on, kv_dtype="f16")) as session:
        before = session.eval(ids[:5])
        with pytest.raises(OutOfMemoryError, match=r"\[cuda.*\] wanted .*; .* are free"):
            on.runtime.take(1 << 48)
        session.trim(0)
        np.testing.assert_array_equal(session.eval(ids[:5]), before)


@on_a_machine
def test_a_kernel_that_does_not_compile_is_said_and_the_next_runs() -> None:
    on = device()
    with pytest.raises(KernelError, match="wrong"):
        on.runtime.kernels({"wrong": 'extern "C" __global__ void wrong() { nonsense; }'})
    x = np.linspace(-1, 1, 70, dtype=np.float32)
    np.testing.assert_allclose(run_op("relu", x, backend=on), np.maximum(x, 0))


@on_a_machine
def test_times_are_those_of_runs() -> None:
    on, runs = device(), []
    x = on.upload(np.ones(1 << 16, np.float32), as_dtype("f32"), constant=True)
    taken = on.runtime.seconds(lambda: runs.append(on.runtime.clear(x.address, 1 << 18)), 20)
    assert len(runs) == 20 and 0 < taken < 0.1
    assert not on.download(x, as_dtype("f32")).any() and on.runtime.describe()["name"]


# Without a GPU.


def cupy(error: str, count: int = 1) -> Any:
    """What stands for CuPy on a machine with such a driver."""

    class CUDARuntimeError(Exception):
        pass

    def devices() -> int:
        if error:
            raise CUDARuntimeError(error)
        return count

    runtime = SimpleNamespace(getDeviceCount=devices, CUDARuntimeError=CUDARuntimeError)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


NEEDS_NONE = "; the backend cpu needs none"
MISSING = {
    "no CuPy": (None, r"wanted CuPy; it is not installed \(pip install .*\)" + NEEDS_NONE),
    "an old driver": (
        cupy("cudaErrorInsufficientDriver: CUDA driver version is insufficient"),
        r"wanted a driver of NVIDIA's for CUDA 13 \(580 or newer\); got cudaErrorInsufficientDriver.*" + NEEDS_NONE,
    ),
    "no driver": (cupy("cudaErrorNoDevice: no CUDA-capable device"), "wanted a GPU; got cudaErrorNoDevice.*" + NEEDS_NONE),
    "no GPU": (cupy("", 0), "wanted a GPU; found none" + NEEDS_NONE),
    "another one": (cupy("", 1), "wanted GPU 3; there are 1, from 0 on"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_a_sentence_and_the_cpu_works_on(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, said = MISSING[what]
    monkeypatch.setitem(sys.modules, "cupy", module)
    (found,) = get_devices("cuda:3")
    with pytest.raises(UnsupportedError, match=said):
        found.runtime  # type: ignore[attr-defined]  # noqa: B018
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    np.testing.assert_array_equal(run_op("relu", x, backend="cpu"), np.maximum(x, 0))


def test_the_tests_for_a_gpu_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(where, "NAME", "cuda")
    monkeypatch.setattr(where, "ON_HOST", False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert where.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("test-cuda: [cuda] wanted CuPy")
