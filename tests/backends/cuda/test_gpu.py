"""The runtime of a GPU over what stands for CuPy: copies, recorded steps, memory, and what is said where something is missing."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cuda import gpu as gpus
from tensorgraph.backends.cuda import nvrtc
from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.host import HostDevice
from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tensorgraph.backends.cuda.runtime import LaunchOf, Mirror, OutOfMemoryError
from tensorgraph.engine import Engine
from tensorgraph.errors import KernelError, UnsupportedError
from tensorgraph.session import Session
from tests.backends.cuda.fake_cupy import CUDARuntimeError, FakeGpu
from tests.backends.cuda.hosted import source
from tests.models import tiny

PROMPT, TOKENS = list(range(5, 19)), [int(i) for i in np.random.default_rng(2).integers(3, 200, 20)]


@pytest.fixture
def gpu(compiler: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return installed(FakeGpu(compiler), monkeypatch)


def installed(found: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setitem(sys.modules, "cupy", found.module)  # type: ignore[arg-type]
    monkeypatch.setattr(nvrtc, "compile_source", found.compile_source)
    monkeypatch.setattr(gpus, "default_folder", lambda name: None)  # machine code of others is kept there
    return found


def session_on(device: CudaDevice, **more: Any) -> Session:
    return Session(Engine(tiny.model("llama", "q8_0"), device), context=256, **more)


def logits(device: CudaDevice) -> list[tiny.Array]:
    """A prompt, tokens one by one, another prompt."""
    with session_on(device) as session:
        found = [session.eval(PROMPT), *(session.eval([token]) for token in TOKENS)]
        return [*found, session.eval(PROMPT[:9], all_logits=True)]


def test_the_bits_of_other_machines(gpu: FakeGpu) -> None:
    """Started as they are, recorded, and replayed; grids for 16, 32 and 64 rows."""
    for got, wanted in zip(logits(CudaDevice("cuda", gpus.CupyRuntime)), logits(HostDevice("cuda-host")), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert gpu.counts["graphs"] >= len(TOKENS) - 6


def test_a_prepared_step_is_one_launch_and_one_wait(gpu: FakeGpu) -> None:
    with session_on(CudaDevice("cuda", gpus.CupyRuntime)) as session:
        session.eval(PROMPT)
        for token in TOKENS[:6]:
            session.eval([token])
        before = dict(gpu.counts)
        for token in TOKENS[6:10]:
            session.eval([token])
        assert {name: n - before[name] for name, n in gpu.counts.items()} == {"done": 0, "graphs": 4, "waits": 4}


def test_memory_comes_back(gpu: FakeGpu) -> None:
    device = CudaDevice("cuda", gpus.CupyRuntime)
    engine = Engine(tiny.model("llama", "q8_0"), device)
    seen = []
    for _ in range(4):
        with Session(engine, context=256) as session:
            session.eval(PROMPT)
            for token in TOKENS[:4]:
                session.eval([token])
        del session
        gc.collect()
        seen.append(gpu.taken["device"])
    assert seen[1] == seen[2] == seen[3] > 0
    del engine, device
    gc.collect()
    assert gpu.taken == {"device": 0, "pinned": 0}


def test_out_of_memory_and_on(compiler: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the weights: the device works on."""
    gpu = installed(FakeGpu(compiler, memory_bytes=400_000), monkeypatch)
    device: Any = CudaDevice("cuda", gpus.CupyRuntime)
    with pytest.raises(OutOfMemoryError, match=r"wanted \d MiB on Fake GPU; 0 of 0 MiB are free; .*--gpu-layers"):
        session_on(device).eval(PROMPT)
    memory = device.runtime.take(1000)
    device.runtime.write(memory.address, np.arange(9))
    np.testing.assert_array_equal(device.runtime.read([(memory.address, 72)])[0].view(np.int64), np.arange(9))
    assert device.free_bytes() == 400_000 - gpu.taken["device"]


def test_what_another_thread_does_is_not_recorded(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a new session are cleared once, not whenever a step is replayed that another thread recorded meanwhile."""
    runtime, threads = gpus.CupyRuntime(), []
    memory, start = runtime.take(64), runtime.start

    def started(mirror: Mirror, launches: Sequence[LaunchOf]) -> None:
        if runtime.stream.recording is not None:
            threads.append(threading.Thread(target=runtime.clear, args=(memory.address, 64)))
            threads[-1].start()
            threads[-1].join(0.2)
        start(mirror, launches)

    monkeypatch.setattr(runtime, "start", started)
    run = runtime.recorded(runtime.mirror(64), [])
    for _ in range(2):
        run()
    threads[0].join()
    runtime.write(memory.address, np.ones(64, np.uint8))
    run()
    assert len(threads) == 1 and gpu.counts["graphs"] == 2
    np.testing.assert_array_equal(runtime.read([(memory.address, 64)])[0], np.ones(64, np.uint8))


def test_shared_memory_of_both_kinds_is_asked_for(gpu: FakeGpu) -> None:
    """Static and dynamic together may be 48 KiB; of more the driver has to be told."""
    runtime = gpus.CupyRuntime()
    memory = runtime.take(4)
    number = runtime.kernels({"k": source("int* x", "atomicAdd(x, 1);")})["k"]
    args = np.array([memory.address], np.int64)
    launches = [LaunchOf(number, 1, 32, size_bytes, args) for size_bytes in (0, 44 << 10, 46_080, 50 << 10, 46_080)]
    runtime.clear(memory.address, 4)
    runtime.recorded(runtime.mirror(64), launches)()
    assert runtime.read([(memory.address, 4)])[0].view(np.int32).tolist() == [5 * 32]


def test_what_the_gpu_refuses_is_a_sentence(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a step that could not be recorded is, the next time."""
    runtime = gpus.CupyRuntime()
    run, copy = runtime.recorded(runtime.mirror(64), []), gpu.module.cuda.runtime.memcpyAsync
    run()

    def refused(*_: int) -> None:
        raise CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    monkeypatch.setattr(gpu.module.cuda.runtime, "memcpyAsync", refused)
    with pytest.raises(KernelError, match=r"\[cuda\] wanted Fake GPU to go on; got cudaErrorIllegalAddress.*; the backend cpu"):
        run()
    assert runtime.stream.recording is None
    monkeypatch.setattr(gpu.module.cuda.runtime, "memcpyAsync", copy)
    run()
    assert gpu.counts["graphs"] == 1


def test_a_gpu_that_is_too_old(compiler: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(FakeGpu(compiler, capability=(7, 5)), monkeypatch)
    with pytest.raises(UnsupportedError, match=r"wanted a GPU of compute capability 8.0 or newer; Fake GPU has 7.5"):
        gpus.CupyRuntime()
