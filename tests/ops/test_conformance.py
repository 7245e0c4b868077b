"""Every op on every backend, and proof that conformance catches mistakes and passes what is right."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.backends.cpu import target as cpu_targets
from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tensorgraph.errors import GraphError, InputError, UnknownNameError
from tensorgraph.op import Op
from tensorgraph.tools.conformance import check, coverage
from tensorgraph.tools.conformance.case import draw_any
from tensorgraph.tools.conformance.case_text import Recorder, case_text, parse_case
from tensorgraph.tools.conformance.check import Report, run_drawn
from tensorgraph.tools.conformance.criterion import judge
from tensorgraph.tools.conformance.draw import draw_case
from tensorgraph.tools.conformance.here import others
from tests import tables
from tests.core.devices import StrictDevice
from tests.ops import kernel_devices as planted
from tests.ops.kernel_devices import Float32Device, KernelDevice, registered
from tests.tools.commands import as_json, tg

Array = np.ndarray[Any, Any]

OPS = list(registry.ops)
BACKENDS = others()
TARGETS = [f"cpu:{name}" for name, target in cpu_targets.TARGETS.items() if cpu_targets.can_run(target)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, backend: str, request: pytest.FixtureRequest) -> None:
    report = checked(op, backend, on_the_host(op) if backend == "cuda-host" else 8, request)
    assert report.ok, str(report)


@pytest.mark.deep
@pytest.mark.parametrize("backend", [*BACKENDS, *TARGETS])
@pytest.mark.parametrize("op", OPS)
def test_op_deeply(op: str, backend: str, request: pytest.FixtureRequest) -> None:
    examples = 10 * on_the_host(op) if backend == "cuda-host" else 60 if backend in TARGETS else 150
    report = checked(op, backend, examples, request)
    assert report.ok, str(report)


def on_the_host(op: str) -> int:
    """How many cases, for each of which kernels are compiled: of formulas, which differ in these alone, fewer."""
    found = registry.ops.get(op)
    return 1 if found.kernel("cuda") is None and hasattr(found.kernel("cpu"), "formula") else 3


def checked(op: str, backend: str, examples: int, request: pytest.FixtureRequest) -> Report:
    HostCompiler.launched.clear()
    report = check(op, backend, examples=examples)
    if backend == "cuda-host":
        tables.note(request, tables.EXECUTED, op, kernels=len(HostCompiler.launched), cases=report.cases)
    return report


@pytest.mark.parametrize("op", OPS)
def test_float32_in_another_order_of_summation_passes(op: str) -> None:
    with registered("float32", Float32Device) as backend:
        report = check(op, backend, examples=12)
    assert report.ok and report.cases == 12 and report.worst <= 1, str(report)


MISTAKES = [
    ("silu", {"read": planted.without_strides}),
    ("mul_mat", {"read": planted.without_strides}),
    ("flash_attn", {"read": planted.without_strides}),
    ("rms_norm", {"read": planted.without_offset}),
    ("get_rows", {"read": planted.without_offset}),
    ("add", {"read": planted.strides_of_the_maximum}),
    ("soft_max", {"read": planted.strides_of_the_maximum}),
    ("mul_mat", {"read": planted.constants_turned}),
    ("mean", {"finish": planted.divided_by_the_maximum}),
    ("silu", {"finish": planted.hundred_units}),
    ("mul_mat", {"finish": planted.hundred_units}),
    ("soft_max", {"finish": planted.hundred_units}),
    ("add", {"finish": planted.last_element}),
    ("top_k", {"finish": planted.last_element}),
    ("concat", {"finish": planted.last_element}),
    ("mul", {"finish": planted.tail_of_16}),
    ("rms_norm", {"finish": planted.tail_of_16}),
    ("cumsum", {"finish": planted.tail_of_16}),
    ("sum_rows", {"finish": planted.empty_sums}),
    ("mul_mat", {"finish": planted.empty_sums}),
    ("mean", {"finish": planted.no_nan}),
    ("log", {"finish": planted.no_nan}),
    ("div", {"finish": planted.nan_for_infinity}),
    ("attn_mask", {"finish": planted.infinity_unsigned}),
    ("log", {"finish": planted.infinity_unsigned}),
    ("round", {"finish": planted.half_to_even}),
    ("top_k", {"finish": planted.last_of_ties}),
    ("argsort", {"finish": planted.last_of_ties}),
    ("index_top_k", {"finish": planted.last_element}),
    ("silu", {"finish": planted.truncated}),
    ("add", {"finish": planted.raises}),
]


@pytest.mark.parametrize(("op", "mistake"), MISTAKES, ids=lambda v: v if isinstance(v, str) else next(iter(v.values())).__name__)
def test_a_planted_mistake_fails(op: str, mistake: dict[str, Any]) -> None:
    with registered("mistaken", lambda name: KernelDevice(name, **mistake)) as backend:
        report = check(op, backend, examples=250, seed=3)
    assert not report.ok and report.failure is not None
    assert report.failure.part != "second run" and report.failure.case


@pytest.mark.parametrize("op", ["add", "mul_mat"])
def test_a_second_run_that_differs_fails(op: str) -> None:
    report = check(op, KernelDevice("mistaken", finish=planted.adds_up()), examples=60, seed=3)
    assert report.failure is not None and report.failure.part == "second run"


@pytest.mark.parametrize(("axes", "rows"), [("..., N", None), ("M, N", ("x",))])
def test_rows_that_do_not_stand_alone_fail(axes: str, rows: tuple[str, ...] | None) -> None:
    """Of an op that adds up along its first axis, whether its signature says that rows are alone or it says so itself."""
    op = Op("added_rows", f"x[{axes}]: real -> y[{axes}]: x", rows=rows)
    try:
        op.reference(lambda x: np.cumsum(x, axis=0))
        report = check(op, KernelDevice("unchanged"), examples=60, seed=3)
    finally:
        registry.ops.remove("added_rows")
    assert report.failure is not None and report.failure.part == "rows"


@pytest.mark.parametrize("name", OPS)
def test_a_case_is_a_line_of_text(name: str) -> None:
    """Read again it draws the same case, of every op."""
    op, seen = registry.ops.get(name), []

    def one(data: Any) -> None:
        recorder = Recorder(data.draw)
        case, drawn = draw_any(op, recorder)
        read, replay = parse_case(case_text(name, recorder.given))
        again, redrawn = draw_any(op, replay)
        assert read == name and [*again.lines()] == [*case.lines()] and replay.at == len(recorder.given)
        for first, second in ((drawn, redrawn), (case.stored, again.stored)):
            assert first.keys() == second.keys() and all(first[s].tobytes() == second[s].tobytes() for s in first)
        seen.append(case)

    run_drawn(hypothesis, one, 12, 5)
    assert len(seen) >= 12


def test_special_values_and_long_axes_are_drawn() -> None:
    seen: list[tuple[Array, tuple[int, ...]]] = []
    run_drawn(
        hypothesis, lambda data: seen.append((x := draw_case(registry.ops.get("silu"), data.draw)[0]["x"], x.shape)), 300, 5
    )
    wide = [x.astype(np.float64) for x, _ in seen if x.dtype == np.float32]
    assert any(np.isnan(x).any() for x in wide) and any(np.isinf(x).any() for x in wide)
    tiny = float(np.finfo(np.float32).tiny)
    assert any(((x != 0) & (np.abs(x) < tiny)).any() for x in wide) and any((np.abs(x) > 1e11).any() for x in wide)
    assert any(0 in shape for _, shape in seen) and any(max(shape, default=0) > 1000 for _, shape in seen)


def test_the_unchanged_device_passes() -> None:
    """So that the mistakes alone are what fails."""
    for op in dict.fromkeys(op for op, _ in MISTAKES):
        assert check(op, KernelDevice("unchanged"), examples=10, seed=3).ok
    assert check("rms_norm", StrictDevice("strict"), examples=10, seed=3).ok


def test_the_failing_case_is_the_smallest() -> None:
    report = check("mul", KernelDevice("mistaken", finish=planted.tail_of_16), examples=100, seed=3)
    assert report.failure is not None and report.failure.part == "reference"
    assert [line.split(" (")[0] for line in report.failure.case[:2]] in (
        ["a = f32[1]", "b = f32[1]"],
        ["a = f32[1]", "b = f32[]"],
    )
    assert "differs first at [0]: got 0.0, wanted " in report.failure.message
    assert "seed 3" in str(report) and "a = f32[1]" in str(report)


def test_strides_and_runtime_extents_are_told() -> None:
    strides = check("silu", KernelDevice("mistaken", read=planted.without_strides), examples=100, seed=3).failure
    assert strides is not None and "strides [" in str(strides)
    runtime = check("mean", KernelDevice("mistaken", finish=planted.divided_by_the_maximum), examples=150, seed=3).failure
    assert runtime is not None and any(line.startswith("T = ") and ", at most " in line for line in runtime.case)


def test_a_seed_draws_the_same() -> None:
    def said(seed: int) -> str:
        return str(check("rms_norm", KernelDevice("mistaken", finish=planted.tail_of_16), examples=40, seed=seed))

    assert said(5) == said(5)


def test_what_a_backend_lacks_is_counted_not_failed() -> None:
    report = check("rms_norm", StrictDevice("strict", refused=("rms_norm",)), examples=10, seed=3)
    assert (report.ok, report.cases, report.unsupported) == (True, 0, 10)
    by_expansion = check("swiglu", StrictDevice("strict", refused=("swiglu",)), examples=10, seed=3)
    assert (by_expansion.ok, by_expansion.cases) == (True, 10)


def test_coverage_says_how_an_op_is_run() -> None:
    with registered("partial", lambda name: StrictDevice(name, refused=("swiglu", "rms_norm"))) as backend:
        found = {s.op: str(s) for s in coverage(["swiglu", "rms_norm", "add"], [backend])}
    assert found == {"swiglu": "by expansion", "rms_norm": "no", "add": "yes"}


def test_coverage_of_a_backend_that_is_not_here() -> None:
    def absent(name: str) -> StrictDevice:
        raise InputError("[device] wanted a GPU; got none")

    with registered("missing", absent) as backend:
        assert [s.how for s in coverage(["add"], [backend])] == ["absent"]
    with pytest.raises(UnknownNameError):
        coverage(["add"], ["nowhere"])


# An op of a user's own.

MADE_UP = """
import numpy as np
from tensorgraph.op import Attr, Op

