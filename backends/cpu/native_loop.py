"""The native loops that run a program: a table of steps, each a kernel cut into chunks that threads claim one by one.

A step is eight i64: kernel, args, address of its number of items, grain, most chunks, and three that are not used. All that
threads share is a block of memory, by lines of 128 bytes. Its first word says what can be claimed: serial number of the step,
chunks, chunks claimed. A thread claims by compare-and-swap, and only then reads which kernel it is for, so whatever it saw
before is of no consequence; the step, and so the program, cannot end before it has reported its chunks. Nobody waits for a
thread without a claim: it may stall anywhere, for any time, and all that it can do afterwards is to fail to claim. The thread
that reports the last chunk owns the program: it alone runs the steps of one chunk that follow, and publishes the next one
that has more, its first chunk claimed already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.ir import I1, I32, I64, PTR, Type, Value
from tensorgraph.backends.cpu.target import Target

STEP_BYTES = 64
MOST_CHUNKS = 0xFFFF  # of a step, whatever its line says

# Offsets in the shared block. The first line is written by the thread that owns the program.
WORD, KERNEL, ARGS, TABLE, NEXT, STEPS, RUN = range(0, 56, 8)
DONE = 128  # chunks of this step that were reported
WAKES, PARKED, STOP = range(256, 280, 8)  # an i32 that sleepers wait on; whether somebody may sleep; whether workers leave
STATUS, SPENT, BEGAN = range(384, 408, 8)  # address of the status; where timed: of each step's duration, when this one began
TICKS, WEIGHT, SIZES = range(408, 432, 8)  # the last run's duration and size; address of a line for each size
THREADS = 512  # a line for each thread
CHUNKS, RUNS, PARKS, LAST_RUN = range(0, 32, 8)
LINE_BYTES = 128

# Of the line for programs whose weight has i bits, the i-th of 65: whether they run on the calling thread alone; after how many
# runs, or by a run of more than how many ticks, Python is told; runs so far; and ticks of the last `KEPT` of these.
ALONE, LEFT, LIMIT, COUNT, LAST = (*range(0, 32, 8), 64)
KEPT, TOLD = 8, 1 << 62  # `TOLD` in a returned status: look at the line of this size

SPIN_S, YIELD_S = 3e-4, 5e-5  # after so long a worker sleeps; after so long a waiting thread lets others have the processor
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

    def wake(self, team: Value) -> None:
        """Wake whoever sleeps; a load where nobody does."""
        if self.futex is None:
            return
        with self.when(self.load(team + PARKED, I64).ne(0)):
            with self.when(self.atomic("xchg", team + PARKED, self.i64(0)).ne(0)):
                wakes = team + WAKES
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


def ticks_text(target: Target) -> str:
    """`() -> i64`: the clock that the other loops use."""
    f = LoopFunction(target, {}, I64)
    f.ret(f.ticks())
    return "; ticks\n" + f.text()


def alone_text(target: Target, timed: bool) -> str:
    """`(team, table, steps) -> status`: a program on this thread only."""
    f = _program(target)
    begin = f.ticks()
    _alone(f, timed)
    _finish(f, begin)
    return f"; alone{' timed' * timed}\n" + f.text()


def caller_text(target: Target, timed: bool) -> str:
    """`(team, table, steps) -> status`: a program on this thread and those that are in the worker's loop."""
    f = _program(target)
    begin = f.ticks()
    _shared(f, timed)
    _finish(f, begin)
    return f"; caller{' timed' * timed}\n" + f.text()


def chooser_text(target: Target) -> str:
    """`(team, table, steps) -> status`: one of these, by the program's size; leaves its weight too, and notes the ticks."""
    f = _program(target)
    team, table, steps = f.parameters.values()
    begin = f.ticks()
    with f.loop(0, steps, 1, [f.i64(0)]) as loop:
        loop.next(loop.values[0] + _grains(f, table + loop.i * STEP_BYTES))
    (weight,) = loop.results
    f.store(weight, team + WEIGHT)
    size = 64 - f.call("llvm.ctlz.i64", I64, weight, f.const(0, I1))
    line = f.load(team + SIZES, PTR) + size * LINE_BYTES
    f.either(f.load(line + ALONE, I64).ne(0), lambda: _alone(f, False), lambda: _shared(f, False))
    _finish(f, begin, line)
    return "; chooser\n" + f.text()


def _program(target: Target) -> LoopFunction:
    return LoopFunction(target, {"team": PTR, "table": PTR, "steps": I64}, I64)


