"""NVRTC by its C interface: CUDA C to machine code, without a GPU or a driver.

The library comes with CuPy's wheels on machines with a GPU (`cupy-cuda13x[ctk]`), and alone as `nvidia-cuda-nvrtc`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tensorgraph.errors import KernelError, UnsupportedError

INSTALL = "pip install 'nvidia-cuda-nvrtc==13.0.*'"
OPTIONS = ("-std=c++17", "--fmad=false", "-default-device", "--ptxas-options=-v", "--no-source-include")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a processor. Units: registers of a thread, bytes."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Compiled:
    """Machine code of some kernels, and what each takes."""

    content: bytes
    usage: dict[str, Usage]


@cache
def library() -> ctypes.CDLL:
    """NVRTC.

    Raises: UnsupportedError: it is not installed.
    """
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [path for place in places for path in sorted(Path(place).glob("*/lib/libnvrtc.so.*"))]
    for name in (*map(str, found), "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            for beside in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else ():
                ctypes.CDLL(str(beside), ctypes.RTLD_GLOBAL)  # which the other opens by its bare name
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnsupportedError(f"[cuda] wanted NVRTC, which compiles kernels; it is not installed ({INSTALL})")


def version() -> str:
    """Of the library."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_source(source: str, arch: str, options: Sequence[str] = ()) -> Compiled:
    """The machine code of kernels for an architecture such as "sm_90".

    Raises: KernelError, with the compiler's own words; UnsupportedError: there is no NVRTC.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        given = [option.encode() for option in (f"-arch={arch}", *OPTIONS, *options)]
        failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = _text(nvrtc, program, "ProgramLog").decode(errors="replace").rstrip("\0")
        if failed:
            help = "the backend cpu needs none; a report with what follows helps"
            raise KernelError(f"[cuda] a kernel does not compile for {arch}; {help}:\n{log[:4000]}")
        return Compiled(_text(nvrtc, program, "CUBIN"), _usage(log))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    found = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, found)
    return found.raw


def _usage(log: str) -> dict[str, Usage]:
    """Of each entry that the compiler's log tells of."""
    found = {}
    for part in re.split(r"(?=Compiling entry function)", log)[1:]:
        entry, frame, used, shared = (pattern.search(part) for pattern in (_ENTRY, _FRAME, _USED, _SHARED))
        if entry is not None and used is not None:
            stack, stores, loads = map(int, frame.groups()) if frame is not None else (0, 0, 0)
            found[entry[1]] = Usage(int(used[1]), int(shared[1]) if shared is not None else 0, stack, stores + loads)
    return found
