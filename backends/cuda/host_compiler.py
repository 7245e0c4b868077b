"""CUDA sources to code for this processor: built by g++ with `host.hpp` before them, run by `host_runtime.cpp`.

Both become shared libraries in a folder of this user's cache, named by what they were made of, so that each is built once.
Kernels that are missing at the same time are built several at a time, each in its own namespace, which takes a fifth of the
time; the library then has one name for each. Of those that g++ refuses together each is tried alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tensorgraph.backends.cpu.code_cache import DAY_S, default_folder, is_private
from tensorgraph.backends.cpu.target import host
from tensorgraph.errors import KernelError, UnsupportedError

HERE = Path(__file__).parent
HEADER = HERE / "host.hpp"
RUNTIME = tuple(HERE / f"host_{name}" for name in ("runtime.cpp", "operations.hpp", "signals.hpp", "fibers.hpp"))
# Wrapping integers and accesses through any type are what a device does; products are fused in fmaf alone. A library's own
# functions come first, since other kernels have functions of the same names.
FLAGS = (
    "-x c++ -std=c++17 -w -fPIC -shared -fwrapv -fno-strict-aliasing -ffp-contract=off -fno-math-errno -fno-gnu-unique "
    "-fno-semantic-interposition -Wl,-Bsymbolic"
).split()
OPTIMISE = "-O1"  # -O0 builds no faster, -O2 runs no faster
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
AT_ONCE = 2  # processes of g++
TOGETHER = 12  # kernels of one process at most: the static shared memory of all is filled before a block of any
KEPT_S = 60 * DAY_S
LIMIT_S = 120
"""Processor time of a launch after which it is taken not to end."""
MISSING = "[cuda-host] wanted g++ on Linux, which builds kernels for the processor; found none; `apt-get install g++` installs it"
_MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", re.MULTILINE)
_running = threading.Lock()  # the runtime holds the state of one launch


class HostCompiler:
    """Builds kernels for this processor and runs them, one launch at a time.

    Attributes:
        compiled: how many kernels g++ was run for.
        launched: the addresses of kernels that ran in this process, whoever built them.
        runtime: the library that runs them.

    Raises: UnsupportedError without g++; KernelError where it cannot build the runtime.
    """

    launched: ClassVar[set[int]] = set()

    def __init__(self, sanitize: bool = False) -> None:
        found = shutil.which("g++")
        if found is None or sys.platform != "linux":
            raise UnsupportedError(MISSING)
        self.compiled = 0
        processor = ["-mfma"] if host().family == "x86_64" and "fma" in host().has else []
        self._command = [found, *FLAGS, *processor, *(SANITIZE if sanitize else ()), "-include", str(HEADER)]
        self._libraries = [] if sanitize else ["-nostdlib", "-lm", "-lc", "-lgcc"]  # looking for fewer halves the time of a link
        parts = [_answer(found, "--version"), *self._command[:-1], OPTIMISE, *self._libraries]
        self._version = "\0".join(parts).encode() + HEADER.read_bytes()
        self._folder, self._own_folder = _cache_folder()
        self.runtime = self._load_runtime()
        self._launch = ctypes.CDLL(str(self.runtime)).tg_launch
        self._launch.restype = ctypes.c_char_p
        numbers = [*[ctypes.c_uint] * 6, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_uint]
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *numbers]
        self._addresses: dict[str, int] = {}

    def load(self, sources: Mapping[str, str], prelude: str = "") -> dict[str, int]:
        """The address of each kernel's `NAME__host`, which its source defines beside it with one parameter, `const long long*`.

        `prelude` goes before each source, and is read once for several of them.

        Raises: KernelError, which says for each source that g++ refuses why.
        """
        paths = {name: self._path_of(name, prelude, source) for name, source in sources.items()}
        missing = [name for name in sources if str(paths[name]) not in self._addresses and not _touch(paths[name])]
        count = max(min(AT_ONCE, len(missing)), -(-len(missing) // TOGETHER))

        def build(names: Sequence[str]) -> str:
            text = _unit({name: sources[name] for name in names}, prelude)
            return self._build(text, [paths[name] for name in names], " ".join(names))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            together = [missing[first::count] for first in range(count)]
            refused = [(names, said) for names, said in zip(together, pool.map(build, together), strict=True) if said]
            failed = [said for names, said in refused if len(names) == 1]
            failed += filter(None, pool.map(build, [[name] for names, _ in refused if len(names) > 1 for name in names]))
        self.compiled += len(missing)
        if failed:
            raise KernelError("[cuda-host] wanted sources that g++ takes; got\n" + "\n".join(failed))
        for name, path in paths.items():
            if str(path) not in self._addresses:
                self._addresses[str(path)] = _entry(path, name)
        return {name: self._addresses[str(path)] for name, path in paths.items()}

    def launch(
        self,
        address: int,
        args: NDArray[np.int64] | Sequence[int],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        schedule: int = 0,
        seconds: int = LIMIT_S,
    ) -> None:
        """Run a kernel of `load` to its end, its threads in the order of `schedule`: 0 forward, 1 backward, others random.

        Raises: KernelError, with what a GPU would leave undefined and which thread of which block did it, or that it has taken
            so many seconds of processor time.
        """
        self.launched.add(address)
        packed = np.asarray(args, np.int64).tobytes()  # an array's address takes longer to ask for
        with _running:
            text = self._launch(address, packed, *grid, *block, shared_bytes, schedule, seconds)
        if text is not None:
            raise KernelError(text.decode())

    def _load_runtime(self) -> Path:
        source, *_ = RUNTIME
        key = hashlib.sha256(self._version + b"".join(part.read_bytes() for part in RUNTIME)).hexdigest()
        path = self._folder / f"libtg-{key}.so"
        if not _touch(path):
            # Kernels name it by its soname alone and look for it beside themselves: the folder may move.
            options = ["-O3", "-DTG_RUNTIME", f"-Wl,-soname,{path.name}", str(source), "-lm"]
            if said := self._run(options, "", [path], source.name):
                raise KernelError("[cuda-host] wanted a g++ that builds the runtime; got\n" + said)
        return path

    def _path_of(self, name: str, *text: str) -> Path:
        key = self._version + "\0".join([self.runtime.name, name, *text]).encode()
        return self._folder / f"{hashlib.sha256(key).hexdigest()}.so"

    def _build(self, text: str, paths: Sequence[Path], name: str) -> str:
        libraries = ["-x", "none", str(self.runtime), "-Wl,-rpath,$ORIGIN", *self._libraries]
        return self._run([OPTIMISE, "-", *libraries], text, paths, name)

    def _run(self, options: list[str], text: str, paths: Sequence[Path], name: str) -> str:
        """Build a library with these names; what g++ says where it fails, else an empty text."""
        descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=".", suffix=".so")
        os.close(descriptor)
        try:
            command = [*self._command, *options, "-o", temporary]
            done = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", errors="replace")
            if done.returncode == 0:
                for path in paths:
                    _name(temporary, path)
                return ""
            lines = done.stderr.splitlines()
            first = next((number for number, line in enumerate(lines) if "error" in line), 0)
            return f"{name}: " + "\n".join(lines[first : first + 8] or [f"exit status {done.returncode}"])
        finally:
            os.unlink(temporary)


def _name(temporary: str, path: Path) -> None:
    """Give a file one more name, unless another process was first; a copy of it where files have one name each."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        shutil.copyfile(temporary, f"{temporary}.copy")
        os.replace(f"{temporary}.copy", path)