def _alone(f: LoopFunction, timed: bool) -> list[Value]:
    team, table, steps = f.parameters.values()
    zero = f.i64(0)
    with f.loop(0, steps, 1, [zero, f.ticks() if timed else zero]) as loop:
        ran, before = loop.values
        line = table + loop.i * STEP_BYTES
        kernel, args, chunks = f.load(line, PTR), f.load(line + 8, PTR), _cut(f, line)
        with f.loop(0, chunks) as each:
            each.next()
            f.run_kernel(kernel, args, zero, each.i, chunks, each.i.eq(0))
        if timed:
            now = f.ticks()
            _spend(f, team, loop.i, now - before)
            before = now
        loop.next(ran + chunks, before)
    f.add_to(team + (THREADS + CHUNKS), loop.results[0])
    f.add_to(team + (THREADS + RUNS), 1)
    return []


def _shared(f: LoopFunction, timed: bool) -> list[Value]:
    team, table, steps = f.parameters.values()
    thread = zero = f.i64(0)
    f.store(table, team + TABLE)
    f.store(zero, team + NEXT)
    f.store(steps, team + STEPS)
    f.add_to(team + RUN, 1)
    f.add_to(team + (THREADS + RUNS), 1)
    finished = _go_on(f, team, thread, f.load(team + WORD, I64), timed, begins=True)
    _take_part(f, team, thread, finished, timed, leaves=True)
    return []


def worker_text(target: Target, timed: bool) -> str:
    """`(team, thread)`: takes part in programs until told to stop."""
    f = LoopFunction(target, {"team": PTR, "thread": I64})
    team, thread = f.parameters.values()
    _take_part(f, team, thread, f.i64(0), timed, leaves=False)
    return f"; worker{' timed' * timed}\n" + f.text()


