"""LLVM IR text to addresses: compiled once per text, target and version of LLVM, kept on disk, loaded into this process.

Texts come out of an emitter that already unrolled, blocked and vectorised, so none of LLVM's IR passes run, only its code
generator. That aborts the process when it meets an intrinsic that its target lacks, so it runs in forked children, side by side,
wherever this process has no other threads. Code is loaded by ORC with JITLink, which refuses what it cannot resolve instead of
aborting, and puts all of a text's sections within reach of each other: hence the small code model.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import llvmlite
import llvmlite.binding as llvm

from tensorgraph.backends.cpu.code_cache import CodeCache
from tensorgraph.backends.cpu.forked import Outcome, can_fork, run_forked, run_here
from tensorgraph.backends.cpu.target import Target, can_run, host
from tensorgraph.errors import KernelError

FORMAT = 4  # of an object and its symbol: one more whenever the same text may come out differently
_KERNEL = re.compile(r"@kernel(?![\w.$-])")
_NAME = re.compile(rb"\0([A-Za-z_]\w{2,})(?=\0)")  # in an object's table of strings


@dataclass
class Stats:
    """What a Jit has done so far: texts compiled, objects found on disk, seconds spent waiting for the compiler."""

    compiled: int = 0
    from_disk: int = 0
    compile_s: float = 0.0


class Jit:
    """Compiles and loads LLVM IR for one target; what it loaded lives as long as it does.

    Each text is a module that defines one external function `@kernel`, beside private constants and internal functions, and may
    declare functions of the C library.

    Attributes:
        before_fork: ends this process's other threads, as far as it can, before children are forked.
    """

    def __init__(self, target: Target, cache: CodeCache | None, level: int = 1) -> None:
        self.target, self.cache, self.level, self.stats = target, cache, level, Stats()
        self.before_fork: Callable[[], None] = lambda: None
        version = ".".join(map(str, llvm.llvm_version_info))
        self._key = f"{FORMAT}|{target.key}|{level}|{version}|{llvmlite.__version__}|"
        self._machine = _target_machine(target, level)
        layout = f'target datalayout = "{self._machine.target_data}"'
        self._header = f'{layout} target triple = "{target.triple}" '  # on a text's first line, so that errors count lines right
        self._engine: llvm.LLJIT | None = None
        self._libraries: list[llvm.ResourceTracker] = []  # code is unloaded with the last reference to these
        self._links = 0  # tried so far: a library's name cannot be used twice
        self._addresses: dict[str, int] = {}
        self._lock = threading.RLock()

    def compile(self, texts: Sequence[str]) -> list[int]:
        """The address of each text's kernel: the same for the same text.

        Raises: KernelError, which names every text that could not be compiled or loaded; the others are compiled and kept.
        """
        if not can_run(self.target):
            got = f"{self.target.name!r} ({self.target.triple})"
            raise KernelError(f"[jit] wanted a target that this machine can run; got {got}")
        with self._lock:
            keys = [self.key_of(text) for text in texts]
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._addresses}
            objects, failed = self._find_objects(missing)
            failed |= self._load(objects)
            if failed:
                raise self._failure(failed, missing)
            return [self._addresses[key] for key in keys]

    def known(self, keys: Sequence[str]) -> list[int | None]:
        """The addresses of the kernels of texts with these keys, None where there is none yet, on disk either."""
        with self._lock:
            wanted = [key for key in dict.fromkeys(keys) if key not in self._addresses]
            if can_run(self.target):
                self._load(self._on_disk(wanted))
            return [self._addresses.get(key) for key in keys]

    def objects(self, texts: Sequence[str]) -> list[bytes]:
        """Each text as an object file, for any target.

        Raises: KernelError, as `compile` does.
        """
        with self._lock:
            keys = [self.key_of(text) for text in texts]
            wanted = dict(zip(keys, texts, strict=True))
            objects, failed = self._find_objects(wanted)
            if failed:
                raise self._failure(failed, wanted)
            return [objects[key] for key in keys]

    def assembly(self, text: str) -> str:
        """A text as assembly, for any target.

        Raises: KernelError, as `compile` does.
        """
        with self._lock:
            key = self.key_of(text)
            (outcome,) = self._generate({key: text}, lambda module: str(self._machine.emit_assembly(module)).encode())
            if isinstance(outcome, KernelError):
                raise self._failure({key: outcome}, {key: text})
            return outcome.decode()

    def key_of(self, text: str) -> str:
        """What objects made of a text are kept under."""
        return hashlib.sha256((self._key + text).encode()).hexdigest()

    def _find_objects(self, texts: dict[str, str]) -> tuple[dict[str, bytes], dict[str, KernelError]]:
        """Objects by key, from disk or compiled and then put there; and what went wrong with the others."""
        objects = self._on_disk(texts)
        failed: dict[str, KernelError] = {}
        missing = {key: text for key, text in texts.items() if key not in objects}
        if missing:
            begin = time.perf_counter()
            outcomes = self._generate(missing, lambda module: bytes(self._machine.emit_object(module)))
            for key, outcome in zip(missing, outcomes, strict=True):
                if isinstance(outcome, KernelError):
                    failed[key] = outcome
                    continue
                objects[key] = outcome
                self.stats.compiled += 1
                if self.cache is not None:
                    self.cache.put(key, outcome)
            self.stats.compile_s += time.perf_counter() - begin
        return objects, failed

    def _on_disk(self, keys: Iterable[str]) -> dict[str, bytes]:
        if self.cache is None:
            return {}
        objects = {key: found for key in keys if (found := self.cache.get(key)) is not None}
        self.stats.from_disk += len(objects)
        return objects

    def _generate(self, texts: dict[str, str], emit: Callable[[llvm.ModuleRef], bytes]) -> list[Outcome]:
        """What `emit` makes of each text's module, in children where that is possible."""
        jobs = [partial(self._emit, key, text, emit) for key, text in texts.items()]
        self.before_fork()
        if can_fork():
            return run_forked(jobs, [len(text) for text in texts.values()])
        return [run_here(job) for job in jobs]

    def _emit(self, key: str, text: str, emit: Callable[[llvm.ModuleRef], bytes]) -> bytes:
        _keep_order()
        try:
            module = llvm.parse_assembly(self._header + _KERNEL.sub(f"@{_symbol(key)}", text))
            external = [f.name for f in module.functions if not f.is_declaration and f.linkage == llvm.Linkage.external]
            if external != [_symbol(key)]:
                others = [name for name in external if name != _symbol(key)]
                raise KernelError(f"wanted one external function, @kernel; got {len(external)} {' '.join(others)}".rstrip())
            module.verify()
            return emit(module)
        except RuntimeError as error:
            raise KernelError(str(error).strip()) from None

    def _load(self, objects: dict[str, bytes]) -> dict[str, KernelError]:
        """Load objects and remember their addresses; what went wrong with some."""
        if not objects:
            return {}
        if self._engine is None:
            self._engine = llvm.create_lljit_compiler(self._machine, use_jit_link=True, suppress_errors=True)
        self._links += 1
        builder = llvm.JITLibraryBuilder().add_current_process()
        for key, content in objects.items():
            builder.add_object_img(content).export_symbol(_symbol(key))
        try:
            library = builder.link(self._engine, f"library {self._links}")
        except RuntimeError:
            if len(objects) == 1:
                return {key: KernelError(_unresolved(key, content)) for key, content in objects.items()}
            return {key: error for key, content in objects.items() for error in self._load({key: content}).values()}
        self._libraries.append(library)
        self._addresses.update((key, library[_symbol(key)]) for key in objects)
        return {}

    def _failure(self, failed: dict[str, KernelError], texts: dict[str, str]) -> KernelError:
        """One error that names every text that failed, and why."""
        lines = []
        for key, error in failed.items():
            first = texts[key].lstrip().partition("\n")[0]
            name = first.lstrip("; ").rstrip() if first.startswith(";") else f"a text without a name ({key[:12]})"
            lines.append(f"{name}: {error}")
        return KernelError(f"[jit] wanted code for target {self.target.name!r}; got none for " + "\n".join(lines))


def _symbol(key: str) -> str:
    return f"kernel_{key}"


def _unresolved(key: str, content: bytes) -> str:
    """Why an object could not be loaded: the names in it that this process does not have."""
    process = ctypes.CDLL(None)
    names = sorted({name.decode() for name in _NAME.findall(content)} - {_symbol(key)})
    return f"its code asks for what this process lacks: {', '.join(name for name in names if not hasattr(process, name)) or '?'}"


@cache
def _keep_order() -> None:
    """Sums stay in the order in which texts have them: as trees they would be shorter, and need more registers than there are."""
    llvm.set_option("", "-x86-machine-combiner=0")


def _target_machine(target: Target, level: int) -> llvm.TargetMachine:
    if target.family == host().family:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.initialize_native_asmparser()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(target.cpu, target.features, opt=level, reloc="pic", codemodel="small", jit=True)
