"""Runtime extents: an axis length that is known only when a step runs.

An extent is an `int`, a `Dim`, or a polynomial of Dims with integer coefficients and floor divisions. Axes use affine
ones; strides and element counts are products of them. Values are canonical: equal polynomials, and equal quotients of
polynomials without quotients in them, compare and hash equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd
from typing import Union

from tensorgraph.errors import GraphError, ShapeError
from tensorgraph.source import source_line

Extent = Union[int, "Symbol"]
Shape = tuple[Extent, ...]
Bindings = Mapping[str, int]
_remembered = lru_cache(1 << 12)  # every layer computes with the same few extents


class Symbol:
    """Base of everything that stands for an extent known at run time; arithmetic gives canonical extents."""

    __slots__ = ()
    min: int
    max: int
    """Bounds of the value; memory is planned for the upper one."""

    def _terms(self) -> dict[tuple[Symbol, ...], int]:
        return {(self,): 1}

    def evaluate(self, bindings: Bindings) -> int:
        raise GraphError(f"[dim] {self} has no value")

    def dims(self) -> frozenset[Dim]:
        return frozenset()

    def __add__(self, other: Extent) -> Extent:
        return _sum((self, other))

    def __neg__(self) -> Extent:
        return self * -1

    def __sub__(self, other: Extent) -> Extent:
        return _sum((self, other * -1))

    def __rsub__(self, other: Extent) -> Extent:
        return _sum((other, self * -1))

    @_remembered
    def __mul__(self, other: Extent) -> Extent:
        if isinstance(other, int):  # the order of terms stays: no need to sort
            terms = self._terms().items()
            return self if other == 1 else Poly(tuple((k, c * other) for k, c in terms)) if other else 0
        product: dict[tuple[Symbol, ...], int] = {}
        for a, ca in _terms_of(self).items():
            for b, cb in _terms_of(other).items():
                key = tuple(sorted(a + b, key=str))
                product[key] = product.get(key, 0) + ca * cb
        return _canonical(product)

    __radd__, __rmul__ = __add__, __mul__

    @_remembered
    def __floordiv__(self, divisor: Extent) -> Extent:
        exact = divide_exact(self, divisor)
        if exact is not None:
            return exact
        if not isinstance(divisor, int) or divisor < 1:
            raise ShapeError(f"[dim] cannot divide {self} by {divisor}")
        terms = {(): 0} | self._terms()  # what divides comes out; the rest is reduced, so that equal quotients are equal
        whole = {k: c // divisor for k, c in terms.items() if not k or c % divisor == 0}
        rest = {k: c - whole.get(k, 0) * divisor for k, c in terms.items()}
        common = gcd(divisor, *(c for k, c in rest.items() if k))
        left = _canonical({k: c // common for k, c in rest.items()})
        if isinstance(left, FloorDiv):
            return _canonical(whole) + left.dividend // (left.divisor * (divisor // common))
        return _canonical(whole) + (FloorDiv(left, divisor // common) if isinstance(left, Symbol) else 0)

    def __le__(self, bound: int) -> Guard:
        return Guard(((self, None, bound),))

    def __ge__(self, bound: int) -> Guard:
        return Guard(((self, bound, None),))

    def __lt__(self, bound: int) -> Guard:
        return self <= bound - 1

    def __gt__(self, bound: int) -> Guard:
        return self >= bound + 1

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True, repr=False, order=False)
class Dim(Symbol):
    """A named axis whose length is given when a step runs: one value a name and step, at most `max`."""

    name: str
    max: int

    def __post_init__(self) -> None:
        if not self.name or self.max < 0:
            raise ShapeError(f"[dim] wanted a name and a maximum >= 0; got Dim({self.name!r}, {self.max})")

    @property
    def min(self) -> int:  # type: ignore[override]
        return 0

    def evaluate(self, bindings: Bindings) -> int:
        if self.name not in bindings:
            raise GraphError(f"[dim] {self.name} has no value in this step; given: {', '.join(bindings) or 'none'}")
        return bindings[self.name]

    def dims(self) -> frozenset[Dim]:
        return frozenset((self,))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, repr=False, order=False)
class FloorDiv(Symbol):
    """`dividend // divisor`, where it is not exact."""

    dividend: Symbol
    divisor: int

    def evaluate(self, bindings: Bindings) -> int:
        return self.dividend.evaluate(bindings) // self.divisor

    @property
    def min(self) -> int:  # type: ignore[override]
        return self.dividend.min // self.divisor

    @property
    def max(self) -> int:  # type: ignore[override]
        return self.dividend.max // self.divisor

    def dims(self) -> frozenset[Dim]:
        return self.dividend.dims()

    def __str__(self) -> str:
        inner = str(self.dividend)
        return f"({inner})//{self.divisor}" if " " in inner or "*" in inner else f"{inner}//{self.divisor}"


@dataclass(frozen=True, repr=False, order=False)
class Poly(Symbol):
    """A sum of products of symbols; never built directly, only by arithmetic."""

    terms: tuple[tuple[tuple[Symbol, ...], int], ...]

    def _terms(self) -> dict[tuple[Symbol, ...], int]:
        return dict(self.terms)

    def evaluate(self, bindings: Bindings) -> int:
        total = 0
        for symbols, factor in self.terms:
            for symbol in symbols:
                factor *= symbol.evaluate(bindings)
            total += factor
        return total

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        """Each term between the smallest and largest product of its factors' bounds."""
        least = most = 0
        for symbols, factor in self.terms:
            ends = [factor]
            for symbol in symbols:
                products = [end * bound for end in ends for bound in (symbol.min, symbol.max)]
                ends = [min(products), max(products)]
            least, most = least + ends[0], most + ends[-1]
        return least, most

    @property
    def min(self) -> int:  # type: ignore[override]
        return self._bounds[0]

    @property
    def max(self) -> int:  # type: ignore[override]
        return self._bounds[1]

    def dims(self) -> frozenset[Dim]:
        return frozenset(d for symbols, _ in self.terms for s in symbols for d in s.dims())

    @cached_property
    def _text(self) -> str:
        parts = []
        for symbols, factor in self.terms:
            names = "*".join(map(str, symbols))
            text = names if factor == 1 and names else (f"{factor}*{names}" if names else str(factor))
            parts.append(text)
        return " + ".join(parts).replace("+ -", "- ")

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True)
class Guard:
    """A conjunction of bounds on extents, read when a step runs: `(T <= 8) & (S >= 1024)`. Empty is always true."""

    bounds: tuple[tuple[Symbol, int | None, int | None], ...] = ()

    def __and__(self, other: Guard | bool) -> Guard | bool:
        if isinstance(other, bool):  # a bound on an extent that is a number
            return self if other else False
        return Guard(self.bounds + other.bounds)

    __rand__ = __and__

    def __bool__(self) -> bool:
        raise GraphError(f"[guard] {self} is known only when a step runs; pass it as a guard, not to `if`")

    def holds(self, bindings: Bindings) -> bool:
        for extent, low, high in self.bounds:
            value = extent.evaluate(bindings)
            if (low is not None and value < low) or (high is not None and value > high):
                return False
        return True

    def __str__(self) -> str:
        texts = [f"{e} >= {lo}" if hi is None else f"{e} <= {hi}" for e, lo, hi in self.bounds]
        return " and ".join(texts) or "always"


