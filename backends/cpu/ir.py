"""Types and values as kernels hold them: arithmetic on a Value writes an instruction, in whatever its function is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal, Union

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.arithmetic import Arithmetic

Kind = Literal["i", "f", "p"]
Number = Union["Value", int, float]
Int = Union["Value", int]
"""A whole number: known while emitting, or in a register."""

_FLOATS = {16: "half", 32: "float", 64: "double"}


@dataclass(frozen=True)
class Type:
    """An integer (`i`, signed where it matters), a float (`f`) or an address (`p`); `lanes` of it, 0 for a scalar."""

    kind: Kind
    bits: int
    lanes: int = 0

    def x(self, lanes: int) -> Type:
        """A vector of this."""
        return _one_of(self.kind, self.bits, lanes)

    @cached_property
    def scalar(self) -> Type:
        return _one_of(self.kind, self.bits, 0)

    @property
    def size_bytes(self) -> int:
        return self.bits // 8 * max(self.lanes, 1)

    @cached_property
    def text(self) -> str:
        one = "ptr" if self.kind == "p" else f"i{self.bits}" if self.kind == "i" else _FLOATS[self.bits]
        return f"<{self.lanes} x {one}>" if self.lanes else one

    @cached_property
    def suffix(self) -> str:
        """As overloaded intrinsics are named: `v16f32`."""
        one = "p0" if self.kind == "p" else f"{self.kind}{self.bits}"
        return f"v{self.lanes}{one}" if self.lanes else one

    def __str__(self) -> str:
        return self.text


@cache
def _one_of(kind: Kind, bits: int, lanes: int) -> Type:
    """The same object for the same type, so that its texts are made once."""
    return Type(kind, bits, lanes)


I1, I8, I16, I32, I64 = (Type("i", bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = (Type("f", bits) for bits in (16, 32, 64))
PTR = Type("p", 64)

_COMPARE = {
    "lt": ("slt", "olt"),
    "le": ("sle", "ole"),
    "gt": ("sgt", "ogt"),
    "ge": ("sge", "oge"),
    "eq": ("eq", "oeq"),
    "ne": ("ne", "une"),
}


class Value:
    """A register or a constant of one type.

    `+ - * /` and `& | ^ << >>` (arithmetic shift) take a Value of the same type or a number; a scalar beside a vector is
    repeated. An address plus a number is so many bytes on. Comparisons are methods (`lt`, `eq`, ...) and give i1.
    """

    __slots__ = ("fn", "ref", "type")

    def __init__(self, fn: Arithmetic, ref: str, type: Type) -> None:
        self.fn, self.ref, self.type = fn, ref, type

    @property
    def lanes(self) -> int:
        return self.type.lanes

    def _binary(self, other: Number, integer: str, floating: str, *, swap: bool = False) -> Value:
        a: Value = self
        b = self.fn.as_type(other, self.type)
        if b.type.lanes and not a.type.lanes:
            a = self.fn.splat(a, b.type.lanes)
        if swap:
            a, b = b, a
        if a.type != b.type:
            raise TypeError(f"[emit] wanted two of {a.type}; got {b.type}")
        return self.fn.binary(integer if a.type.kind == "i" else floating, a, b)

    def __add__(self, other: Number) -> Value:
        if self.type.kind == "p":
            return self.fn.offset(self, other)
        return self if isinstance(other, int) and other == 0 else self._binary(other, "add", "fadd")

    __radd__ = __add__

    def __sub__(self, other: Number) -> Value:
        return self if isinstance(other, int) and other == 0 else self._binary(other, "sub", "fsub")

    def __rsub__(self, other: Number) -> Value:
        return self._binary(other, "sub", "fsub", swap=True)

    def __mul__(self, other: Number) -> Value:
        if isinstance(other, int) and self.type.kind == "i" and not self.type.lanes:
            if other == 0:
                return self.fn.const(0, self.type)
            if other == 1:
                return self
        return self._binary(other, "mul", "fmul")

    __rmul__ = __mul__

    def __truediv__(self, other: Number) -> Value:
        return self._binary(other, "sdiv", "fdiv")

    def __rtruediv__(self, other: Number) -> Value:
        return self._binary(other, "sdiv", "fdiv", swap=True)

    def __floordiv__(self, other: Int) -> Value:
        """Of numbers that are not negative."""
        return self if isinstance(other, int) and other == 1 else self._binary(other, "udiv", "fdiv")

    def __mod__(self, other: Int) -> Value:
        """Of numbers that are not negative."""
        return self.fn.const(0, self.type) if isinstance(other, int) and other == 1 else self._binary(other, "urem", "frem")

    def __neg__(self) -> Value:
        if self.type.kind == "f":
            return self.fn.negative(self)
        return self._binary(0, "sub", "fsub", swap=True)

    def __and__(self, other: Int) -> Value:
        return self._binary(other, "and", "and")

    def __or__(self, other: Int) -> Value:
        return self._binary(other, "or", "or")

    def __xor__(self, other: Int) -> Value:
        return self._binary(other, "xor", "xor")

    def __lshift__(self, other: Int) -> Value:
        return self._binary(other, "shl", "shl")

    def __rshift__(self, other: Int) -> Value:
        return self._binary(other, "ashr", "ashr")

    def shift_right(self, other: Int) -> Value:
        """Filled with zeros from above."""
        return self._binary(other, "lshr", "lshr")

    def invert(self) -> Value:
        return self._binary(-1, "xor", "xor")

    def _compare(self, name: str, other: Number) -> Value:
        b = self.fn.as_type(other, self.type)
        a = self.fn.splat(self, b.type.lanes) if b.type.lanes and not self.type.lanes else self
        integer, floating = _COMPARE[name]
        return self.fn.compare(floating if a.type.kind == "f" else integer, a, b)

    def lt(self, other: Number) -> Value:
        return self._compare("lt", other)

    def le(self, other: Number) -> Value:
        return self._compare("le", other)

    def gt(self, other: Number) -> Value:
        return self._compare("gt", other)

    def ge(self, other: Number) -> Value:
        return self._compare("ge", other)

    def eq(self, other: Number) -> Value:
        return self._compare("eq", other)

    def ne(self, other: Number) -> Value:
        """Of floats: also true where one is NaN."""
        return self._compare("ne", other)

    def is_nan(self) -> Value:
        return self.fn.compare("uno", self, self)

    def below(self, other: Int) -> Value:
        """Unsigned less-than: one comparison for `0 <= x < other`."""
        return self.fn.compare("ult", self, self.fn.as_type(other, self.type))

    # Lanes.

    def __getitem__(self, lane: Int) -> Value:
        """One lane."""
        return self.fn.lane(self, self.fn.as_type(lane, I64))

    def with_lane(self, lane: Int, value: Number) -> Value:
        return self.fn.with_lane(self, self.fn.as_type(lane, I64), self.fn.as_type(value, self.type.scalar))

    def shuffle(self, lanes: Sequence[int], other: Value | None = None) -> Value:
        """Lanes picked by number, those of `other` counted on."""
        return self.fn.shuffled(self, lanes, other)

    def bits_as(self, type: Type) -> Value:
        """The same bits as another type."""
        return self if type == self.type else self.fn.bits(self, type)

    def __repr__(self) -> str:
        return f"<{self.type} {self.ref}>"
