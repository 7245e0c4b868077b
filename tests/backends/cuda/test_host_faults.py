"""What is wrong with a kernel is said and ends neither the process nor later launches; and how libraries are built and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.backends.cuda import host_compiler
from tensorgraph.backends.cuda.host_compiler import HostCompiler, sanitizer_environment
from tensorgraph.errors import KernelError, UnsupportedError
from tests.backends.cuda.hosted import run, source

STUCK = "every lane of a mask at the same operation and line; got none of 64 threads that can go on: "
ONE = "one barrier for the whole block; got __syncthreads of line "
FAULTS = {
    "lanes returned": (
        "if (t >= 50) return; x[t] = __shfl_sync(~0u, t, 0);",
        STUCK + "0-31 returned, 32-49 at __shfl_sync of line 2 with mask 0xffffffff, 50-63 returned; in block (0, 0, 0)",
    ),
    "lanes elsewhere": (
        "if (t < 40) __syncthreads();\nelse x[t] = __any_sync(~0u, t);",
        STUCK + "0-39 at __syncthreads of line 2, 40-63 at __any_sync of line 3 with mask 0xffffffff; in block (0, 0, 0)",
    ),
    "other operations": (
        "if (t & 1) __syncwarp(); else x[t] = __ballot_sync(~0u, t);",
        STUCK + "0 at __ballot_sync of line 2 with mask 0xffffffff, 1 at __syncwarp of line 2 with mask 0xffffffff, 2 at ",
    ),
    "other lines": (
        "if (t < 16) x[t] = __shfl_sync(~0u, t, 0);\nelse x[t] = __shfl_sync(~0u, t, 0);",
        STUCK + "0-15 at __shfl_sync of line 2 with mask 0xffffffff, 16-31 at __shfl_sync of line 3 with mask 0xffffffff, ",
    ),
    "other masks": (
        "x[t] = __shfl_xor_sync(t % 32 < 16 ? ~0u : 0xffff8000u, t, 1);",
        STUCK
        + "0-15 at __shfl_xor_sync of line 2 with mask 0xffffffff, 16-31 at __shfl_xor_sync of line 2 with mask 0xffff8000, ",
    ),
    "a lane outside of its mask": (
        "if (t == 17) __syncwarp(0xffff);",
        "a mask that names its own lane at __syncwarp of line 2; got 0x0000ffff; in thread (17, 0, 0) of block (0, 0, 0)",
    ),
    "two barriers": (
        "if (t < 16) __syncthreads();\nelse __syncthreads();",
        ONE + "3 while 16 threads wait at __syncthreads of line 2; in thread (16, 0, 0) of block (0, 0, 0)",
    ),
    "more barriers for some": (
        "for (int i = 0; i < 1 + t / 32; i++) __syncthreads();\n__syncthreads();",
        ONE + "2 while 32 threads wait at __syncthreads of line 3; in thread (32, 0, 0) of block (0, 0, 0)",
    ),
    "a width": ("x[t] = __shfl_sync(~0u, t, 0, 12);", "a width of 1, 2, 4, 8, 16 or 32 at __shfl_sync of line 2; got 12; in"),
    "a matrix askew": (
        "__shared__ __align__(16) char m[999]; unsigned r[4]; tg_ldmatrix_x4(r, m + 16 * t + t / 9);",
        "a multiple of 16 at tg_ldmatrix_x4 of line 2; got 0x",
    ),
    "a copy askew": (
        "__shared__ __align__(16) char m[64]; tg_cp_async16(m + t, x);",
        "a multiple of 16 at tg_cp_async16 of line 2",
    ),
    "a null pointer": (
        "if (t == 9) ((int*)(x[0] * 0LL))[3] = 1;",
        "addresses within buffers; got 0xc; in thread (9, 0, 0) of block",
    ),
    "a divisor": ("x[t] = 7 % (x[t] & 0);", "a divisor other than 0; got 0; in thread (0, 0, 0) of block (0, 0, 0)"),
    "much stack": (
        "volatile char deep[80000]; for (int i = 0; i < 80000; i++) deep[79999 - i] = 1; x[t] = deep[t];",
        "variables within 60 KiB of stack; got more",
    ),
    "a trap": ("if (t == 3) __trap();", "no __trap; got that of line 2; in thread (3, 0, 0) of block (0, 0, 0)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said_and_the_next_launch_runs(compiler: HostCompiler, fault: str) -> None:
    body, message = FAULTS[fault]
    x = np.zeros(64, np.int32)
    for schedule in (0, 1, 5):
        with pytest.raises(KernelError) as caught:
            run(compiler, "int* x", "int t = threadIdx.x; " + body, x, grid=(2, 1, 1), block=(64, 1, 1), schedule=schedule)
        if schedule == 0:  # others meet the fault elsewhere
            assert str(caught.value).startswith("[k] wanted " + message)
    run(compiler, "int* x", "x[threadIdx.x] = __shfl_sync(~0u, threadIdx.x, 5); __syncthreads();", x, block=(64, 1, 1))
    assert x.tolist() == [5] * 32 + [37] * 32


@pytest.mark.parametrize("body", ["for (;;) __syncthreads();", "while (((volatile int*)x)[0] == 0);"])
def test_a_kernel_that_does_not_end(compiler: HostCompiler, body: str) -> None:
    x = np.zeros(64, np.int32)
    with pytest.raises(KernelError, match=r"\[k\] wanted an end within 1 s of processor time; got none; in thread \("):
        run(compiler, "int* x", body, x, block=(64, 1, 1), seconds=1)
    run(compiler, "int* x", "x[threadIdx.x] = threadIdx.x; __syncthreads();", x, block=(64, 1, 1), seconds=1)
    assert x.tolist() == list(range(64))


@pytest.mark.parametrize(
    "grid, block, shared_bytes, message",
    [
        ((1, 1, 1), (1025, 1, 1), 0, "a block of 1 to 1024 threads"),
        ((1, 1, 1), (32, 0, 1), 0, "a block of 1 to 1024 threads"),
        ((0, 1, 1), (32, 1, 1), 0, "a grid of 1 to"),
        ((1, 65536, 1), (32, 1, 1), 0, "a grid of 1 to"),
        ((1, 1, 1), (32, 1, 1), 232449, "at most 232448 bytes"),
    ],
)
def test_launches_that_no_gpu_takes(
    compiler: HostCompiler, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        run(compiler, "int* x", "", 0, grid=grid, block=block, shared_bytes=shared_bytes)


def test_without_gxx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"wanted g\+\+ .*; found none; `apt-get install g\+\+` installs it"):
        HostCompiler()


@pytest.fixture
def fresh(compiler: HostCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostCompiler:
    """One with an empty folder, but for the runtime, which takes long to build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "tensorgraph" / "cuda-host"
    folder.mkdir(mode=0o700, parents=True)
    shutil.copy(compiler.runtime, folder)
    return HostCompiler()


