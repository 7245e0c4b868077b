"""The CPU device: native kernels, one arena, and programs that the executor walks."""

from __future__ import annotations

import mmap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tensorgraph import registry
from tensorgraph.backends.cpu.code_cache import CodeCache, default_folder
from tensorgraph.backends.cpu.constants import ConstantMemory, Held, aligned, forget
from tensorgraph.backends.cpu.executor import Executor, ThreadCounters, usable_cores
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.kernel import Call, Kernel, code_of
from tensorgraph.backends.cpu.kernel_device import KernelDevice, held_array
from tensorgraph.backends.cpu.measured import all_kept
from tensorgraph.backends.cpu.packing import Packing
from tensorgraph.backends.cpu.program import Program, Recipe, write_kernel
from tensorgraph.backends.cpu.recipes import Entry, keys_of, read_entry
from tensorgraph.backends.cpu.target import Target, find_target, host
from tensorgraph.backends.cpu.weights import LAYOUTS, pack, unpack
from tensorgraph.compiler import PlanCache
from tensorgraph.device import Part, Run, Values
from tensorgraph.dtypes import DType
from tensorgraph.errors import InputError
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.state import Layout, StateSpec

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.packed_file import PackedFile

Threads = int | Literal["auto"]
Note = Callable[[Sequence[Call], Mapping[str, int], np.ndarray, float], None]
"""`note(calls, dims, seconds, spent_s)` of a run: seconds of each call [n]; seconds of all, taking the times among them."""


class Code:
    """Kernels of one target, compiled once a process and shared by its devices."""

    def __init__(self, target: Target) -> None:
        folder = default_folder()
        self.target = target
        self.jit = Jit(target, CodeCache(folder) if folder else None)
        self._addresses: dict[Recipe, int] = {}
        self.executor = Executor(self.jit)
        self.packing = Packing(self.executor)
        self.jit.before_fork = self._be_alone
        self._threads: Threads = "auto"

    def kernels(self, recipes: Sequence[Recipe]) -> list[int]:
        """The addresses of kernels: those that are not on disk are written and compiled."""
        missing = [recipe for recipe in dict.fromkeys(recipes) if recipe not in self._addresses]
        if missing:
            with self.executor.lock:
                self._make(missing)
        return [self._addresses[recipe] for recipe in recipes]

    def _make(self, recipes: Sequence[Recipe]) -> None:
        disk = self.jit.cache
        keys = keys_of(recipes, self.jit.key_of("")) if disk is not None else {}
        if disk is not None:
            entries = {recipe: entry for recipe, key in keys.items() if (entry := read_entry(disk.get(key)))}
            addresses = self.jit.known([entry.object_key for entry in entries.values()])
            for (recipe, entry), address in zip(entries.items(), addresses, strict=True):
                if address is not None:
                    for message in entry.messages:
                        code_of(message)
                    self._addresses[recipe] = address
        kernels = {recipe: Kernel(self.target) for recipe in recipes if recipe not in self._addresses}
        texts = [write_kernel(kernel, recipe) for recipe, kernel in kernels.items()]
        self._addresses.update(zip(kernels, self.jit.compile(texts), strict=True))
        for (recipe, kernel), text in zip(kernels.items(), texts, strict=True):
            if disk is not None and recipe in keys:
                disk.put(keys[recipe], Entry(self.jit.key_of(text), kernel.messages).content())

    def _be_alone(self) -> None:
        """End all threads: no process is forked while some run. They come back with the next run."""
        self.packing.settle()
        self.executor.close()

    def run(self, threads: Threads, table: int, n_steps: int) -> list[int] | None:
        """Walk a table with so many threads; what a kernel that refused its input left, code and details."""
        with self.executor.lock:  # threads are numbered below what the caller made room for
            self._prepare(threads)
            return self.executor.run(table, n_steps)

    def profile(self, threads: Threads, table: int, n_steps: int) -> tuple[np.ndarray, list[int] | None]:
        """`run`, and the seconds of each step before what it gives."""
        with self.executor.lock:
            self._prepare(threads)
            return self.executor.profile(table, n_steps), self.executor.status

    def _prepare(self, threads: Threads) -> None:
        if threads != self._threads:
            self.executor.set_threads(threads)
            self._threads = threads
        if not self.packing.idle:
            self.packing.settle()


@cache
def code_for(target: Target) -> Code:
    return Code(target)


