"""The JIT: compiled texts compute what they say, nothing is compiled twice, and no text can end this process."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.backends.cpu.code_cache import CodeCache
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.target import PROMISES, TARGETS, Target, can_run, find_target, host
from tensorgraph.errors import KernelError, UnknownNameError

ROOT = Path(__file__).resolve().parents[3]
RUNNABLE = [target for target in (host(), *TARGETS.values()) if can_run(target)]
FOREIGN = TARGETS["baseline" if host().family == "aarch64" else "aarch64"]
ICELAKE = Target("icelake", TARGETS["baseline"].triple, "icelake-server", "", 64, frozenset({"avx512", "vnni"}))

ADD = "; add two integers\ndefine i64 @kernel(i64 %a, i64 %b) {\n  %c = add i64 %a, %b\n  ret i64 %c\n}\n"
SINE = """; sine
declare double @sin(double)
define double @kernel(double %x) {
  %y = call double @sin(double %x)
  ret double %y
}
"""
SUM = """; sum of an array
@zero = private unnamed_addr constant <4 x float> zeroinitializer, align 16
define internal float @across(<4 x float> %v) noinline {
  %s = call float @llvm.vector.reduce.fadd.v4f32(float 0.0, <4 x float> %v)
  ret float %s
}
declare float @llvm.vector.reduce.fadd.v4f32(float, <4 x float>)
define float @kernel(ptr %x, i64 %n) {
entry:
  %start = load <4 x float>, ptr @zero
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %acc = phi <4 x float> [%start, %entry], [%more, %loop]
  %at = getelementptr float, ptr %x, i64 %i
  %v = load <4 x float>, ptr %at, align 4
  %more = fadd <4 x float> %acc, %v
  %next = add i64 %i, 4
  %again = icmp ult i64 %next, %n
  br i1 %again, label %loop, label %done
done:
  %s = call float @across(<4 x float> %more)
  ret float %s
}
"""
VNNI = """; dot products of bytes
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define void @kernel(ptr %p) {
  %a = load <16 x i32>, ptr %p
  %b = load <64 x i8>, ptr %p
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %a, <64 x i8> %b, <64 x i8> %b)
  store <16 x i32> %r, ptr %p
  ret void
}
"""
LIBRARY = "from tests.backends.cpu.test_jit import *\nfrom tensorgraph.backends.cpu.forked import can_fork, run_forked\n"


def times(factor: int) -> str:
    """A text that multiplies its argument."""
    return f"; times {factor}\ndefine i64 @kernel(i64 %a) {{\n  %c = mul i64 %a, {factor}\n  ret i64 %c\n}}\n"


def call(address: int, *args: int) -> int:
    """The value of an integer function of integers."""
    return int(ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(args))(address)(*args))


def script(body: str, *args: str) -> list[str]:
    """The command that runs a body which may use all that is here."""
    return [sys.executable, "-c", LIBRARY + textwrap.dedent(body), *args]


def alone(body: str, *args: str) -> dict[str, object]:
    """What a script prints as JSON in a process of its own, which has one thread, as the test runner's may not."""
    ran = subprocess.run(script(body, *args), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, object] = json.loads(ran.stdout)
    return said


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)
def test_code_computes_what_its_text_says(target: Target) -> None:
    jit = Jit(target, None)
    add, total, sine, thrice = jit.compile([ADD, SUM, SINE, times(3)])
    assert call(add, 2**40, -5) == 2**40 - 5 and call(thrice, -7) == -21
    values = np.arange(64, dtype=np.float32)  # sums that are exact in any order
    take = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_void_p, ctypes.c_int64)(total)
    assert [take(values.ctypes.data, n) for n in (4, 20, 64)] == [values[:n].sum(dtype=np.float64) for n in (4, 20, 64)]
    sin = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(sine)
    assert [sin(x) for x in (0.0, 1.0, -2.5)] == [math.sin(x) for x in (0.0, 1.0, -2.5)]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_every_level_gives_code(level: int) -> None:
    jit = Jit(host(), None, level)
    assert call(jit.compile([times(11)])[0], 4) == 44


