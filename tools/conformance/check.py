"""Checking one op on one backend: drawn cases, the criterion, the op's laws, its expansion, and the smallest case that fails."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.device import Device, get_devices
from tensorgraph.dims import evaluate_shape
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError, UnsupportedError
from tensorgraph.op import Op
from tensorgraph.tools.conformance.case import Case, draw_any
from tensorgraph.tools.conformance.case_text import Recorder, Replay, case_text, parse_case
from tensorgraph.tools.conformance.criterion import judge
from tensorgraph.tools.conformance.draw import Array, Draw, Slots, is_finite
from tensorgraph.tools.conformance.evaluate import OPTIONS, Meaning, runner
from tensorgraph.tools.conformance.watched import Overwritten, Watched, in_place, on_other_threads

Attrs = Mapping[str, Any]

SHOWN_LINES = 12


@dataclass(frozen=True)
class Failure:
    """What went wrong and for which case, the smallest found.

    `part` is "reference", "expansion", "lowering NAME", "law NAME", "rows", "second run", "threads", "in place", "memory" or
    "result"; `case` holds a line for each input with its dtype, shape and strides, one for the attributes, and one for the
    Dims; `text` is what `check_case` takes, empty where something was drawn that has no text.
    """

    part: str
    message: str
    case: tuple[str, ...]
    text: str = ""

    def __str__(self) -> str:
        return "\n".join((f"{self.part}: {self.message}", *(f"  {line}" for line in self.case)))

    def again(self, backend: str) -> str:
        """The command that runs the case again."""
        return f"tensorgraph test-ops --backend {backend} --case {shlex.quote(self.text)}" if self.text else ""


@dataclass(frozen=True)
class Report:
    """The outcome for one op on one backend.

    `cases` ran, `unsupported` are those that the backend refuses; `worst` is the largest error as a fraction of the allowed.
    """

    op: str
    backend: str
    seed: int
    cases: int
    unsupported: int
    worst: float
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None

    def __str__(self) -> str:
        head = f"{self.op} on {self.backend}: {self.cases} cases, {self.unsupported} not supported, seed {self.seed}"
        if self.failure is None:
            return f"{head}, worst {self.worst:.3g} of the allowed error"
        return "\n".join(filter(None, (head, str(self.failure), self.failure.again(self.backend))))


class NotConforming(AssertionError):
    """A case that fails; it carries what to say about it."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(f"{part}: {message}")
        self.part, self.message = part, message


@dataclass
class _Tally:
    cases: int = 0
    unsupported: int = 0
    worst: float = 0.0
    failure: Failure | None = None

    def count(self, op: Op, device: Device, draw: Draw) -> None:
        """Draw a case, check it and keep what came of it; after a failure, only of further failures.

        Raises: NotConforming: the case fails.
        """
        recorder = Recorder(draw)
        case, drawn = draw_any(op, recorder)
        worst, message = 0.0, None
        try:
            worst = _conform(case, drawn, device)
        except UnsupportedError:
            self.unsupported += self.failure is None
            return
        except NotConforming as error:
            message = (error.part, error.message)
        except Overwritten as error:
            message = ("memory", str(error))
        except Exception as error:
            message = ("result", _short(f"{type(error).__name__}: {error}"))
        if message is not None:
            self.failure = Failure(*message, tuple(case.lines()), _text_of(op, recorder))
            raise NotConforming(*message)
        if self.failure is None:
            self.cases, self.worst = self.cases + 1, max(self.worst, worst)

    def report(self, op: Op, device: Device, seed: int) -> Report:
        worst = float("inf") if self.failure is not None else self.worst
        return Report(op.name, device.name, seed, self.cases, self.unsupported, worst, self.failure)


def _text_of(op: Op, recorder: Recorder) -> str:
    try:
        return case_text(op.name, recorder.given)
    except InputError:
        return ""