def sanitizer_environment() -> dict[str, str]:
    """Environment variables of a process that uses `HostCompiler(sanitize=True)`: the sanitizers must be there before Python is.

    Raises: UnsupportedError without g++.
    """
    found = shutil.which("g++")
    if found is None:
        raise UnsupportedError(MISSING)
    libraries = [_answer(found, f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def _unit(sources: Mapping[str, str], prelude: str) -> str:
    """One text of several sources that do not see each other: names are in namespaces, and macros end with their source."""
    parts = [f'# 1 "prelude.cuh"\n{prelude}\n']
    for name, source in sources.items():
        text = f'# 1 "{name}.cu"\n{source}\n'
        if len(sources) > 1:
            macros = sorted(set(_MACRO.findall(source)) - _header_macros())
            text = "\n".join([f"namespace tg_{name} {{", text, "}", *(f"#undef {macro}" for macro in macros), ""])
        parts.append(text)
    return "".join(parts)


@cache
def _header_macros() -> frozenset[str]:
    return frozenset(_MACRO.findall(HEADER.read_text("utf-8")))


@cache
def _answer(compiler: str, question: str) -> str:
    return subprocess.run([compiler, question], capture_output=True, text=True, errors="replace").stdout


def _cache_folder() -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The folder of libraries, without those that nobody used for long; one for this process where the user has none."""
    folder = default_folder("cuda-host")
    if folder is None or not is_private(folder, "cuda-host"):
        own = tempfile.TemporaryDirectory(prefix="tensorgraph-cuda-host-")
        return Path(own.name), own
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > KEPT_S:
                    os.unlink(entry.path)
    return folder, None


def _touch(path: Path) -> bool:
    """Whether a file is there, whose time becomes that of its last use."""
    try:
        if time.time() - path.stat().st_mtime > DAY_S:
            os.utime(path)
    except OSError:
        return False
    return True


def _entry(path: Path, name: str) -> int:
    try:
        entry = ctypes.CDLL(str(path))[f"{name}__host"]
    except (OSError, AttributeError) as error:
        raise KernelError(f"[cuda-host] wanted a library with {name}__host; got {error}") from None
    return ctypes.cast(entry, ctypes.c_void_p).value or 0