def test_the_same_text_is_compiled_once() -> None:
    jit = Jit(host(), None)
    first, again, other = jit.compile([ADD, ADD, SINE])
    assert first == again != other
    assert jit.compile([SINE, times(2), ADD])[::2] == [other, first]
    assert (jit.stats.compiled, jit.stats.from_disk) == (3, 0) and jit.stats.compile_s > 0


def test_only_the_whole_token_is_renamed() -> None:
    text = "define internal i64 @kernel.part(i64 %a) {\n  ret i64 %a\n}\n" + (
        "define internal i64 @kernel_2(i64 %a) {\n  %b = call i64 @kernel.part(i64 %a)\n  ret i64 %b\n}\n"
        "define i64 @kernel(i64 %a) {\n  %b = call i64 @kernel_2(i64 %a)\n  ret i64 %b\n}\n"
    )
    jit = Jit(host(), None)
    assert call(jit.compile([text])[0], 9) == 9
    assert "\nkernel.part:" in jit.assembly(text) and "\nkernel:" not in jit.assembly(text)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    body = """
    jit = Jit(host(), CodeCache(Path(sys.argv[1])))
    value = call(jit.compile([ADD, SUM, SINE, times(5)])[3], 8)
    print(json.dumps([value, jit.stats.compiled, jit.stats.from_disk, jit.stats.compile_s > 0]))
    """
    assert alone(body, str(tmp_path)) == [40, 4, 0, True]
    assert alone(body, str(tmp_path)) == [40, 0, 4, False]
    jit = Jit(host(), CodeCache(tmp_path))
    assert call(jit.compile([times(5), times(6)])[1], 7) == 42
    assert (jit.stats.compiled, jit.stats.from_disk) == (1, 1)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[:-1] + b"!", lambda content: b""])
def test_a_damaged_entry_is_compiled_again(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    Jit(host(), CodeCache(tmp_path)).compile([times(7)])
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    for compiled in (1, 0):
        jit = Jit(host(), CodeCache(tmp_path))
        assert call(jit.compile([times(7)])[0], 6) == 42
        assert (jit.stats.compiled, jit.stats.from_disk) == (compiled, 1 - compiled)


def test_targets_and_levels_do_not_share_code(tmp_path: Path) -> None:
    jits = [Jit(target, CodeCache(tmp_path), level) for target in (host(), *TARGETS.values()) for level in (0, 1)]
    for jit in jits:
        jit.objects([ADD])
    assert [jit.stats.compiled for jit in jits] == [1] * len(jits) == [1] * len(list(tmp_path.iterdir()))


def test_two_processes_fill_one_cache_at_once(tmp_path: Path) -> None:
    body = """
    jit = Jit(host(), CodeCache(Path(sys.argv[1])))
    print([call(address, 2) for address in jit.compile([times(i) for i in range(9)])])
    """
    command = script(body, str(tmp_path))
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [json.loads(one.communicate(timeout=120)[0]) for one in both] == [[2 * i for i in range(9)]] * 2
    jit = Jit(host(), CodeCache(tmp_path))
    jit.compile([times(i) for i in range(9)])
    assert (jit.stats.compiled, jit.stats.from_disk) == (0, 9)


def test_code_that_aborts_the_compiler_is_an_error_and_loses_nothing_else(tmp_path: Path) -> None:
    said = alone(
        """
        x86 = TARGETS["baseline"]  # which an ARM machine makes objects for too
        jit = Jit(x86, CodeCache(Path(sys.argv[1])))
        texts = [VNNI, *(times(i) for i in range(6)), VNNI.replace("bytes", "more bytes")]
        one, many = [], []
        for wanted, error in ((texts[:1], one), (texts, many)):
            try:
                jit.objects(wanted)
            except KernelError as failed:
                error.append(str(failed))
        try:
            jit.assembly(VNNI)
        except KernelError as failed:
            one.append(str(failed))
        again = Jit(x86, CodeCache(Path(sys.argv[1])))
        again.objects(texts[1:-1])
        print(json.dumps([can_fork(), one, many, jit.stats.compiled, again.stats.compiled]))
        """,
        str(tmp_path),
    )
    assert isinstance(said, list)
    forks, one, many, compiled, compiled_again = said
    assert forks is True and (compiled, compiled_again) == (6, 0)
    for error in (*one, *many):
        assert error.startswith("[jit] wanted code for target 'baseline'; got none for dot products of bytes: ")
        assert "SIGABRT" in error and "LLVM ERROR" in error
    assert len(one) == 2 and len(many) == 1 and "\ndot products of more bytes: " in many[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("; broken\ndefine i64 @kernel( {\n}\n", "LLVM IR parsing error"),
        ("; broken\ndefine i64 @kernel() {\n  ret i32 0\n}\n", "value doesn't match function result type"),
        ("; broken\ndefine i64 @other() {\n  ret i64 0\n}\n", "wanted one external function, @kernel; got 1 other"),
        ("; broken\ndeclare void @kernel()\n", "wanted one external function, @kernel; got 0"),
        (f"; broken\n{ADD}{ADD.replace('@kernel', '@second')}", "got 2 second"),
        (f"; broken\n{SINE.replace('@sin', '@no_such_function')}", "its code asks for what this process lacks: no_such_function"),
    ],
)
def test_a_text_that_is_no_kernel_is_named_and_the_others_are_loaded(text: str, why: str) -> None:
    jit = Jit(host(), None)
    with pytest.raises(KernelError, match=r"\[jit\] wanted code for target 'host'; got none for broken: ") as raised:
        jit.compile([ADD, text, SINE])
    assert why in str(raised.value) and "add two" not in str(raised.value)
    compiled = jit.stats.compiled
    assert call(jit.compile([ADD, SINE])[0], 1, 2) == 3 and jit.stats.compiled == compiled