def hypothesis() -> Any:
    """The package that draws and shrinks cases.

    Raises: InputError: it is not installed.
    """
    try:
        import hypothesis as package
    except ImportError as error:
        hint = "pip install 'tensorgraph-runtime[test]'"
        raise InputError(f"[test-ops] wanted the package hypothesis, which draws cases ({hint}); got {error}") from error
    return package


def check(op: str | Op, backend: str | Device, *, examples: int = 30, seed: int | None = None) -> Report:
    """Compare an op on a backend with the reference, for `examples` cases drawn from the op's declaration.

    Each case holds its inputs densely, as views with other strides, as constants or, where the signature allows, as weights of
    a block type, and may have an axis that is known only when a step runs. The result must conform to the reference and to
    the op's expansion by `criterion`, and so must every guarded form of it. It must be the same to the bit in a second run, on
    another number of threads, and where it takes an input's memory; nothing else in memory may change. Some rows alone must
    give some rows of the reference where the op says so (`Op.row_inputs`), and the op's laws must hold for finite numbers.

    Raises:
        UnknownNameError: there is no such op or backend.
        GraphError: nothing says which inputs the op takes.
        InputError: hypothesis is not installed.
    """
    package = hypothesis()
    wanted = op if isinstance(op, Op) else registry.ops.get(op)
    (device,) = get_devices(backend)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    tally = _Tally()
    try:
        run_drawn(package, lambda data: tally.count(wanted, device, data.draw), examples, seed)
    except NotConforming:
        pass
    except package.errors.Flaky:
        if tally.failure is None:
            raise
        tally.failure = replace(tally.failure, part=f"{tally.failure.part}, not every time")
    return tally.report(wanted, device, seed)


def check_case(text: str, backend: str | Device) -> Report:
    """Compare one case, which a failure before gave as its `text`.

    Raises:
        UnknownNameError: there is no such op or backend.
        InputError: the text is no case, or its op's declaration draws other ones now; hypothesis is not installed.
    """
    hypothesis()
    name, draw = parse_case(text)
    op, (device,), tally = registry.ops.get(name), get_devices(backend), _Tally()
    try:
        draw_any(op, draw)
    except Exception as error:
        raise InputError(f"[case] wanted a case as {name} is declared now; got {text} ({error})") from error
    if draw.at != len(draw.given):
        raise InputError(f"[case] wanted {draw.at} values, as {name} is declared now; got {len(draw.given)}: {text}")
    try:
        tally.count(op, device, Replay(draw.given))
    except NotConforming:
        pass
    return tally.report(op, device, 0)


def run_drawn(package: Any, one: Any, examples: int, seed: int) -> None:
    """Call `one(data)` for cases that a seed determines, then for smaller and smaller ones that fail; raises what `one` does."""
    phase = package.Phase
    options = package.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=package.Verbosity.quiet,
        phases=(phase.generate, phase.target, phase.shrink),
        suppress_health_check=list(package.HealthCheck),
    )

    def drawn(data: Any) -> None:
        one(data)

    package.seed(seed)(options(package.given(data=package.strategies.data())(drawn)))()


