"""Writing functions that threads run together: atomics, waiting, waking, and loops that end where they say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.ir import I1, I32, I64, Type, Value
from tensorgraph.backends.cpu.target import Target

_FUTEX = {"x86_64": 202, "aarch64": 98}  # the system call's number on Linux
WAIT, WAKE = 128, 129  # operations of that call, within this process
_SLEEP_US = 100  # where there is no such call


@dataclass
class Cycle:
    """A loop being written that goes on at its head or ends wherever it says so."""

    f: LoopFunction
    head: str
    exit: str
    values: list[Value]
    back: list[tuple[str, Sequence[Value]]] = field(default_factory=list)
    out: list[tuple[str, Sequence[Value]]] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)

    def again(self, *values: Value) -> None:
        """Go on at the head with these values."""
        self.back.append(self.f.jump(self.head, values))

    def leave(self, *values: Value) -> None:
        """End, with these results."""
        self.out.append(self.f.jump(self.exit, values))


class LoopFunction(Function):
    """A function with what threads need between them: atomics, waiting, the clock, system calls."""

    def __init__(self, target: Target, parameters: dict[str, Type], result: Type | None = None) -> None:
        super().__init__("kernel", parameters, target, result)
        self._timespec = self.alloca(I64, 2) if target.family != "x86_64" else None
        self.ticks_per_s = 3e9 if self._timespec is None else 1e9  # about
        self.futex = _FUTEX.get(target.family) if "linux" in target.triple else None

    @contextmanager
    def cycle(self, *carried: Value) -> Iterator[Cycle]:
        """A loop without a counter; every path through it must end in `again` or `leave`."""
        head, exit, before = self._label("head"), self._label("exit"), self._block
        self.write(f"br label %{head}")
        self._begin(head)
        at = len(self._lines)
        cycle = Cycle(self, head, exit, [self._phi(v.type) for v in carried])
        yield cycle
        self.write("unreachable")
        self._begin(exit)
        cycle.results = [self._merge(column, cycle.out) for column in range(len(cycle.out[0][1]) if cycle.out else 0)]
        edges = [(before, carried), *cycle.back]
        for i, phi in enumerate(cycle.values):
            self._lines[at + i] = f"  {phi.ref} = phi {phi.type} {_edges(i, edges)}"

    def _merge(self, column: int, edges: Sequence[tuple[str, Sequence[Value]]]) -> Value:
        type = edges[0][1][column].type
        return self.instruction(f"phi {type} {_edges(column, edges)}", type)

    def jump(self, label: str, values: Sequence[Value]) -> tuple[str, Sequence[Value]]:
        """Go to a block; what is written next is never reached, until the block around it ends."""
        edge = self._block, values
        self.write(f"br label %{label}")
        self._begin(self._label("never"))
        return edge

    def load_acquire(self, address: Value, type: Type = I64) -> Value:
        """What another thread published there, and with it all that it wrote before."""
        return self.instruction(f"load atomic {type}, ptr {address.ref} seq_cst, align {type.size_bytes}", type)

    def store_release(self, value: Value, address: Value) -> None:
        """Publish a value, and with it all that this thread wrote before."""
        self.write(f"store atomic {value.type} {value.ref}, ptr {address.ref} release, align {value.type.size_bytes}")

    def atomic(self, operation: str, address: Value, value: Value) -> Value:
        """`add` or `xchg` in one step; gives what was there."""
        return self.instruction(f"atomicrmw {operation} ptr {address.ref}, {value.type} {value.ref} seq_cst", value.type)

    def swap_if(self, address: Value, expected: Value, value: Value) -> Value:
        """Whether `expected` was there, and so is replaced."""
        type = value.type
        pair = self.instruction(f"cmpxchg ptr {address.ref}, {type} {expected.ref}, {type} {value.ref} acq_rel acquire", type)
        return self.instruction(f"extractvalue {{ {type}, i1 }} {pair.ref}, 1", I1)

    def run_kernel(self, kernel: Value, *arguments: Value) -> None:
        """Call `(args, thread, chunk, chunks, first)`."""
        self.write(f"call void {kernel.ref}({', '.join(f'{a.type} {a.ref}' for a in arguments)})")

    def pause(self) -> None:
        """Tell the core that this thread waits."""
        if self.target.family == "x86_64":
            self.declare("llvm.x86.sse2.pause", None, ())
            self.write("call void @llvm.x86.sse2.pause()")
        elif self.target.family == "aarch64":
            self.declare("llvm.aarch64.hint", None, (I32,))
            self.write("call void @llvm.aarch64.hint(i32 1)")

    def ticks(self) -> Value:
        """A clock that all threads share: the cycle counter, or nanoseconds where programs may not read that."""
        if self._timespec is None:
            return self.call("llvm.readcyclecounter", I64)
        self.call("clock_gettime", I32, self.const(6 if "darwin" in self.target.triple else 1, I32), self._timespec)
        return self.load(self._timespec, I64) * 1_000_000_000 + self.load(self._timespec + 8, I64)

    def sleep(self, wakes: Value, seen: Value) -> None:
        """Until the counter at `wakes` is not `seen` and somebody woke its sleepers; or for a little while."""
        if self.futex is None:
            self.call("usleep", I32, self.const(_SLEEP_US, I32))
        else:
            self._system_call(f"ptr {wakes.ref}, i64 {WAIT}, i64 {self.convert(seen, I64).ref}, ptr null, ptr null, i64 0")

    def wake(self, wakes: Value) -> None:
        """Raise the counter at `wakes`, and wake all who sleep until it changes."""
        self.atomic("add", wakes, self.const(1, I32))
        self._system_call(f"ptr {wakes.ref}, i64 {WAKE}, i64 {0x7FFFFFFF}, ptr null, ptr null, i64 0")

    def _system_call(self, arguments: str) -> None:
        self._declared["syscall"] = "declare i64 @syscall(i64, ...)"
        self.instruction(f"call i64 (i64, ...) @syscall(i64 {self.futex}, {arguments})", I64)

    def add_to(self, address: Value, value: Value | int) -> None:
        """Add to an i64 that only this thread writes."""
        self.store(self.load(address, I64) + value, address)


def _edges(column: int, edges: Sequence[tuple[str, Sequence[Value]]]) -> str:
    return ", ".join(f"[ {values[column].ref}, %{block} ]" for block, values in edges)