ALWAYS = Guard()


def _terms_of(extent: Extent) -> dict[tuple[Symbol, ...], int]:
    if isinstance(extent, Symbol):
        return extent._terms()
    return {(): int(extent)} if extent else {}


def _canonical(terms: dict[tuple[Symbol, ...], int]) -> Extent:
    kept = sorted(((k, c) for k, c in terms.items() if c), key=lambda item: (not item[0], [str(s) for s in item[0]]))
    if not kept:
        return 0
    if len(kept) == 1:
        (symbols, factor) = kept[0]
        if not symbols:
            return factor
        if len(symbols) == 1 and factor == 1:
            return symbols[0]
    return Poly(tuple(kept))


@_remembered
def _sum(extents: tuple[Extent, ...]) -> Extent:
    total: dict[tuple[Symbol, ...], int] = {}
    for extent in extents:
        for key, factor in _terms_of(extent).items():
            total[key] = total.get(key, 0) + factor
    return _canonical(total)


def divide_exact(extent: Extent, divisor: Extent) -> Extent | None:
    """`extent / divisor` where every term divides without remainder, else None."""
    divisor_terms = _terms_of(divisor)
    if not divisor_terms:
        return None
    if len(divisor_terms) > 1:  # one term times the whole sum
        last = _canonical(dict(list(divisor_terms.items())[-1:]))
        quotients = (divide_exact(_canonical({k: c}), last) for k, c in _terms_of(extent).items())
        return next((q for q in quotients if q is not None and q * divisor == extent), None)
    ((symbols, factor),) = divisor_terms.items()
    quotient: dict[tuple[Symbol, ...], int] = {}
    for key, coefficient in _terms_of(extent).items():
        rest = list(key)
        for symbol in symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        if coefficient % factor:
            return None
        quotient[tuple(rest)] = coefficient // factor
    return _canonical(quotient)


def evaluate(extent: Extent, bindings: Bindings) -> int:
    """The value of an extent in a step."""
    return extent if isinstance(extent, int) else extent.evaluate(bindings)


def evaluate_shape(shape: Sequence[Extent], bindings: Bindings) -> tuple[int, ...]:
    return tuple(e if isinstance(e, int) else e.evaluate(bindings) for e in shape)


def maximum(extent: Extent) -> int:
    """The largest value an extent can take."""
    return extent if isinstance(extent, int) else extent.max


def product(extents: Iterable[Extent]) -> Extent:
    number = 1
    total: Extent | None = None
    for extent in extents:
        if isinstance(extent, int):
            number *= extent
        else:
            total = extent if total is None else total * extent
    return number if total is None else total * number


def shape_text(shape: Sequence[Extent]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def as_extent(value: object) -> Extent:
    """Check one axis of a shape that a user gave."""
    if isinstance(value, Symbol):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ShapeError(f"[shape] wanted an int or a Dim for an axis; got {value!r} ({source_line()})")
    number = int(value.__index__())
    if number < 0:
        raise ShapeError(f"[shape] wanted an axis >= 0; got {number} ({source_line()})")
    return number


def unify(bindings: dict[str, int], extent: Extent, value: int) -> bool:
    """Bind a Dim to `value`, or check that `extent` has it; False where it does not fit.

    An expression of one Dim that has no value yet is left for a later check (True).
    """
    if isinstance(extent, int):
        return extent == value
    if isinstance(extent, Dim):
        return value <= extent.max and bindings.setdefault(extent.name, value) == value
    if any(d.name not in bindings for d in extent.dims()):
        return True
    return extent.evaluate(bindings) == value