def test_a_text_without_a_name_is_told_by_its_key() -> None:
    with pytest.raises(KernelError, match=r"none for a text without a name \([0-9a-f]{12}\): LLVM IR parsing error"):
        Jit(host(), None).compile(["define banana"])


def test_a_parse_error_gives_the_line_of_the_text() -> None:
    with pytest.raises(KernelError, match=r"<string>:3:"):
        Jit(host(), None).compile(["; first line\ndefine i64 @kernel() {\n  ret banana\n}\n"])


def test_objects_for_a_machine_that_is_not_this_one(tmp_path: Path) -> None:
    jit = Jit(FOREIGN, CodeCache(tmp_path))
    with pytest.raises(KernelError, match=f"wanted a target that this machine can run; got '{FOREIGN.name}'"):
        jit.compile([ADD])
    assert jit.objects([ADD, SUM]) == jit.objects([ADD, SUM]) and (jit.stats.compiled, jit.stats.from_disk) == (2, 2)


@pytest.mark.parametrize(("name", "machine"), [("baseline", 62), ("avx2", 62), ("avx512", 62), ("aarch64", 183)])
def test_an_object_is_of_its_targets_machine(name: str, machine: int) -> None:
    (content,) = Jit(find_target(name), None).objects([SUM])
    assert content[:4] == b"\x7fELF" and int.from_bytes(content[18:20], "little") == machine


def test_assembly_is_the_targets() -> None:
    wide = SUM.replace("<4 x", "<16 x").replace("v4f32", "v16f32")
    registers = {target.name: Jit(target, None).assembly(wide) for target in (*TARGETS.values(), ICELAKE)}
    assert "zmm" in registers["avx512"] and "zmm" in registers["icelake"]
    assert "ymm" in registers["avx2"] and "zmm" not in registers["avx2"]
    assert "xmm" in registers["baseline"] and "ymm" not in registers["baseline"]
    assert ".4s" in registers["aarch64"] and "xmm" not in registers["aarch64"]
    assert "vpdpbusd" in Jit(ICELAKE, None).assembly(VNNI)


def test_with_other_threads_alive_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    def forked() -> int:
        raise AssertionError("forked beside another thread")

    monkeypatch.setattr(os, "fork", forked)
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        jit = Jit(host(), None)
        addresses = jit.compile([times(i) for i in range(5)])
    finally:
        done.set()
        other.join()
    assert [call(address, 10) for address in addresses] == [0, 10, 20, 30, 40]


