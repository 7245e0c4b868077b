"""Native kernels broken on purpose, one of each family: conformance catches each, and says by which of its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.backends.cpu.codes import Codes
from tensorgraph.backends.cpu.device import code_for
from tensorgraph.backends.cpu.elementwise import cpu_formula
from tensorgraph.backends.cpu.ir import F32, F64, Value
from tensorgraph.backends.cpu.kernel import Call, Context, Kernel, NodeKernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.weights import FORMS, Interleaved, interleaved
from tensorgraph.dims import product
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import Node
from tensorgraph.op import Op
from tensorgraph.tools.conformance import check, check_case
from tensorgraph.tools.op_pages import family_of
from tensorgraph.views import IndexMap

Tampering = Callable[[Sequence[Call]], Sequence[Call]]


@contextmanager
def broken(name: str, make: Callable[[Op], Any]) -> Iterator[Op]:
    """The op with another kernel on the CPU, for as long as the context lasts; no code is shared with what comes after."""
    op = registry.ops.get(name)
    right = op.kernel("cpu")
    with apart():
        try:
            make(op)
            yield op
        finally:
            op.kernels["cpu"] = right


@contextmanager
def apart() -> Iterator[None]:
    """Devices made meanwhile have code of their own: a process finds kernels by the ops' names."""
    code_for.cache_clear()
    try:
        yield
    finally:
        code_for.cache_clear()


def tampered(change: Tampering) -> Callable[[Op], None]:
    """The right kernel with its calls changed."""

    def make(op: Op) -> None:
        right: NodeKernel = op.kernels["cpu"]

        def calls(node: Node, context: Context) -> Sequence[Call]:
            return change(right.calls(node, context))

        op.kernels["cpu"] = NodeKernel(calls, right.supports, right.reads)

    return make


def window_one_short(calls: Sequence[Call]) -> Sequence[Call]:
    """A token sees one row less than it should, of those that a window lets it see."""

    def short(call: Call) -> Call:
        heads = call.attrs.get("heads")  # of the form in tiles
        rules = heads.rules if heads is not None else call.attrs["rules"]
        segments = tuple((every, window and window - 1, causal) for every, window, causal in rules)
        changed = {"rules": segments} if heads is None else {"heads": replace(heads, rules=segments)}
        return replace(call, attrs={**call.attrs, **changed})

    return [short(call) for call in calls]


def single_precision_sigmoid(op: Op) -> None:
    """Right but for large negative numbers, whose exp overflows in f32 before it is divided by."""

    @cpu_formula(op)
    def formula(k: Kernel, x: Value) -> Value:
        e = k.convert(k.call("exp", F64.x(x.lanes) if x.lanes else F64, k.convert(-x, F64)), F32)
        return k.convert(k.convert(x, F32) / ((e + 1.0) * (e + 1.0)) * (e + 1.0), F64)


