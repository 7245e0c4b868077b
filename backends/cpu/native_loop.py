"""The native loops that run a program: a table of steps, each a kernel cut into chunks that threads claim one by one.

A step is eight i64: kernel, args, address of its number of items, grain, most chunks, whether threads keep apart, and two that
are not used. Threads that keep apart are each given chunks that are neighbours, as long as they claim in turn. All that
threads share is a block of memory, by lines of 128 bytes. Its first word says what can be claimed: serial number of the step,
chunks, chunks claimed. A thread claims by compare-and-swap, and only then reads which kernel it is for, so whatever it saw
before is of no consequence; the step, and so the program, cannot end before it has reported its chunks. Nobody waits for a
thread without a claim: it may stall anywhere, for any time, and all that it can do afterwards is to fail to claim. The thread
that reports the last chunk owns the program: it alone runs the steps of one chunk that follow, and publishes the next one
that has more, its first chunk claimed already.
"""

from __future__ import annotations

from tensorgraph.backends.cpu.ir import I1, I32, I64, PTR, Value
from tensorgraph.backends.cpu.loop_function import LoopFunction
from tensorgraph.backends.cpu.target import Target

STEP_BYTES = 64
MOST_CHUNKS = 0xFFFF  # of a step, whatever its line says

# Offsets in the shared block. The first line is written by the thread that owns the program.
WORD, KERNEL, ARGS, TABLE, NEXT, STEPS, RUN, PARTS = range(0, 64, 8)
DONE = 128  # chunks of this step that were reported
WAKES, PARKED, STOP = range(256, 280, 8)  # an i32 that sleepers wait on; whether somebody may sleep; whether workers leave
STATUS, SPENT, BEGAN = range(384, 408, 8)  # address of the status; where timed: of each step's duration, when this one began
TICKS, WEIGHT, SIZES, TEAM = range(408, 440, 8)  # the last run's duration and size; address of a line for each size; threads
THREADS = 512  # a line for each thread
CHUNKS, RUNS, PARKS, LAST_RUN, BUSY = range(0, 40, 8)  # the last where timed: ticks in kernels
LINE_BYTES = 128

# Of the line for programs whose weight has i bits, the i-th of 65: whether they run on the calling thread alone; after how many
# runs, or by a run of more than how many ticks, Python is told; runs so far; and ticks of the last `KEPT` of these.
ALONE, LEFT, LIMIT, COUNT, LAST = (*range(0, 32, 8), 64)
KEPT, TOLD = 8, 1 << 62  # `TOLD` in a returned status: look at the line of this size

SPIN_S, YIELD_S = 3e-4, 5e-5  # after so long a worker sleeps; after so long a waiting thread lets others have the processor


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
            f.add_to(team + (THREADS + BUSY), now - before)
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


def _run(f: LoopFunction, mine: Value, timed: bool, kernel: Value, *arguments: Value) -> Value:
    """Call a kernel; the ticks that it took, of which this thread keeps count, or 0 where no times are taken."""
    if not timed:
        f.run_kernel(kernel, *arguments)
        return f.i64(0)
    before = f.ticks()
    f.run_kernel(kernel, *arguments)
    spent = f.ticks() - before
    f.add_to(mine + BUSY, spent)
    return spent


def _wake(f: LoopFunction, team: Value) -> None:
    """Wake whoever sleeps; a load where nobody does."""
    if f.futex is None:
        return
    with f.when(f.load(team + PARKED, I64).ne(0)):
        with f.when(f.atomic("xchg", team + PARKED, f.i64(0)).ne(0)):
            f.wake(team + WAKES)


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
                spent = _run(f, mine, timed, kernel, args, thread, zero, chunks, yes)
                if timed:
                    _spend(f, team, step, spent)
            c.again(step + 1, ran + chunks)
        f.add_to(mine + CHUNKS, ran)
        f.store(kernel, team + KERNEL)
        f.store(args, team + ARGS)
        f.store(f.select(f.load(line + 40, I64).ne(0), f.load(team + TEAM, I64), f.i64(1)), team + PARTS)
        f.store(step + 1, team + NEXT)
        if timed:
            f.store(f.ticks(), team + BEGAN)
        f.store_release((chunks << 16) + serial + 1, team + WORD)
        _wake(f, team)
        _run(f, mine, timed, kernel, args, thread, zero, chunks, yes)
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
                _wake(f, team)
            _run(f, mine, timed, kernel, args, thread, _place(f, team, taken, chunks), chunks, first)
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


def _place(f: LoopFunction, team: Value, taken: Value, chunks: Value) -> Value:
    """Which chunk it is that was claimed after so many others: the step's are cut into parts, which take turns."""
    parts = f.load(team + PARTS, I64)
    part = taken % parts
    return part * (chunks // parts) + f.min(part, chunks % parts) + taken // parts


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
