"""Constants, arithmetic and conversions of the function being written: what is done to values, apart from control and memory."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from tensorgraph.backends.cpu import halves
from tensorgraph.backends.cpu.ir import I1, I32, I64, PTR, Int, Number, Type, Value
from tensorgraph.backends.cpu.target import Target


class Arithmetic(ABC):
    """In LLVM IR, by instructions that `instruction` writes."""

    target: Target
    _globals: list[str]

    @abstractmethod
    def instruction(self, text: str, type: Type) -> Value: ...

    @abstractmethod
    def declare(self, name: str, result: Type | None, parameters: Sequence[Type]) -> None: ...

    @abstractmethod
    def call(self, name: str, result: Type, *arguments: Value) -> Value: ...

    @abstractmethod
    def offset(self, address: Value, n_bytes: Number) -> Value: ...

    # Constants.

    def const(self, value: int | float, type: Type) -> Value:
        """A number of a type; of a vector type, in every lane."""
        if type.kind == "p":
            ref = "null"
        elif type.bits == 1:
            ref = "true" if value else "false"
        elif type.kind == "i":
            ref = str(int(value))
        elif type.bits == 16:
            ref = f"0xH{struct.unpack('<H', struct.pack('<e', value))[0]:04X}"
        else:  # a float is written as the double of the same value
            number = struct.unpack("<f", struct.pack("<f", value))[0] if type.bits == 32 else float(value)
            ref = f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"
        if type.lanes:
            ref = f"splat ({type.scalar} {ref})"
        return Value(self, ref, type)

    def vector(self, values: Sequence[int | float], type: Type) -> Value:
        """A constant vector of scalars of `type`."""
        listed = ", ".join(f"{type} {self.const(v, type).ref}" for v in values)
        return Value(self, f"<{listed}>", type.x(len(values)))

    def zero(self, type: Type) -> Value:
        return Value(self, "zeroinitializer" if type.lanes else self.const(0, type).ref, type)

    def table(self, values: Sequence[int | float], type: Type) -> Value:
        """The address of a constant array."""
        listed = ", ".join(f"{type} {self.const(v, type).ref}" for v in values)
        name = f"@table{len(self._globals)}"
        self._globals.append(f"{name} = private constant [{len(values)} x {type}] [{listed}], align 64")
        return Value(self, name, PTR)

    def as_type(self, value: Number, type: Type) -> Value:
        """A number as a constant of `type`; a scalar Value beside a vector type is repeated."""
        if not isinstance(value, Value):
            return self.const(value, type)
        return self.splat(value, type.lanes) if type.lanes and not value.type.lanes else value

    def i64(self, value: Int) -> Value:
        return self.as_type(value, I64)

    def lane_numbers(self, lanes: int, type: Type = I32) -> Value:
        """0, 1, 2, ..."""
        return self.vector(range(lanes), type)

    def select(self, condition: Value, yes: Number, no: Number) -> Value:
        """Lane by lane; one of the two must be a Value."""
        like = yes if isinstance(yes, Value) else no
        assert isinstance(like, Value)
        type = like.type.x(condition.lanes) if condition.lanes else like.type
        a, b = self.as_type(yes, type), self.as_type(no, type)
        return self.instruction(f"select {condition.type} {condition.ref}, {type} {a.ref}, {type} {b.ref}", type)

    # Arithmetic.

    def binary(self, name: str, a: Value, b: Value) -> Value:
        """An instruction of two values of one type, by LLVM's name."""
        return self.instruction(f"{name} {a.type} {a.ref}, {b.ref}", a.type)

    def compare(self, name: str, a: Value, b: Value) -> Value:
        """A comparison of two values of one type, by LLVM's name of its condition."""
        which = "fcmp" if a.type.kind == "f" else "icmp"
        return self.instruction(f"{which} {name} {a.type} {a.ref}, {b.ref}", I1.x(a.lanes))

    def negative(self, x: Value) -> Value:
        """Of a float."""
        return self.instruction(f"fneg {x.type} {x.ref}", x.type)

    def bits(self, x: Value, type: Type) -> Value:
        return self.instruction(f"bitcast {x.type} {x.ref} to {type}", type)

    def leading_zeros(self, x: Value) -> Value:
        """Of a whole number, that are above its highest bit."""
        self.declare(f"llvm.ctlz.{x.type.suffix}", x.type, (x.type, I1))
        return self.instruction(f"call {x.type} @llvm.ctlz.{x.type.suffix}({x.type} {x.ref}, i1 false)", x.type)

    def lane(self, x: Value, at: Value) -> Value:
        return self.instruction(f"extractelement {x.type} {x.ref}, i64 {at.ref}", x.type.scalar)

    def with_lane(self, x: Value, at: Value, put: Value) -> Value:
        return self.instruction(f"insertelement {x.type} {x.ref}, {put.type} {put.ref}, i64 {at.ref}", x.type)

    def shuffled(self, x: Value, lanes: Sequence[int], other: Value | None) -> Value:
        """As `Value.shuffle`."""
        b = other.ref if other is not None else "poison"
        mask = ", ".join(f"i32 {i}" for i in lanes)
        text = f"shufflevector {x.type} {x.ref}, {x.type} {b}, <{len(lanes)} x i32> <{mask}>"
        return self.instruction(text, x.type.x(len(lanes)))

    def fma(self, a: Value, b: Number, c: Number) -> Value:
        """a * b + c, rounded once where the target has such an instruction, else twice."""
        type = next((v.type for v in (a, b, c) if isinstance(v, Value) and v.lanes), a.type)
        x, y, z = (self.as_type(v, type) for v in (a, b, c))
        name = "fma" if "fma" in self.target.has or "neon" in self.target.has else "fmuladd"
        return self.call(f"llvm.{name}.{type.suffix}", type, x, y, z)

    def max(self, a: Value, b: Number) -> Value:
        """b where it is greater, else a; so a where a is NaN."""
        b = self.as_type(b, a.type)
        return self.select(b.gt(a), b, a)

    def min(self, a: Value, b: Number) -> Value:
        """b where it is less, else a; so a where a is NaN."""
        b = self.as_type(b, a.type)
        return self.select(b.lt(a), b, a)

    def splat(self, value: Value, lanes: int) -> Value:
        """A scalar in every lane."""
        if not lanes or value.lanes:
            return value
        first = self.instruction(
            f"insertelement {value.type.x(lanes)} poison, {value.type} {value.ref}, i64 0", value.type.x(lanes)
        )
        return first.shuffle([0] * lanes)

    def join(self, a: Value, b: Value) -> Value:
        """The lanes of a, then those of b."""
        return a.shuffle(range(a.lanes + b.lanes), b)

    def fold(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes combined, halves first: the same order on every target."""
        while x.lanes > 1:
            half = x.lanes // 2
            x = combine(x.shuffle(range(half)), x.shuffle(range(half, x.lanes)))
        return x[0] if x.lanes else x

    def sum(self, x: Value) -> Value:
        return self.fold(x, lambda a, b: a + b)

    def tail_mask(self, lanes: int, left: Int) -> Value:
        """True in the first `left` lanes."""
        count = self.narrow(self.i64(left), I32)
        return self.lane_numbers(lanes).lt(count)

    # Conversions.

    def convert(self, x: Value, type: Type, *, signed: bool = True) -> Value:
        """To another type of as many lanes: integers extended or cut, floats rounded to nearest, to integers toward zero."""
        type = type.x(x.lanes)
        a, b = x.type, type
        if a == b:
            return x
        if a.kind == "i" and b.kind == "i":
            name = "trunc" if b.bits < a.bits else "sext" if signed and a.bits > 1 else "zext"
        elif a.kind == "i":
            name = "sitofp" if signed and a.bits > 1 else "uitofp"
        elif b.kind == "i":
            name = "fptosi" if signed else "fptoui"
        else:
            name = "fpext" if b.bits > a.bits else "fptrunc"
        return self.instruction(f"{name} {a} {x.ref} to {b}", b)

    def narrow(self, x: Value, type: Type) -> Value:
        return self.convert(x, type)

    def number_of(self, address: Value) -> Value:
        """An address as an i64."""
        return self.instruction(f"ptrtoint ptr {address.ref} to i64", I64)

    def convert_pointer(self, number: Value) -> Value:
        """An i64 as the address that it is."""
        return self.instruction(f"inttoptr i64 {number.ref} to ptr", PTR)

    def half_to_f32(self, bits: Value) -> Value:
        """Of f16 held as i16."""
        return halves.half_to_f32(self, bits)

    def f32_to_half(self, x: Value) -> Value:
        return halves.f32_to_half(self, x)

    def bf16_to_f32(self, bits: Value) -> Value:
        """Of bf16 held as i16."""
        return halves.bf16_to_f32(self, bits)

    def f32_to_bf16(self, x: Value) -> Value:
        return halves.f32_to_bf16(self, x)