def whole_vectors_only(op: Op) -> None:
    """The last vector of a row is written whole, over what lies behind the row."""

    @cpu_kernel(op)
    def emit(k: Kernel, x: Operand, y: Operand, *, eps: float) -> None:
        with k.rows(y.shape[:-1]) as index:
            row, out, length = x.row(index), y.row(index), k.i64(y.shape[-1])

            def square(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
                v = k.convert(row.load(i, k.lanes, mask), F64)
                return [k.fma(v, v, sums[0])]

            (squares,) = k.sweep(length, square, [k.zero(F64.x(k.lanes))])
            divisor = k.max(k.unary("sqrt", k.sum(squares)), eps)

            def write(i: Value, mask: Value | None, _: list[Value]) -> None:
                out.store(i, k.convert(k.convert(row.load(i, k.lanes, mask), F64) / divisor, y.type))

            k.sweep(length, write)


def table_of_the_first_token(calls: Sequence[Call]) -> Sequence[Call]:
    """All tokens are turned as the first one is."""
    (call,) = calls
    ref = call.operands["table"]
    assert ref is not None and isinstance(ref.of, Node)
    index_map = ref.index_map or ref.of.index_map
    still = replace(index_map, strides=(0, *index_map.strides[1:]))
    return [replace(call, operands={**call.operands, "table": replace(ref, index_map=still)})]


def rounded_by_threads(op: Op) -> None:
    """The last bits depend on which thread computes a row."""

    @cpu_kernel(op)
    def emit(k: Kernel, x: Operand, y: Operand) -> None:
        with k.rows(y.shape[:-1]) as index:
            row, out = x.row(index), y.row(index)
            with k.loop(0, k.i64(y.shape[-1]), 1, [k.zero(F64)]) as loop:
                total = loop.values[0] + k.convert(row.load(loop.i), F64)
                out.store(loop.i, k.convert(total * (k.convert(k.thread, F64) * 2e-7 + 1.0), y.type))
                loop.next(total)


def cleared_first(op: Op) -> None:
    """The result is cleared before the input is read: right only while they lie apart."""

    @cpu_kernel(op)
    def emit(k: Kernel, x: Operand, y: Operand, *, eps: float) -> None:
        with k.rows(y.shape[:-1]) as index:
            row, out = x.row(index), y.row(index)

            def clear(i: Value, mask: Value | None, _: list[Value]) -> None:
                out.store(i, k.zero(y.type.x(k.lanes)), mask)

            def square(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
                v = k.convert(row.load(i, k.lanes, mask), F64)
                return [k.fma(v, v, sums[0])]

            k.sweep(y.shape[-1], clear)
            (squares,) = k.sweep(y.shape[-1], square, [k.zero(F64.x(k.lanes))])
            divisor = k.max(k.unary("sqrt", k.sum(squares)), eps)

            def write(i: Value, mask: Value | None, _: list[Value]) -> None:
                out.store(i, k.convert(k.convert(row.load(i, k.lanes, mask), F64) / divisor, y.type), mask)

            k.sweep(y.shape[-1], write)


def uses_its_input_up(op: Op) -> None:
    """Rows are summed in their own memory."""

    @cpu_kernel(op, work=lambda node: 64)
    def emit(k: Kernel, x: Operand, y: Operand) -> None:
        with k.rows(y.shape[:-1]) as index:
            row = x.row(index)
            with k.loop(0, k.i64(x.shape[-1]), 1, [k.zero(F64)]) as loop:
                total = loop.values[0] + k.convert(row.load(loop.i), F64)
                row.store(loop.i, k.convert(total, x.type))
                loop.next(total)
            y.store([*index, 0], k.convert(loop.results[0] / k.convert(k.i64(x.shape[-1]), F64), y.type))


def summed_onto_what_is_there(op: Op) -> None:
    """The sum begins with what memory holds, which is zero the first time."""

    @cpu_kernel(op, work=lambda node: 64)
    def emit(k: Kernel, x: Operand, y: Operand) -> None:
        with k.rows(y.shape[:-1]) as index:
            row = x.row(index)
            start = k.convert(y.load([*index, 0]), F64)
            with k.loop(0, k.i64(x.shape[-1]), 1, [start]) as loop:
                loop.next(loop.values[0] + k.convert(row.load(loop.i), F64))
            y.store([*index, 0], k.convert(loop.results[0], y.type))


def never_copied(calls: Sequence[Call]) -> Sequence[Call]:
    """The destination is not copied: right only where the result takes its memory."""
    return calls[1:]


def strides_ignored(calls: Sequence[Call]) -> Sequence[Call]:
    """The input is read as if it were dense."""
    (call,) = calls
    ref = call.operands["x"]
    assert ref is not None and isinstance(ref.of, Node)
    shape = ref.of.shape
    dense = IndexMap.dense(shape)
    return [replace(call, operands={**call.operands, "x": replace(ref, index_map=dense)})] if product(shape) != 0 else calls


def last_one_left_out(calls: Sequence[Call]) -> Sequence[Call]:
    """Of several inputs the last is not joined."""
    return calls[:-1] if len(calls) > 1 else calls


BROKEN: list[tuple[str, Callable[[Op], Any], str]] = [
    ("flash_attn", tampered(window_one_short), "reference"),
    ("silu", single_precision_sigmoid, "reference"),
    ("l2_norm", whole_vectors_only, "memory"),
    ("rotate", tampered(table_of_the_first_token), "reference"),
    ("fwht", tampered(strides_ignored), "reference"),
    ("sum_rows", summed_onto_what_is_there, "reference"),
    ("scatter", tampered(never_copied), "reference"),
    ("argsort", tampered(strides_ignored), "reference"),
    ("concat", tampered(last_one_left_out), "reference"),
    ("cumsum", rounded_by_threads, "threads"),
    ("l2_norm", cleared_first, "in place"),
    ("mean", uses_its_input_up, "memory"),
]


@pytest.mark.parametrize(("name", "make", "part"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_broken_kernel_is_caught(name: str, make: Callable[[Op], Any], part: str) -> None:
    with broken(name, make):
        report = check(name, "cpu", examples=200, seed=3)
        found = report.failure.part.partition(",")[0] if report.failure is not None else ""
        chance = part == "threads"  # who computes which row, in a second run too
        assert report.failure is not None and found in (part, "second run" if chance else part), str(report)
        if not chance:
            again = check_case(report.failure.text, "cpu")
            assert again.failure is not None and again.failure.part == part, str(again)
    right = check_case(report.failure.text, "cpu")
    assert right.ok and right.cases == 1, str(right)


def test_a_broken_format_is_caught() -> None:
    """The family that has no ops: how kernels read types of weights."""
    interleaved(as_dtype("q8_0"))  # which fills the table
    right = {name: form for name, form in FORMS.items() if form.codes is not None}

    class Swapped(Codes):
        def group(self, k: Kernel, at: Value, part: int, lanes: int, g: int) -> Value:
            return super().group(k, at, part, lanes, g ^ 1)

    def swapped(form: Interleaved) -> Interleaved:
        return replace(form, codes=Swapped(**{f.name: getattr(form.codes, f.name) for f in fields(Codes)}))

    with apart():
        try:
            FORMS.update({name: swapped(form) for name, form in right.items()})
            report = check("mul_mat", "cpu", examples=200, seed=3)
        finally:
            FORMS.update(right)
    assert report.failure is not None and report.failure.part == "reference"
    assert any(line.endswith("(blocks)") for line in report.failure.case)
    assert check_case(report.failure.text, "cpu").ok


def test_each_family_has_one() -> None:
    families = {family_of(registry.ops.get(name)) for name in registry.ops}
    assert {family_of(registry.ops.get(name)) for name, _, _ in BROKEN} >= families - {"user_family"}