def _grains(f: LoopFunction, line: Value) -> Value:
    """How much there is to do in a step, in grains, the last of them perhaps not whole."""
    items, grain = f.load(f.load(line + 16, PTR), I64), f.load(line + 24, I64)
    few = items.le(grain)  # most steps are spared the division
    return f.either(few, lambda: [f.convert(items.gt(0), I64)], lambda: [(items + grain - 1) // grain])[0]


def _cut(f: LoopFunction, line: Value) -> Value:
    """Chunks of a step, by its items alone."""
    return f.min(f.min(_grains(f, line), f.load(line + 32, I64)), MOST_CHUNKS)


def _finish(f: LoopFunction, begin: Value, line: Value | None = None) -> None:
    """Leave how long it took, in the line of its size too, and return the status, which begins again at 0."""
    team, ticks = f.parameters["team"], f.ticks() - begin
    f.store(ticks, team + TICKS)
    status = f.load(team + STATUS, PTR)
    code = f.load(status, I64)
    with f.when(code.ne(0)):
        f.store(f.i64(0), status)
    f.ret(code if line is None else code + _note(f, line, ticks))


def _note(f: LoopFunction, line: Value, ticks: Value) -> Value:
    """Count a run of a program of this line's size; `TOLD` where Python is to look at it, else 0."""
    count, left = f.load(line + COUNT, I64), f.load(line + LEFT, I64) - 1
    f.store(ticks, line + (count & (KEPT - 1)) * 8 + LAST)
    f.store(count + 1, line + COUNT)
    f.store(left, line + LEFT)
    return f.select(left.le(0) | ticks.gt(f.load(line + LIMIT, I64)), f.i64(TOLD), f.i64(0))


def _spend(f: LoopFunction, team: Value, step: Value, ticks: Value) -> None:
    f.add_to(f.load(team + SPENT, PTR) + step * 8, ticks)


def _go_on(f: LoopFunction, team: Value, thread: Value, word: Value, timed: bool, *, begins: bool) -> Value:
    """As owner of the program: up to the next step of several chunks, of which one is done here, or to the end.

    Gives the chunks of the published step that this thread has done and not reported: 1, or 0 at the end.
    """
    mine = team + (thread * LINE_BYTES + THREADS)
    table, steps = f.load(team + TABLE, PTR), f.load(team + STEPS, I64)
    serial = (word & ~0xFFFFFFFF) + (1 << 32)
    zero, yes = f.i64(0), f.const(1, I1)
    with f.cycle(f.load(team + NEXT, I64), zero) as c:
        step, ran = c.values
        with f.when(step.ge(steps)):
            f.add_to(mine + CHUNKS, ran)
            if not begins:  # else the word still says that there is nothing
                f.store_release(serial, team + WORD)
            c.leave(zero)
        line = table + step * STEP_BYTES
        kernel, args, chunks = f.load(line, PTR), f.load(line + 8, PTR), _cut(f, line)
        with f.when(chunks.le(1)):
            with f.when(chunks.eq(1)):
                before = f.ticks() if timed else zero
                f.run_kernel(kernel, args, thread, zero, chunks, yes)
                if timed:
                    _spend(f, team, step, f.ticks() - before)
            c.again(step + 1, ran + chunks)
        f.add_to(mine + CHUNKS, ran)
        f.store(kernel, team + KERNEL)
        f.store(args, team + ARGS)
        f.store(step + 1, team + NEXT)
        if timed:
            f.store(f.ticks(), team + BEGAN)
        f.store_release((chunks << 16) + serial + 1, team + WORD)
        f.wake(team)
        f.run_kernel(kernel, args, thread, zero, chunks, yes)
        c.leave(f.i64(1))
    return c.results[0]


def _take_part(f: LoopFunction, team: Value, thread: Value, finished: Value, timed: bool, *, leaves: bool) -> None:
    """Claim chunks and report them, until the program ends (`leaves`) or the team is told to stop.

    Carried: chunks of the present step done and not reported, since when there is nothing to do, and looks since then.
    """
    mine = team + (thread * LINE_BYTES + THREADS)
    zero = f.i64(0)
    with f.cycle(finished, zero, zero) as c:
        finished, since, looks = c.values
        word = f.load_acquire(team + WORD)
        taken, chunks = word & 0xFFFF, (word >> 16) & 0xFFFF
        with f.when(taken.lt(chunks)):
            claimed = f.swap_if(team + WORD, word, word + 1)
            with f.when(claimed.invert()):
                c.again(finished, since, looks)
            kernel, args, first = f.load(team + KERNEL, PTR), f.load(team + ARGS, PTR), finished.eq(0)
            if not leaves:
                run = f.load(team + RUN, I64)
                with f.when(run.ne(f.load(mine + LAST_RUN, I64))):
                    f.store(run, mine + LAST_RUN)
                    f.add_to(mine + RUNS, 1)
            with f.when((taken + 1).lt(chunks)):
                f.wake(team)
            f.run_kernel(kernel, args, thread, taken, chunks, first)
            c.again(finished + 1, zero, zero)
        with f.when(finished.gt(0)):
            f.add_to(mine + CHUNKS, finished)
            (last,) = f.either(finished.eq(chunks), lambda: [f.const(1, I1)], lambda: [_report(f, team, finished, chunks)])
            with f.when(last):
                if timed:
                    _spend(f, team, f.load(team + NEXT, I64) - 1, f.ticks() - f.load(team + BEGAN, I64))
                c.again(_go_on(f, team, thread, word, timed, begins=False), zero, zero)
            c.again(zero, zero, zero)
        if leaves:
            with f.when(chunks.eq(0)):
                c.leave()
        f.pause()
        with f.when((looks & 15).ne(15)):
            c.again(zero, since, looks + 1)
        now = f.ticks()
        since = f.select(since.eq(0), now, since)
        waited = now - since
        if not leaves:
            with f.when(f.load_acquire(team + STOP).ne(0)):
                c.leave()
            with f.when(waited.gt(int(SPIN_S * f.ticks_per_s))):
                _park(f, team, mine)
                c.again(zero, since if f.futex is None else zero, looks + 1)
        with f.when(waited.gt(int(YIELD_S * f.ticks_per_s))):
            f.call("sched_yield", I32)
        c.again(zero, since, looks + 1)


def _report(f: LoopFunction, team: Value, finished: Value, chunks: Value) -> Value:
    """Add to the chunks that are done; whether that was all of them."""
    last = (f.atomic("add", team + DONE, finished) + finished).eq(chunks)
    with f.when(last):
        f.store(f.i64(0), team + DONE)
    return last


def _park(f: LoopFunction, team: Value, mine: Value) -> None:
    """Sleep until there may be something to do. The counter is read first: whoever finds the flag set has yet to raise it."""
    seen = f.load_acquire(team + WAKES, I32)
    f.atomic("xchg", team + PARKED, f.i64(1))
    word = f.load_acquire(team + WORD)
    nothing = (word & 0xFFFF).ge((word >> 16) & 0xFFFF) & f.load_acquire(team + STOP).eq(0)
    with f.when(nothing):
        f.add_to(mine + PARKS, 1)
        f.sleep(team + WAKES, seen)