def test_kernels_built_together_do_not_see_each_other(fresh: HostCompiler) -> None:
    prelude = "#ifndef PRELUDE\n#define PRELUDE\n__device__ int base() { return 1000; }\n#endif\n"
    sources = {}
    for number in range(5):
        macros = f"#ifndef WIDTH\n#define WIDTH {number}\n#endif\n#define  MORE(x) (x + {number})\n"
        functions = f"struct S {{ int v[{number + 1}]; }};\ntemplate <int N> __device__ int own() {{ return N + sizeof(S); }}\n"
        kernel = source("int* x", "x[0] = base() + own<WIDTH>() + MORE(100);", f"k{number}")
        sources[f"k{number}"] = macros + functions + kernel
    addresses = fresh.load(sources, prelude)
    assert fresh.compiled == 5 and len({path.stat().st_ino for path in fresh.runtime.parent.glob("[!l]*.so")}) == 2
    again = HostCompiler()
    assert again.load(sources, prelude) == addresses and again.compiled == 0
    for number in range(5):
        x = np.zeros(1, np.int32)
        fresh.launch(addresses[f"k{number}"], [x.ctypes.data], (1, 1, 1), (1, 1, 1), 0)
        assert x[0] == 1000 + number + 4 * (number + 1) + 100 + number


def test_of_sources_built_together_those_that_are_wrong_are_named(fresh: HostCompiler) -> None:
    sources = {f"k{number}": source("int* x", "x[0] = 1;", f"k{number}") for number in range(6)}
    wrong = sources | {"k4": source("int* x", "int t = 0;\nx[0] = nothing;", "k4")}
    with pytest.raises(KernelError) as caught:
        fresh.load(wrong)
    assert str(caught.value).splitlines()[1].startswith("k4: k4.cu:3:8: error: ")
    assert not any(f"k{number}:" in str(caught.value) for number in (0, 1, 2, 3, 5))
    again = HostCompiler()
    again.load(sources)
    assert again.compiled == 1


def test_a_source_without_its_entry(compiler: HostCompiler) -> None:
    with pytest.raises(KernelError, match="wanted a library with absent__host; got"):
        compiler.load({"absent": source("int* x", "", "present")})


def test_fibers_of_other_processors(compiler: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_compiler, "FLAGS", [*host_compiler.FLAGS, "-DTG_UCONTEXT"])
    portable = HostCompiler()
    assert portable.runtime != compiler.runtime
    x = np.zeros(64, np.int32)
    body = """int t = threadIdx.x, other;
    x[t] = __shfl_xor_sync(~0u, t, 1);
    __syncthreads();
    other = x[63 - t];
    __syncthreads();
    x[t] = other;"""
    for schedule in (0, 1, 2):
        run(portable, "int* x", body, x, grid=(3, 1, 1), block=(64, 1, 1), schedule=schedule)
        assert np.array_equal(x, (63 - np.arange(64)) ^ 1)
    with pytest.raises(KernelError, match="17-31 returned"):
        run(portable, "int* x", "if (threadIdx.x < 17) __syncwarp();", x)


SANITIZED = """
import numpy as np
from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tests.backends.cuda.hosted import run
x = np.zeros(64, np.int32)
for schedule in (0, 1, 5):
    body = "__shared__ int s[64]; int t = threadIdx.x; s[t] = t; __syncthreads(); x[t] = s[(t + 1) % 64 + (t == 62) * more];"
    run(HostCompiler(sanitize=True), "int* x, long long more", body, x, {more}, block=(64, 1, 1), schedule=schedule)
    print(x.sum())
"""


@pytest.mark.deep
@pytest.mark.parametrize("more, said", [(0, "2016\n2016\n2016\n"), (1, "index 64 out of bounds for type 'int [64]'")])
def test_sanitizers_see_fibers(compiler: HostCompiler, more: int, said: str) -> None:
    environment = os.environ | sanitizer_environment()
    command = [sys.executable, "-c", SANITIZED.format(more=more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (more == 0)
