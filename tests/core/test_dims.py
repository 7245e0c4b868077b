"""Extents: their arithmetic is that of the integers they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.dims import (
    ALWAYS,
    Dim,
    Extent,
    as_extent,
    divide_exact,
    evaluate,
    evaluate_shape,
    maximum,
    product,
    shape_text,
    unify,
)
from tensorgraph.errors import GraphError, ShapeError

DIMS = (Dim("A", 5), Dim("B", 12), Dim("C", 1))
T, S = Dim("T", 16), Dim("S", 100)


@dataclass(frozen=True)
class Formula:
    """An extent, and the same formula over plain integers."""

    extent: Extent
    number: Callable[[dict[str, int]], int]


def leaf(value: int | Dim) -> Formula:
    if isinstance(value, int):
        return Formula(value, lambda v: value)
    return Formula(value, lambda v: v[value.name])


def combine(parts: st.SearchStrategy[Formula]) -> st.SearchStrategy[Formula]:
    def binary(a: Formula, b: Formula, sign: str) -> Formula:
        if sign == "+":
            return Formula(a.extent + b.extent, lambda v: a.number(v) + b.number(v))
        if sign == "-":
            return Formula(a.extent - b.extent, lambda v: a.number(v) - b.number(v))
        return Formula(a.extent * b.extent, lambda v: a.number(v) * b.number(v))

    def floored(a: Formula, n: int) -> Formula:
        return Formula(a.extent // n, lambda v: a.number(v) // n)

    return st.builds(binary, parts, parts, st.sampled_from("+-*")) | st.builds(floored, parts, st.integers(1, 9))


leaves = st.builds(leaf, st.integers(0, 9) | st.sampled_from(DIMS))
formulas = st.recursive(leaves, combine, max_leaves=8)
polynomials = st.recursive(
    leaves, lambda p: st.builds(lambda a, b, s: combine_plain(a, b, s), p, p, st.sampled_from("+-*")), max_leaves=6
)
values = st.fixed_dictionaries({d.name: st.integers(0, d.max) for d in DIMS})


def combine_plain(a: Formula, b: Formula, sign: str) -> Formula:
    operate = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}[sign]
    return Formula(operate(a.extent, b.extent), lambda v: operate(a.number(v), b.number(v)))


@given(formulas, values)
@settings(max_examples=300)
def test_arithmetic_is_that_of_integers(formula: Formula, given_values: dict[str, int]) -> None:
    assert evaluate(formula.extent, given_values) == formula.number(given_values)


@given(formulas, values)
@settings(max_examples=300)
def test_bounds_hold_for_every_value(formula: Formula, given_values: dict[str, int]) -> None:
    least = formula.extent if isinstance(formula.extent, int) else formula.extent.min
    assert least <= formula.number(given_values) <= maximum(formula.extent)


@given(polynomials, polynomials)
@settings(max_examples=300)
def test_polynomials_are_equal_exactly_when_they_are_the_same_function(a: Formula, b: Formula) -> None:
    # Degrees and coefficients are small: equal at these far apart points means equal everywhere.
    points = [{"A": 10**7 + i, "B": 10**15 + 3 * i, "C": 10**31 + 7 * i} for i in range(3)]
    same = all(a.number(p) == b.number(p) for p in points)
    assert (a.extent == b.extent) == same
    assert not same or (hash(a.extent) == hash(b.extent) and str(a.extent) == str(b.extent))


@given(polynomials, polynomials, polynomials)
@settings(max_examples=100)
def test_the_order_of_writing_does_not_matter(a: Formula, b: Formula, c: Formula) -> None:
    x, y, z = a.extent, b.extent, c.extent
    assert x + y == y + x and x * y == y * x
    assert (x + y) + z == x + (y + z) and (x * y) * z == x * (y * z)
    assert x * (y + z) == x * y + x * z
    assert x - x == 0


@given(formulas, st.integers(1, 9), values)
@settings(max_examples=200)
def test_an_exact_quotient_is_exact(formula: Formula, divisor: int, given_values: dict[str, int]) -> None:
    assert divide_exact(formula.extent * divisor, divisor) == formula.extent
    quotient = divide_exact(formula.extent, divisor)
    if quotient is not None:
        assert evaluate(quotient, given_values) * divisor == formula.number(given_values)


def test_quotients_by_dims() -> None:
    assert divide_exact(T * S * 4, T * 2) == S * 2
    assert divide_exact(T * S, T * T) is None
    assert divide_exact(T * 3, 2) is None
    assert divide_exact(T + 1, T + 1) == 1
    assert divide_exact((T + 1) * 6, T + 1) == 6 and divide_exact((T * 2 + S) * S, T * 2 + S) == S
    assert divide_exact((T + 1) * 6 + 1, T + 1) is None and divide_exact(T + 1, 0) is None
    assert (T * 4 + 8) // 4 == T + 2
    assert str(T // 4) == "T//4" and str((T + 1) // 4) == "(T + 1)//4"


def test_equal_quotients_are_equal() -> None:
    assert T // 4 // 2 == T // 8 and (T * 3 // 4) // 3 == T // 4 and (T // 4 * 2) // 6 == T // 12
    assert (T * 2) // 4 == T // 2 and (T * 6 + 5) // 4 == (T * 3 + 2) // 2 and (T * 2 + 1) // 4 == T // 2
    assert (T + 5) // 4 == (T + 1) // 4 + 1 and (T * 4 + 3) // 4 == T and (T * 4 + S) // 4 == T + S // 4
    assert (T - 1) // 4 == (T + 3) // 4 - 1 and T // 4 != (T + 1) // 4


def test_the_ceiling_idiom_has_the_maximum_of_a_ceiling() -> None:
    assert maximum(-(-T // 5)) == 4  # 16 tokens in blocks of 5; planning for fewer would overrun
    assert evaluate(-(-T // 5), {"T": 11}) == 3


@pytest.mark.parametrize("divisor", [0, -3, S, T + 1])
def test_only_whole_numbers_divide(divisor: Extent) -> None:
    with pytest.raises(ShapeError, match="cannot divide T"):
        T // divisor


@given(st.integers(-3, 20), st.sampled_from(["<", "<=", ">", ">="]), st.integers(0, 16))
def test_a_guard_says_what_the_comparison_says(bound: int, sign: str, value: int) -> None:
    compare = {
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
    }[sign]
    assert compare(T, bound).holds({"T": value}) == compare(value, bound)
    assert compare(T * 2 + 1, bound).holds({"T": value}) == compare(value * 2 + 1, bound)


@given(st.integers(0, 16), st.integers(0, 100))
def test_guards_joined_hold_together(t: int, s: int) -> None:
    guard = (T <= 8) & (S >= 40)
    assert guard.holds({"T": t, "S": s}) == (t <= 8 and s >= 40)
    assert ALWAYS.holds({}) and str(ALWAYS) == "always"
    assert str(guard) == "T <= 8 and S >= 40"


def test_a_bound_on_a_number_joins_a_guard() -> None:
    assert (T <= 3) & (8 <= 9) == (T <= 3) == (8 <= 9) & (T <= 3)  # noqa: PLR0133, SIM300
    assert ((T <= 3) & (9 <= 8)) is False  # noqa: PLR0133


def test_a_guard_is_not_a_truth() -> None:
    with pytest.raises(GraphError, match="known only when a step runs"):
        bool(T <= 8)


def test_an_extent_without_a_value_says_which() -> None:
    with pytest.raises(GraphError, match="S has no value in this step; given: T"):
        evaluate(T + S, {"T": 1})


@pytest.mark.parametrize("bad", [-1, 1.5, "4", True, None])
def test_an_axis_is_a_whole_number_or_an_extent(bad: object) -> None:
    with pytest.raises(ShapeError, match=r"\[shape\] wanted"):
        as_extent(bad)


@pytest.mark.parametrize(("name", "most"), [("", 3), ("T", -1)])
def test_a_dim_has_a_name_and_a_maximum(name: str, most: int) -> None:
    with pytest.raises(ShapeError, match="wanted a name and a maximum"):
        Dim(name, most)


def test_shapes() -> None:
    shape = (T, 4, S // 3)
    assert evaluate_shape(shape, {"T": 2, "S": 10}) == (2, 4, 3)
    assert product(shape) == T * (S // 3) * 4
    assert shape_text(shape) == "[T, 4, S//3]"


def test_unify_binds_checks_and_defers() -> None:
    bound: dict[str, int] = {}
    assert unify(bound, T + S, 9)  # nothing known yet
    assert unify(bound, T, 3) and bound == {"T": 3}
    assert unify(bound, T, 3) and not unify(bound, T, 4)
    assert not unify(bound, Dim("U", 7), 8)
    assert unify(bound, T * 2, 6) and not unify(bound, T * 2, 7)
    assert unify(bound, 5, 5) and not unify(bound, 5, 6)
