"""A thin emitter of LLVM IR: one function, written as text, with structured loops and vectors of any width.

A Python `for` unrolls; `with f.loop(...)` does not. Nothing is optimised afterwards but by code generation, so what is
written here is what runs: values carried by loops are phis, never memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorgraph.backends.cpu.ir import F32, F64, I1, I8, I16, I32, I64, PTR, Int, Number, Type, Value
from tensorgraph.backends.cpu.target import Target

Values = Sequence[Value]


@dataclass
class Loop:
    """A loop being written: its counter, the carried values at the head, and (when it has ended) the results."""

    i: Value
    values: list[Value]
    following: list[Value] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)

    def next(self, *values: Value) -> None:
        """What the carried values are at the head of the next turn."""
        self.following = list(values)


class Function:
    """One function of IR: `define RESULT @NAME(PARAMETERS)`.

    Args:
        parameters: name to type, in order; `f.parameters[name]` is the value.
        result: what `ret` returns; None for nothing.
    """

    def __init__(self, name: str, parameters: dict[str, Type], target: Target, result: Type | None = None) -> None:
        self.name, self.target, self.result = name, target, result
        self.parameters = {n: Value(self, f"%{n}", t) for n, t in parameters.items()}
        self._lines: list[str] = []
        self._declared: dict[str, str] = {}
        self._globals: list[str] = []
        self._count = 0
        self._block = "entry"

    # Text.

    def text(self) -> str:
        """The module that defines this function."""
        listed = ", ".join(f"{v.type} %{n}" for n, v in self.parameters.items())
        head = f"define {self.result or 'void'} @{self.name}({listed}) nounwind {{\nentry:"
        body = [*self._lines] if self._lines and self._lines[-1].startswith("  ret ") else [*self._lines, "  ret void"]
        return "\n".join([*self._globals, *self._declared.values(), head, *body, "}", ""])

    def instruction(self, text: str, type: Type) -> Value:
        """Write `%n = text`."""
        self._count += 1
        ref = f"%v{self._count}"
        self._lines.append(f"  {ref} = {text}")
        return Value(self, ref, type)

    def write(self, text: str) -> None:
        """Write an instruction without a result."""
        self._lines.append(f"  {text}")

    def ret(self, value: Value) -> None:
        self.write(f"ret {value.type} {value.ref}")

    def _label(self, what: str) -> str:
        self._count += 1
        return f"{what}{self._count}"

    def _begin(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label

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

    # Control.

    @contextmanager
    def loop(self, start: Int, stop: Int, step: Int = 1, carried: Values = ()) -> Iterator[Loop]:
        """`for i in range(start, stop, step)`; give `loop.next` the carried values' successors before the block ends.

        Afterwards `loop.results` are the values that were carried last.
        """
        once = all(isinstance(v, int) for v in (start, stop)) and start < stop  # type: ignore[operator]
        head, body, exit = self._label("head"), self._label("body"), self._label("exit")
        before, first, last = self._block, self.i64(start), self.i64(stop)
        self.write(f"br label %{head}")
        self._begin(head)
        phis_at = len(self._lines)
        loop = Loop(self._phi(I64), [self._phi(v.type) for v in carried])
        if not once:
            self.write(f"br i1 {loop.i.lt(last).ref}, label %{body}, label %{exit}")
            self._begin(body)
        yield loop
        if len(loop.following) != len(loop.values):
            raise TypeError(f"[emit] wanted {len(loop.values)} values from loop.next; got {len(loop.following)}")
        following = loop.i + step
        end = self._block
        if once:
            self.write(f"br i1 {following.lt(last).ref}, label %{head}, label %{exit}")
            loop.results = loop.following
        else:
            self.write(f"br label %{head}")
            loop.results = loop.values
        phis = [(loop.i, first, following), *zip(loop.values, carried, loop.following, strict=True)]
        for at, (phi, a, b) in enumerate(phis, phis_at):
            if b.type != phi.type:
                raise TypeError(f"[emit] wanted {phi.type} carried; got {b.type}")
            self._lines[at] = f"  {phi.ref} = phi {phi.type} [ {a.ref}, %{before} ], [ {b.ref}, %{end} ]"
        self._begin(exit)

    def _phi(self, type: Type) -> Value:
        return self.instruction("phi", type)  # completed when the loop ends

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """The block runs only where the condition holds."""
        then, after = self._label("then"), self._label("after")
        self.write(f"br i1 {condition.ref}, label %{then}, label %{after}")
        self._begin(then)
        yield
        self.write(f"br label %{after}")
        self._begin(after)

    def either(self, condition: Value, yes: Callable[[], Values], no: Callable[[], Values]) -> list[Value]:
        """The values of one of two branches; only that one runs."""
        labels = self._label("yes"), self._label("no"), self._label("join")
        self.write(f"br i1 {condition.ref}, label %{labels[0]}, label %{labels[1]}")
        ends = []
        for label, branch in zip(labels, (yes, no), strict=False):
            self._begin(label)
            values = list(branch())
            ends.append((values, self._block))
            self.write(f"br label %{labels[2]}")
        self._begin(labels[2])
        (a, from_a), (b, from_b) = ends
        return [
            self.instruction(f"phi {x.type} [ {x.ref}, %{from_a} ], [ {y.ref}, %{from_b} ]", x.type)
            for x, y in zip(a, b, strict=True)
        ]

    def select(self, condition: Value, yes: Number, no: Number) -> Value:
        """Lane by lane; one of the two must be a Value."""
        like = yes if isinstance(yes, Value) else no
        assert isinstance(like, Value)
        type = like.type.x(condition.lanes) if condition.lanes else like.type
        a, b = self.as_type(yes, type), self.as_type(no, type)
        return self.instruction(f"select {condition.type} {condition.ref}, {type} {a.ref}, {type} {b.ref}", type)

    # Memory.

    def offset(self, address: Value, n_bytes: Number) -> Value:
        if isinstance(n_bytes, int) and n_bytes == 0:
            return address
        by = self.as_type(n_bytes, I64)
        return self.instruction(f"getelementptr i8, ptr {address.ref}, {by.type} {by.ref}", PTR.x(by.lanes))

    def load(self, address: Value, type: Type, *, align: int = 0, mask: Value | None = None) -> Value:
        """`align` in bytes, one element's by default. Lanes outside the mask are 0 and not read."""
        align = align or type.bits // 8 or 1
        if mask is None:
            return self.instruction(f"load {type}, ptr {address.ref}, align {align}", type)
        name = f"llvm.masked.load.{type.suffix}.p0"
        self.declare(name, type, (PTR, mask.type, type))
        return self.instruction(
            f"call {type} @{name}(ptr align {align} {address.ref}, {mask.type} {mask.ref}, {type} zeroinitializer)", type
        )

    def store(self, value: Value, address: Value, *, align: int = 0, mask: Value | None = None) -> None:
        align, type = align or value.type.bits // 8 or 1, value.type
        if mask is None:
            self.write(f"store {type} {value.ref}, ptr {address.ref}, align {align}")
            return
        name = f"llvm.masked.store.{type.suffix}.p0"
        self.declare(name, None, (type, PTR, mask.type))
        self.write(f"call void @{name}({type} {value.ref}, ptr align {align} {address.ref}, {mask.type} {mask.ref})")

    def gather(self, address: Value, offsets: Value, type: Type, mask: Value | None = None) -> Value:
        """Lane i from `address` plus `offsets[i]` bytes (i64)."""
        at = self.offset(address, offsets)
        mask = mask if mask is not None else self.const(1, I1.x(offsets.lanes))
        name = f"llvm.masked.gather.{type.suffix}.{at.type.suffix}"
        self.declare(name, type, (at.type, mask.type, type))
        align = type.bits // 8
        return self.instruction(
            f"call {type} @{name}({at.type} align {align} {at.ref}, {mask.type} {mask.ref}, {type} zeroinitializer)", type
        )

    def scatter(self, value: Value, address: Value, offsets: Value, mask: Value | None = None) -> None:
        """Lane i to `address` plus `offsets[i]` bytes (i64)."""
        at = self.offset(address, offsets)
        mask = mask if mask is not None else self.const(1, I1.x(offsets.lanes))
        name = f"llvm.masked.scatter.{value.type.suffix}.{at.type.suffix}"
        self.declare(name, None, (value.type, at.type, mask.type))
        to = f"{at.type} align {value.type.bits // 8} {at.ref}"
        self.write(f"call void @{name}({value.type} {value.ref}, {to}, {mask.type} {mask.ref})")

    def prefetch(self, address: Value, locality: int = 3) -> None:
        self.declare("llvm.prefetch.p0", None, (PTR, I32, I32, I32))
        self.write(f"call void @llvm.prefetch.p0(ptr {address.ref}, i32 0, i32 {locality}, i32 1)")

    def alloca(self, type: Type, count: int = 1, align: int = 64) -> Value:
        """Memory on the stack; only in the first block of the function, so that no loop repeats it."""
        if self._block != "entry":
            raise TypeError("[emit] alloca outside the first block")
        return self.instruction(f"alloca {type}, i64 {count}, align {align}", PTR)

    # Calls.

    def declare(self, name: str, result: Type | None, parameters: Sequence[Type]) -> None:
        self._declared.setdefault(name, f"declare {result or 'void'} @{name}({', '.join(map(str, parameters))})")

    def call(self, name: str, result: Type, *arguments: Value) -> Value:
        """Call a function of the C library or an intrinsic by its full name."""
        self.declare(name, result, [a.type for a in arguments])
        return self.instruction(f"call {result} @{name}({', '.join(f'{a.type} {a.ref}' for a in arguments)})", result)

    def unary(self, name: str, x: Value) -> Value:
        """An overloaded intrinsic of one value: sqrt, fabs, floor, ceil, trunc, rint, ctpop, abs..."""
        return self.call(f"llvm.{name}.{x.type.suffix}", x.type, x)

    def each_lane(self, x: Value, function: Callable[[Value], Value]) -> Value:
        """A function of scalars applied lane by lane."""
        if not x.lanes:
            return function(x)
        results = [function(x[i]) for i in range(x.lanes)]
        out = Value(self, "poison", results[0].type.x(x.lanes))
        for i, value in enumerate(results):
            out = out.with_lane(i, value)
        return out

    # Arithmetic.

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

    def convert_pointer(self, number: Value) -> Value:
        """An i64 as the address that it is."""
        return self.instruction(f"inttoptr i64 {number.ref} to ptr", PTR)

    def half_to_f32(self, bits: Value) -> Value:
        """Of f16 held as i16."""
        if self.target.has & {"f16c", "neon", "avx512"}:
            return self.convert(bits.bits_as(Type("f", 16, bits.lanes)), F32)
        wide = self.convert(bits, I32, signed=False)
        sign, rest = (wide & 0x8000) << 16, wide & 0x7FFF
        shifted = (rest << 13).bits_as(F32.x(bits.lanes)) * 2.0**112  # normal and subnormal numbers alike
        special = (rest | 0x38000) << 13  # infinite or NaN
        magnitude = self.select(rest.ge(0x7C00), special, shifted.bits_as(wide.type))
        return (magnitude | sign).bits_as(F32.x(bits.lanes))

    def f32_to_half(self, x: Value) -> Value:
        """f16 as i16, to nearest, ties to even."""
        if self.target.has & {"f16c", "neon", "avx512"}:
            return self.convert(x, Type("f", 16)).bits_as(I16.x(x.lanes))
        bits = x.bits_as(I32.x(x.lanes))
        sign, rest = (bits & -0x80000000).shift_right(16), bits & 0x7FFFFFFF
        odd = rest.shift_right(13) & 1
        normal = (rest + odd + (0xFFF - (112 << 23))).shift_right(13)
        # a subnormal result: the sum with 0.5 rounds at the right bit
        small = (rest.bits_as(x.type) + 0.5).bits_as(bits.type) - 0x3F000000
        special = self.select(rest.gt(0x7F800000), rest.shift_right(13) | 0x7E00, self.const(0x7C00, bits.type))
        found = self.select(rest.lt(113 << 23), small, normal)
        found = self.select(rest.ge(0x477FF000), special, found) & 0x7FFF
        return self.convert(found | sign, I16)

    def bf16_to_f32(self, bits: Value) -> Value:
        """Of bf16 held as i16."""
        return (self.convert(bits, I32, signed=False) << 16).bits_as(F32.x(bits.lanes))

    def f32_to_bf16(self, x: Value) -> Value:
        """bf16 as i16, to nearest, ties to even."""
        bits = x.bits_as(I32.x(x.lanes))
        rounded = bits + (bits.shift_right(16) & 1) + 0x7FFF
        kept = self.select(x.is_nan(), bits | 0x400000, rounded)
        return self.convert(kept.shift_right(16), I16)


__all__ = ["F32", "F64", "I1", "I8", "I16", "I32", "I64", "PTR", "Function", "Loop", "Values"]