madeup = Op("madeup", "x[..., D]: float, w[D]?: real -> y[..., D]: f32",
            attrs={"a": Attr(float, low=0.5), "n": Attr(int, 1, low=1)},
            source="its author")

@madeup.reference
def reference(x, w, *, a, n):
    y = np.tanh(a * x) * n
    return y if w is None else y * w

@madeup.law
def bounded(run, x, w, *, a, n):
    assert np.all(np.abs(run(x, None, a=a, n=n)) <= LIMIT * n)
"""


@pytest.fixture
def user_folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for name in ("madeup", "unsaid", "unmeant", "two_faced"):
        registry.ops.remove(name)


def declare(folder: Path, source: str) -> None:
    path = folder / "user_ops.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("user_ops", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_made_up_op_conforms_without_another_file(user_folder: Path) -> None:
    declare(user_folder, MADE_UP.replace("LIMIT", "1"))
    (result,) = as_json("test-ops", "--op", "madeup", "--backend", "reference", "--examples", 25)["results"]
    assert result["ok"] and result["cases"] == 25 and result["failure"] is None
    with registered("mistaken", lambda name: KernelDevice(name, finish=planted.tail_of_16)):
        shown = tg("test-ops", "--op", "madeup", "--backend", "mistaken", "--examples", 60)
    assert shown.exit_code == 1
    assert (
        "madeup on mistaken" in shown.stdout and "FAIL" in shown.stdout and "x = " in shown.stdout and "a = 0.5" in shown.stdout
    )


def test_a_law_that_does_not_hold_fails(user_folder: Path) -> None:
    declare(user_folder, MADE_UP.replace("LIMIT", "0.01"))
    failure = check("madeup", "reference", examples=60, seed=3).failure
    assert failure is not None and failure.part == "law bounded"


def test_an_expansion_that_is_another_op_fails(user_folder: Path) -> None:
    op = Op("two_faced", "x[...]: real -> y[...]: x")
    op.reference(lambda x: 2 * x)
    op.expand(lambda x: x * 2.0001)
    failure = check(op, "reference", examples=60, seed=3).failure
    assert failure is not None and failure.part == "expansion"


def test_an_expansion_is_meaning_enough(user_folder: Path) -> None:
    op = Op("two_faced", "x[...]: real -> y[...]: x")
    op.expand(lambda x: x * 2.0 - 1.0)
    assert check(op, "reference", examples=60, seed=3).ok
    wrong = check(op, KernelDevice("mistaken", finish=planted.hundred_units), examples=60, seed=3)
    assert not wrong.ok


def test_ops_that_say_too_little_are_refused_by_a_sentence(user_folder: Path) -> None:
    unsaid = Op("unsaid")
    with pytest.raises(GraphError, match="signature or `cases`"):
        check(unsaid, "reference", examples=5)
    unmeant = Op("unmeant", "x[...]: real -> y[...]: x")
    assert check(unmeant, StrictDevice("strict"), examples=5).cases == 0  # nothing runs it, so nothing is claimed


def test_without_hypothesis_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(InputError, match=r"wanted the package hypothesis.*\[test\]"):
        check("add", "reference")


# The criterion itself.


def verdict(got: Array, x: Array, compute: Any, tolerance: float = 1e-10) -> Report | Any:
    """`got` judged as the result of `compute` for x."""

    def meaning(slots: Any, kind: Any = np.float64) -> Array:
        return np.asarray(compute(slots["x"].astype(kind)), np.float64)

    return judge(got, meaning({"x": x}), got.dtype, tolerance, meaning, {"x": x})


def test_half_a_unit_is_allowed_and_one_is_not() -> None:
    x = np.linspace(1, 2, 100, dtype=np.float32)
    right = np.exp(x.astype(np.float64)).astype(np.float16)
    assert verdict(right, x, np.exp).ok
    away = np.nextafter(right, np.float16(np.inf))
    assert not verdict(np.where(np.arange(100) == 57, away, right), x, np.exp).ok


def test_a_small_element_does_not_hide_behind_a_large_one() -> None:
    x = np.array([1e12, 1e-12], np.float32)
    assert verdict(x * 2, x, lambda v: v * 2).ok
    wrong = verdict(np.array([2e12, 0], np.float32), x, lambda v: v * 2)
    assert not wrong.ok and wrong.at == (1,)


def test_a_cancelling_sum_may_err_by_its_terms_roundings() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(100).astype(np.float32)
    x[-1] = -x[:-1].sum(dtype=np.float64)
    exact = float(x.sum(dtype=np.float64))  # about 1e-8
    one_by_one = np.cumsum(x[::-1], dtype=np.float32)[-1:]
    assert abs(one_by_one[0] - exact) > 0.1 * abs(exact)

    def total(v: Array) -> Array:
        return np.sum(v, keepdims=True)

    assert verdict(one_by_one, x, total).ok
    assert not verdict(one_by_one + np.float32(1e-3), x, total).ok


def test_a_tie_is_no_excuse() -> None:
    x = np.array([2.0, 3.5], np.float32)
    assert verdict(np.array([2.0, 3.0], np.float32), x, np.floor).ok
    assert not verdict(np.array([1.0, 3.0], np.float32), x, np.floor).ok


def test_a_sine_of_a_large_number_may_be_any_sine_but_nan() -> None:
    x = np.array([1e12], np.float32)
    assert verdict(np.array([-0.5], np.float32), x, np.sin).ok
    assert not verdict(np.array([np.nan], np.float32), x, np.sin).ok
    assert not verdict(np.array([-0.5], np.float32), x / 1e12, np.sin).ok


def test_infinity_begins_where_rounding_does() -> None:
    x = np.array([3.4028234e38, 1e38], np.float32)
    top = np.array([np.inf, np.inf], np.float32)
    assert verdict(top, x, lambda v: np.float64(v) * 4).ok
    assert verdict(np.array([np.inf, 1e38], np.float32), x, lambda v: v * 1.0).ok  # within what is allowed of the largest
    assert not verdict(top, x, lambda v: v * 1.0).ok
    assert not verdict(-top, x, lambda v: np.float64(v) * 4).ok


def test_nan_and_infinity_are_one_where_a_rounding_parts_them() -> None:
    def scaled(v: Array) -> Array:
        return (v - v.mean()) * np.inf

    nan, top = np.full(5, np.nan, np.float32), np.full(5, np.inf, np.float32)
    same, apart = np.full(5, 0.1, np.float32), np.arange(5, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        assert verdict(nan, same, scaled).ok and verdict(top, same, scaled).ok
        assert not verdict(nan, apart, scaled).ok and not verdict(top, apart, scaled).ok
        assert not verdict(top, same, lambda v: v * np.nan).ok


def test_a_tolerance_of_zero_is_equality() -> None:
    x = np.array([1.0, np.nan, -np.inf], np.float32)
    assert verdict(x, x, lambda v: v, tolerance=0.0).ok
    assert not verdict(np.nextafter(x, np.float32(9)), x, lambda v: v, tolerance=0.0).ok
