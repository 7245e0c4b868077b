"""Checking one op on one backend: drawn cases, the criterion, the op's laws, its expansion, and the smallest case that fails."""

from __future__ import annotations

import random
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
from tensorgraph.tools.conformance.criterion import judge
from tensorgraph.tools.conformance.draw import Array, Slots
from tensorgraph.tools.conformance.evaluate import Meaning, evaluate_twice, runner

Attrs = Mapping[str, Any]

SHOWN_LINES = 12


@dataclass(frozen=True)
class Failure:
    """What went wrong and for which case, the smallest found.

    `part` is "reference", "law NAME", "expansion", "rows", "second run" or "result"; `case` holds a line for each input with its
    dtype, shape and strides, one for the attributes, and one for the Dims.
    """

    part: str
    message: str
    case: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((f"{self.part}: {self.message}", *(f"  {line}" for line in self.case)))


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
        return f"{head}, worst {self.worst:.3g} of the allowed error" if self.failure is None else f"{head}\n{self.failure}"


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
    the op's expansion by `criterion`, a second run must give the same bits, some rows alone must give some rows of the
    reference where the op says so (`Op.row_inputs`), and the op's laws must hold.

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

    def one(data: Any) -> None:
        case, drawn = draw_any(wanted, data.draw)
        worst, message = 0.0, None
        try:
            worst = _conform(case, drawn, device)
        except UnsupportedError:
            tally.unsupported += tally.failure is None
            return
        except NotConforming as error:
            message = (error.part, error.message)
        except Exception as error:
            message = ("result", _short(f"{type(error).__name__}: {error}"))
        if message is not None:
            tally.failure = Failure(*message, tuple(case.lines()))
            raise NotConforming(*message)
        if tally.failure is None:
            tally.cases, tally.worst = tally.cases + 1, max(tally.worst, worst)

    try:
        run_drawn(package, one, examples, seed)
    except NotConforming:
        pass
    except package.errors.Flaky:
        if tally.failure is None:
            raise
        tally.failure = Failure(f"{tally.failure.part}, not every time", tally.failure.message, tally.failure.case)
    worst = float("inf") if tally.failure is not None else tally.worst
    return Report(wanted.name, device.name, seed, tally.cases, tally.unsupported, worst, tally.failure)


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
    got, again = evaluate_twice(case.node, case.stored, device, case.dims)
    dtype = np.dtype(np.float32) if case.node.dtype.is_block else case.node.dtype.numpy
    shape = evaluate_shape(case.node.shape, case.dims)
    assert dtype is not None
    if got.shape != shape or got.dtype != dtype:
        raise NotConforming("result", f"wanted {dtype}{list(shape)}; got {got.dtype}{list(got.shape)}")
    worst, dtypes = 0.0, {slot: as_dtype(x.dtype) for slot, x in values.items()}
    meaning = Meaning(op, case.attrs, dtypes, rounds=op.expansion is not None and not device.supports(case.node))
    both = op.reference_fn is not None and op.expansion is not None
    for part in ("reference", "expansion") if both else ("reference",):
        exact = replace(meaning, expanded=part == "expansion")(values)
        if exact.shape != shape:
            raise NotConforming(part, f"the {part} itself gives {list(exact.shape)} where the shape rule says {list(shape)}")
        verdict = judge(got, exact, dtype, op.tolerance, meaning, values)
        if not verdict.ok:
            gone = f"got {verdict.got}, wanted {verdict.wanted}"
            error = f"error {_fraction(verdict.worst)} of the allowed, {verdict.allowed:.3g} here"
            raise NotConforming(part, f"differs first at {list(verdict.at)}: {gone} ({error})")
        worst = max(worst, verdict.worst)
    if again.tobytes() != got.tobytes():
        raise NotConforming("second run", "the same plan gives other bits when it is run again")
    if not _rows_stand_alone(meaning, values):
        raise NotConforming("rows", f"some rows of {', '.join(op.row_inputs)} alone do not give those rows of the result")
    for part, error in _broken_laws(op, drawn, case.attrs, device):
        raise NotConforming(part, error)
    return worst


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