def test_threads_share_a_jit() -> None:
    jit = Jit(host(), None)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(jit.compile, [[times(i) for i in range(j, 8)] for j in range(8)]))
    assert jit.stats.compiled == 8 and all(addresses == found[0][j:] for j, addresses in enumerate(found))


def test_jobs_in_children() -> None:
    """Results larger than a pipe, children that die or leave, exceptions of ours and others, a system that refuses to fork."""
    said = alone(
        """
        def refuse(): raise KernelError("no")
        def mistake(): raise ZeroDivisionError("by zero")
        large, leave, more = lambda: b"x" * 3_000_000, lambda: os._exit(7), lambda: b"y" * 70_000
        jobs = [large, os.abort, lambda: b"", refuse, mistake, leave, lambda: b"end", more]
        def shown(jobs):
            return [len(r) if isinstance(r, bytes) else str(r) for r in run_forked(jobs, [1] * len(jobs))]
        import tensorgraph.backends.cpu.forked as forked
        runs = []
        for processors in (1, 3, 16):
            forked._processors = lambda: processors
            runs.append(shown(jobs))
        def no_fork(): raise BlockingIOError("no more processes")
        os.fork = no_fork
        print(json.dumps({"runs": runs, "here": shown([jobs[0], refuse, jobs[6]]), "files": len(os.listdir("/dev/fd"))}))
        """
    )
    aborted, left = "the compiler was ended by SIGABRT", "the compiler left with status"
    expected = [3_000_000, aborted, 0, "no", f"{left} 1: ZeroDivisionError: by zero", f"{left} 7", 3, 70_000]
    assert said["runs"] == [expected] * 3
    assert said["here"] == [3_000_000, "no", 3]
    assert said["files"] == 4  # the standard three, and the listing's own


def test_children_neither_flush_nor_run_exit_handlers() -> None:
    said = alone(
        """
        import atexit
        sys.stdout = open(1, "w", buffering=8192, closefd=False)
        sys.stdout.write("[")  # still in the buffer when children leave
        jit = Jit(host(), None)
        atexit.register(lambda: (sys.stdout.write('"exit"]'), sys.stdout.flush()))
        jit.compile([times(i) for i in range(4)])
        """
    )
    assert said == ["exit"]


@pytest.mark.parametrize("group", [False, True], ids=["to the parent", "to all"])
def test_an_interrupt_leaves_no_children(group: bool) -> None:
    body = """
    import time
    import tensorgraph.backends.cpu.forked as forked
    forked._processors = lambda: 3
    def job():
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(100)
        return b""
    try:
        run_forked([job, job, job], [1, 1, 1])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    """
    with subprocess.Popen(script(body), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(3)]
        (os.killpg if group else os.kill)(parent.pid, signal.SIGINT)
        rest, _ = parent.communicate(timeout=60)
    assert rest.strip() == "interrupted" and parent.returncode == 0
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_targets_are_told_apart() -> None:
    assert find_target("host") is host() and can_run(host())
    assert {find_target(name).name for name in TARGETS} == {"avx512", "avx2", "baseline", "aarch64"}
    keys = {target.key for target in (host(), ICELAKE, *TARGETS.values())}
    assert len(keys) == 6
    for target in (host(), *TARGETS.values()):
        assert target.has <= PROMISES.keys()
        assert target.vector_bytes == (64 if "avx512" in target.has else 32 if "avx2" in target.has else 16)
    with pytest.raises(UnknownNameError, match=r"\[target\] wanted one of host, avx512, avx2, baseline, aarch64; got 'sparc'"):
        find_target("sparc")


def test_what_can_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    family = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    assert host().family == family and not can_run(FOREIGN)
    here = Target("here", TARGETS["baseline"].triple, "", "+avx2,-avx512f", 32, frozenset({"avx2"}))
    monkeypatch.setattr("tensorgraph.backends.cpu.target.host", lambda: here)
    assert can_run(TARGETS["baseline"]) and can_run(here)
    assert not can_run(TARGETS["avx2"]) and not can_run(TARGETS["avx512"]) and not can_run(TARGETS["aarch64"])
    assert not can_run(Target("needy", here.triple, "", "+bmi2", 32, frozenset({"avx2"})))
