"""The function that a kernel's `emit` writes, in CUDA C: what is a vector's lane on the CPU is a thread here.

A *team* of threads (one, a warp, or a block) does what one thread does on the CPU. A vector is spread over its threads, a lane to
each; everything else is computed by all of them alike, so that branches and loops are the same for all. What a scalar store
writes is written by the first. Between an access to memory and a later one of another thread that may meet it, the team waits
(`hazards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tensorgraph.backends.cpu.emit import Loop, Values
from tensorgraph.backends.cpu.ir import I1, I64, PTR, Int, Number, Type, Value
from tensorgraph.backends.cpu.kernel import code_of
from tensorgraph.backends.cuda.hazards import Root
from tensorgraph.backends.cuda.spread import WARP, SpreadKernel, c_type, whole
from tensorgraph.errors import UnsupportedError

RESIDENT = 512
"""Threads of a kernel that a multiprocessor is to hold at least: 128 registers for each. Left free, the compiler of sm_90 stores
registers in memory to hold four times as many."""


class Param(NamedTuple):
    """A parameter of a kernel, eight bytes: what it is, and of which operand."""

    kind: str  # "address", "table", "number" (whose value is given), "extent" (whose address is), "status", "scratch", "counters"
    name: str = ""
    part: Any = None


class CudaKernel(SpreadKernel):
    """A kernel being written.

    Attributes:
        lanes: threads of a team.
        params: its parameters, in order.
    """

    def __init__(self, lanes: int, block: int, scratch_bytes: int = 0, shared: bool = True) -> None:
        super().__init__(lanes, block)
        self.params: list[Param] = []
        self.scratch_bytes, self.shared = scratch_bytes, shared
        self._is_alone = self._has_shared = False
        self.chunk, self.chunks, self.first = Value(self, "team", I64), Value(self, "teams", I64), self.const(1, I1)

    # Text.

    def source(self, name: str) -> str:
        """The kernel under a name, without the prelude."""
        listed = ", ".join(f"i64 p{i}" for i in range(len(self.params)))
        lanes, block = self.lanes, self.block
        teams = block // lanes
        lane = {1: "0", block: "(int)threadIdx.x"}.get(lanes, f"(int)(threadIdx.x % {lanes}u)")
        inside = {1: "(int)threadIdx.x", block: "0"}.get(lanes, f"(int)(threadIdx.x / {lanes}u)")
        head = [
            *self._tables,
            f'extern "C" __global__ void __launch_bounds__({block}, {max(1, RESIDENT // block)}) {name}({listed}) {{',
            f"const int lane = {lane}, inside = {inside};",
            f"const i64 team = (i64)blockIdx.x * {teams} + inside, teams = (i64)gridDim.x * {teams};",
        ]
        if self._has_shared:
            head.append("TG_DYNAMIC_SHARED(tg_shared);")
        if self._exchanges:
            head.append(f"__shared__ double tg_exchange[{block}];")
        return "\n".join([*head, *self._code, "}", ""])

    def instruction(self, text: str, type: Type) -> Value:
        raise UnsupportedError(f"[cuda] there is no such instruction: {text}")

    def write(self, text: str) -> None:
        raise UnsupportedError(f"[cuda] there is no such instruction: {text}")

    def declare(self, name: str, result: Type | None, parameters: Sequence[Type]) -> None:
        pass

    def function(self, head: str, result: Value) -> str:
        """What was written, as a function of the device that gives a value."""
        begin, end = f"static __device__ __forceinline__ {head} {{", f"return {result.ref};\n}}\n"
        return "\n".join([*self._tables, begin, *self._code, end])

    @contextmanager
    def _block_of(self, head: str) -> Iterator[None]:
        self._line(head + " {")
        self._known.append({})
        yield
        self._known.pop()
        self._line("}")

    # Control.

    @contextmanager
    def loop(self, start: Int, stop: Int, step: Int = 1, carried: Values = ()) -> Iterator[Loop]:
        i, first, last, by = self._name("n"), self.i64(start), self.i64(stop), self.i64(step)
        names = [self._name("c") for _ in carried]
        for name, value in zip(names, carried, strict=True):
            self._line(f"{c_type(value.type)} {name} = {value.ref};")
            self.hazards.same(name, value.ref)
        with self.hazards.loop(self._sync):
            with self._block_of(f"for (i64 {i} = {first.ref}; {i} < {last.ref}; {i} += {by.ref})"):
                loop = Loop(Value(self, i, I64), [Value(self, n, v.type) for n, v in zip(names, carried, strict=True)])
                yield loop
                if len(loop.following) != len(loop.values):
                    raise TypeError(f"[emit] wanted {len(loop.values)} values from loop.next; got {len(loop.following)}")
                moved = []
                for name, now, following in zip(names, carried, loop.following, strict=True):
                    if now.type != following.type:
                        raise TypeError(f"[emit] wanted {now.type} carried; got {following.type}")
                    if following.ref in names and following.ref != name:
                        following = self._fresh(following.ref, following.type)  # all move at once
                    moved.append((name, following.ref))
                for name, ref in moved:
                    if name != ref:
                        self._line(f"{name} = {ref};")
                if self.lanes > 1 and self.hazards.ends():
                    self._sync()
        loop.results = loop.values

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.hazards.branches() as branches, self._block_of(f"if ({condition.ref})"), branches():
            yield

    def either(self, condition: Value, yes: Callable[[], Values], no: Callable[[], Values]) -> list[Value]:
        at = len(self._code)
        found: list[list[Value]] = []
        ends = []
        with self.hazards.branches() as branches:
            for head, branch in ((f"if ({condition.ref})", yes), ("else", no)):
                with branches(), self._block_of(head):
                    found.append([*branch()])
                    ends.append(len(self._code))
        results = [Value(self, self._name("r"), a.type) for a in found[0]]
        for values, end in zip(found[::-1], ends[::-1], strict=True):
            self._code[end:end] = [f"{r.ref} = {v.ref};" for r, v in zip(results, values, strict=True)]
        self._code[at:at] = [f"{c_type(r.type)} {r.ref};" for r in results]
        for r, a in zip(results, found[0], strict=True):
            self.hazards.same(r.ref, a.ref)
        return results

    # Memory.

    def offset(self, address: Value, n_bytes: Number) -> Value:
        if isinstance(n_bytes, int) and n_bytes == 0:
            return address
        by = self.as_type(n_bytes, I64)
        found = self._value(f"{address.ref} + {by.ref}", PTR.x(by.lanes))
        self.hazards.same(found.ref, address.ref)
        return found

    def _sync(self) -> None:
        if self.lanes > 1:
            self._line("__syncwarp();" if self.lanes == WARP else "__syncthreads();")

    def _reads(self, address: Value, key: str) -> None:
        if self.lanes > 1 and self.hazards.read(address.ref, key):
            self._sync()

    def _writes(self, address: Value, key: str) -> None:
        if self.lanes > 1 and self.hazards.write(address.ref, key):
            self._sync()

    def _wanted(self, lanes: int, mask: Value | None) -> str:
        """Whether a thread takes part in an access of so many lanes; empty where all do."""
        said = [f"lane < {lanes}"] if lanes < self.lanes else []
        return " && ".join([*said, *([mask.ref] if mask is not None else [])])

    def load(self, address: Value, type: Type, *, align: int = 0, mask: Value | None = None) -> Value:
        c = c_type(type)
        if not type.lanes:
            self._reads(address, "all")
            found = self._fresh(f"*(const {c}*)({address.ref})" if type.kind != "p" else f"*(char**)({address.ref})", type)
            if type.kind == "p":
                self.hazards.give(found.ref, Root.FAR)
            return found
        self._reads(address, f"lane {address.ref} {type}")
        return self._lane_read(f"((const {c}*)({address.ref}))[lane]", type, self._wanted(type.lanes, mask))

    def _lane_read(self, place: str, type: Type, wanted: str) -> Value:
        return self._fresh(f"{wanted} ? {place} : ({c_type(type)})0" if wanted else place, type)

    def store(self, value: Value, address: Value, *, align: int = 0, mask: Value | None = None) -> None:
        c = c_type(value.type)
        if not value.lanes:
            self._writes(address, "first")
            self._line(f"{'if (lane == 0) ' if self.lanes > 1 else ''}*({c}*)({address.ref}) = {value.ref};")
            return
        self._writes(address, f"lane {address.ref} {value.type}")
        wanted = self._wanted(value.lanes, mask)
        self._line(f"{f'if ({wanted}) ' if wanted else ''}(({c}*)({address.ref}))[lane] = {value.ref};")

    def gather(self, address: Value, offsets: Value, type: Type, mask: Value | None = None) -> Value:
        self._reads(address, f"gather {address.ref} {offsets.ref}")
        return self._lane_read(f"*(const {c_type(type)}*)({address.ref} + {offsets.ref})", type, self._wanted(type.lanes, mask))

    def scatter(self, value: Value, address: Value, offsets: Value, mask: Value | None = None) -> None:
        self._writes(address, f"gather {address.ref} {offsets.ref}")
        wanted = self._wanted(value.lanes, mask)
        self._line(f"{f'if ({wanted}) ' if wanted else ''}*({c_type(value.type)}*)({address.ref} + {offsets.ref}) = {value.ref};")

    def move(self, item: Type, to: Value, to_stride: Int, source: Value, stride: Int, n: Int) -> None:
        size = item.size_bytes

        def body(i: Value, mask: Value | None, _: list[Value]) -> None:
            at = i + self.lane_numbers(self.lanes, I64) if self.lanes > 1 else self.splat(i, 1)
            some = self.gather(source, at * self.splat(self.i64(stride) * size, self.lanes), item.x(self.lanes), mask)
            self.scatter(some, to, at * self.splat(self.i64(to_stride) * size, self.lanes), mask)

        self.sweep(n, body)

    def clear(self, to: Value, n_bytes: Int) -> None:
        zeros = self.const(0, Type("i", 8, self.lanes))
        self.sweep(n_bytes, lambda i, mask, _: self.store(zeros, to + i, mask=mask))

    def prefetch(self, address: Value, locality: int = 3) -> None:
        pass

    def alloca(self, type: Type, count: int = 1, align: int = 64) -> Value:
        raise UnsupportedError("[cuda] there is no stack of a team")

    # What a kernel is given.

    def param(self, param: Param, type: Type) -> Value:
        """Of eight bytes: an address, or a number."""
        self.params.append(param)
        name = f"p{len(self.params) - 1}"
        if type.kind != "p":
            return Value(self, name, type)
        found = self._value(f"(char*){name}", PTR)
        self.hazards.give(found.ref, (param.name or param.kind, param.kind))
        return found

    def slot(self) -> Value:
        raise UnsupportedError("[cuda] a kernel's operands come by name")

    def scratch(self) -> Value:
        each = -(-self.scratch_bytes // 64) * 64
        if self.shared:
            base = self._value(f"(char*)tg_shared + (i64)inside * {each}", PTR)
            self._has_shared = True
        else:
            found = next((i for i, p in enumerate(self.params) if p.kind == "scratch"), None)
            if found is None:
                self.params.append(Param("scratch"))
                found = len(self.params) - 1
            base = self._value(f"(char*)p{found} + team * {each}", PTR)
        self.hazards.give(base.ref, ("scratch", "scratch"))
        return base + self._taken_bytes

    @contextmanager
    def alone(self, taken_bytes: int) -> Iterator[None]:
        before, self._is_alone, self._taken_bytes = self._is_alone, True, taken_bytes
        try:
            yield
        finally:
            self._is_alone, self._taken_bytes = before, 0

    @contextmanager
    def span(self, n: Int) -> Iterator[Loop]:
        start, step = (self.i64(0), self.i64(1)) if self._is_alone else (self.chunk, self.chunks)
        with self.loop(start, n, step) as loop:
            loop.next()
            yield loop

    def refuse(self, condition: Value, message: str, *values: Int) -> None:
        self.messages.append(message)
        numbers = [self.convert(v, I64) if isinstance(v, Value) else self.i64(v) for v in (*values, *(0,) * (3 - len(values)))]
        given = [v.ref for v in numbers]
        if not any(p.kind == "status" for p in self.params):
            self.params.append(Param("status"))
        at = next(i for i, p in enumerate(self.params) if p.kind == "status")
        self._line(f"if ({condition.ref}{' && lane == 0' if self.lanes > 1 else ''}) ")
        self._line(f"    tg_refuse((u64*)p{at}, {whole(code_of(message), 64)}, {', '.join(given)});")