class CpuDevice(KernelDevice):
    """This machine's processor. `cpu` makes code for it as it is, `cpu:avx2` (or another target's name) for less."""

    family = "cpu"
    weight_layouts = LAYOUTS

    def __init__(self, name: str = "cpu") -> None:
        super().__init__()
        self.name = name
        wanted = name.partition(":")[2]
        self.target = find_target(wanted) if wanted else host()
        self.code = code_for(self.target)
        self.threads: Threads = "auto"
        self.arena = aligned(0)
        self.constants, self.dense = ConstantMemory(), ConstantMemory()  # apart: who first touches a large page clears it
        self.scratch, self.scratch_stride = aligned(0), np.zeros(1, np.int64)
        self.version = 0  # how often memory has moved, or the number of threads changed
        self.note: Note | None = None
        self.packed: dict[mmap.mmap | None, PackedFile] = {}  # by the mapped file of the arrays that constants are made of

    @property
    def key(self) -> str:
        return f"{self.name}|{self.target.key}"

    def set_threads(self, threads: Threads) -> None:
        with self.lock, self.code.executor.lock:
            self._before_a_move()
            self.threads = threads
            self.require(0, 0)

    def stream_layout(self, spec: StateSpec, users: Sequence[tuple[Node, str]]) -> Layout:
        able = [self.reads(user, slot) for user, slot in users]
        layouts: tuple[Layout, ...] = get_args(Layout)
        return next((layout for layout in layouts[1:] if able and all(layout in each for each in able)), "rows")

    def upload(self, array: np.ndarray, dtype: DType, *, constant: bool = False, layout: str = "dense") -> Any:
        if constant:
            return pack(array, dtype, layout, self) if layout != "dense" else self._hold(array, dtype)
        return np.ascontiguousarray(held_array(array, dtype))

    def plan_cache(self) -> PlanCache:
        """Plans, on disk where code is."""
        from tensorgraph.backends.cpu.kept_plans import KeptPlans

        disk = self.code.jit.cache
        return KeptPlans(disk, self._measured) if disk is not None else PlanCache()

    def _measured(self, graph: Graph) -> str:
        """What was measured of this machine, where the plan of a graph depends on it."""
        readers = [n for n in graph if n.op not in STRUCTURAL and any(i.base.op in ("append", "read") for i in n.inputs)]
        kernels = {node: registry.ops.get(node.op).kernel("cpu") for node in readers}  # these are asked for layouts at any start
        return all_kept(self.target) if any(kernel and kernel.measures(node) for node, kernel in kernels.items()) else ""

    def keep_packed(self, path: Path, content: mmap.mmap, head_bytes: int, folder: Path | None) -> Callable[[], None]:
        """Take packed constants from disk that an earlier start left there of a mapped model file; what is given keeps those of
        this one. `head_bytes` lie before the file's tensors; `folder` is the user's own cache folder where None."""
        from tensorgraph.backends.cpu.packed_file import PackedFile

        folder = folder or default_folder("packed")
        if folder is None:
            warnings.warn("[packed cache] there is no cache folder for it: no home", RuntimeWarning, stacklevel=2)
            return lambda: None
        kept = self.packed[content] = PackedFile(path, content, head_bytes, folder)

        def save() -> None:
            self.settle()
            kept.save()

        return save

    def _hold(self, array: np.ndarray, dtype: DType) -> Held:
        value = held_array(array, dtype)
        held = self.dense.take(value.nbytes)
        np.ndarray(value.shape, value.dtype, held)[...] = value
        forget(array)  # weights are held once
        return Held(held, "dense", value.shape, value.dtype)

    def download(self, value: Any, dtype: DType) -> np.ndarray:
        if isinstance(value, Held):
            value = value.array() if value.layout == "dense" else unpack(value, dtype, self)
        return np.array(value, np.float32 if dtype.is_block else dtype.numpy, order="C")

    def compile(self, part: Part) -> Callable[[Values, Run], None]:
        return Program(self, part)

    # What programs ask for.

    def kernels(self, recipes: Sequence[Recipe]) -> list[int]:
        """The addresses of kernels."""
        with self.lock:
            return self.code.kernels(recipes)

    def settle(self) -> None:
        """Return when all constants are written."""
        with self.code.executor.lock:
            self.code.packing.settle()

    def require(self, arena_bytes: int, scratch_bytes: int) -> None:
        """Make room in the arena and in each thread's scratch; what is there may move."""
        with self.lock, self.code.executor.lock:
            if arena_bytes > len(self.arena):
                self._before_a_move()
                self.arena = aligned(arena_bytes)
            stride = -(-scratch_bytes // 64) * 64
            n_threads = usable_cores() if self.threads == "auto" else self.threads
            wanted = max(stride, int(self.scratch_stride[0])) * n_threads
            if wanted > len(self.scratch) or stride > self.scratch_stride[0]:
                self._before_a_move()
                self.scratch_stride[0] = max(stride, int(self.scratch_stride[0]))
                self.scratch = aligned(wanted)

    def fill_arena(self, n_bytes: int, value: int) -> bool:
        """Fill the arena's beginning, for checks of what is written where; False where there is no room yet."""
        self.arena[:n_bytes] = value
        return n_bytes <= len(self.arena)

    def arena_bytes(self, n_bytes: int) -> np.ndarray:
        """The arena's beginning."""
        return self.arena[:n_bytes]

    def _before_a_move(self) -> None:
        """Whoever writes to memory looks first whether it is still there: told before it goes, since Ctrl-C may come between."""
        self.code.executor.halt()
        self.version += 1

    def run(self, table: tuple[np.ndarray, int], messages: Mapping[int, str]) -> None:
        """Walk a table of steps, given with its address.

        Raises: InputError: a kernel refused its input.
        """
        self.refuse(self.code.run(self.threads, table[1], len(table[0])), messages)

    def refuse(self, status: Sequence[int] | None, messages: Mapping[int, str]) -> None:
        """Say what kernels left, if they left anything.

        Raises: InputError.
        """
        if status:
            code, *values = status
            raise InputError(messages[code].format(*values))

    @contextmanager
    def profiling(self, note: Note) -> Iterator[None]:
        """Until the block ends, `note` is told how long each call of each run took."""
        before = self.note
        try:
            self.note = note
            self.code.executor.halt()
            yield
        finally:
            self.note = before
            self.code.executor.halt()

    def thread_counters(self) -> list[ThreadCounters]:
        """What each thread has done in all runs that were profiled, the calling one first."""
        return self.code.executor.profile_counters()

    def profile(
        self, table: tuple[np.ndarray, int], messages: Mapping[int, str], calls: Sequence[Call], dims: Mapping[str, int]
    ) -> None:
        """`run` a table of these calls, and tell `note`."""
        began = time.perf_counter()
        seconds, refused = self.code.profile(self.threads, table[1], len(table[0]))
        spent_s = time.perf_counter() - began
        self.refuse(refused, messages)
        if self.note is not None:
            self.note(calls, dims, seconds, spent_s)