def _conform(case: Case, drawn: Slots, device: Device) -> float:
    """Run a case; the largest error as a fraction of the allowed.

    Raises: NotConforming, UnsupportedError.
    """
    op, values = case.op, case.values
    watched = Watched(case.node, case.stored, device, case.dims)
    got, again = watched.run(), watched.run()
    dtypes = {slot: as_dtype(x.dtype) for slot, x in values.items()}
    meaning = Meaning(op, case.attrs, dtypes, rounds=op.expansion is not None and not device.supports(case.node))
    both = op.reference_fn is not None and op.expansion is not None
    parts = ("reference", "expansion") if both else ("reference",)
    worst = max(_judged(part, got, case, replace(meaning, expanded=part == "expansion")) for part in parts)
    if again.tobytes() != got.tobytes():
        raise NotConforming("second run", "the same plan gives other bits when it is run again")
    for threads, result in on_other_threads(watched):
        if result.tobytes() != got.tobytes():
            raise NotConforming("threads", f"with {threads} threads the same plan gives other bits")
    for slot in sorted(op.inplace & case.operands.keys()):
        pair = in_place(case.node, slot, case.stored, device, case.dims)
        if pair is not None and pair[0].tobytes() != pair[1].tobytes():
            raise NotConforming("in place", f"the result is another one where it takes the memory of {slot}")
    for form in op.lowerings:
        options = replace(OPTIONS, lowerings=(form.name,))
        lowered = Watched(case.node, case.stored, device, case.dims, options).run()
        worst = max(worst, _judged(f"lowering {form.name}", lowered, case, meaning))
    if not _rows_stand_alone(meaning, values):
        raise NotConforming("rows", f"some rows of {', '.join(op.row_inputs)} alone do not give those rows of the result")
    for part, error in _broken_laws(op, drawn, case.attrs, device) if is_finite(drawn) else ():
        raise NotConforming(part, error)
    return worst


def _judged(part: str, got: Array, case: Case, meaning: Meaning) -> float:
    """The largest error of a result by `meaning`, as a fraction of the allowed.

    Raises: NotConforming.
    """
    node, values = case.node, case.values
    dtype, shape = np.dtype(np.float32) if node.dtype.is_block else node.dtype.numpy, evaluate_shape(node.shape, case.dims)
    assert dtype is not None
    if got.shape != shape or got.dtype != dtype:
        raise NotConforming("result", f"wanted {dtype}{list(shape)}; got {got.dtype}{list(got.shape)}")
    exact = meaning(values)
    if exact.shape != shape:
        raise NotConforming(part, f"the {part} itself gives {list(exact.shape)} where the shape rule says {list(shape)}")
    verdict = judge(got, exact, dtype, case.op.tolerance, meaning, values)
    if not verdict.ok:
        gone = f"got {verdict.got}, wanted {verdict.wanted}"
        error = f"error {_fraction(verdict.worst)} of the allowed, {verdict.allowed:.3g} here"
        raise NotConforming(part, f"differs first at {list(verdict.at)}: {gone} ({error})")
    return verdict.worst


def _rows_stand_alone(meaning: Meaning, slots: Slots) -> bool:
    """Whether the last and the first row of matrices that are said to go by rows give those of the result."""
    whole = meaning(slots) if meaning.op.row_inputs else None
    if whole is None or whole.ndim != 2 or not len(whole):
        return True
    rows = [slot for slot, x in slots.items() if slot in meaning.op.row_inputs and x.ndim == 2 and len(x) == len(whole)]
    more = {**slots, **{slot: np.concatenate([slots[slot], np.flip(slots[slot], axis=-1)]) for slot in rows}}  # two at least
    whole, ids = meaning(more), [2 * len(whole) - 1, 0]
    few = meaning({**more, **{slot: more[slot][ids] for slot in rows}})
    finite = np.abs(whole[np.isfinite(whole)])
    return np.allclose(few, whole[ids], rtol=1e-9, atol=1e-12 * float(finite.max(initial=0)), equal_nan=True)


def _broken_laws(op: Op, slots: Slots, attrs: Attrs, device: Device) -> Iterator[tuple[str, str]]:
    arguments: tuple[Array | None, ...] = op.arguments(slots)
    for law in op.laws:
        try:
            law(runner(op, device), *arguments, **op.check_attrs(attrs))
        except UnsupportedError:  # a law may run the op on other types than the case's
            continue
        except Exception as error:
            yield f"law {law.__name__}", _short(str(error) or type(error).__name__)


def _short(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n    ".join(lines[:SHOWN_LINES])


def _fraction(worst: float) -> str:
    return "beyond any multiple" if worst == float("inf") else f"{worst:.3g} times"
