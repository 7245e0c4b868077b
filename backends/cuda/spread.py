"""Arithmetic of values that are spread over the threads of a team, in CUDA C; within a team, what one thread tells another."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from tensorgraph.backends.cpu.ir import F32, I1, I32, I64, PTR, Number, Type, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.target import Target
from tensorgraph.backends.cuda.hazards import Hazards, Root
from tensorgraph.errors import UnsupportedError

WARP = 32
TARGET = Target("cuda", "nvptx64", "", "", 4 * WARP, frozenset({"fma", "f16c"}))
"""What descriptions ask of a target: vectors of a warp's threads."""
TYPES = {"i1": "bool", "i8": "signed char", "i16": "short", "i32": "int", "i64": "i64", "float": "float", "double": "double"}
_INTEGER = {"add": "+", "sub": "-", "mul": "*", "udiv": "/", "urem": "%", "and": "&", "or": "|", "xor": "^"}
_INTEGER |= {"shl": "<<", "lshr": ">>"}
_FLOAT = {"fadd": "+", "fsub": "-", "fmul": "*", "fdiv": "/"}
_ORDER = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_OWN = {"sin": "tg_sin", "cos": "tg_cos"}
"""Functions that the compiler has, but with a stack."""
_UNARY = {"ctpop": ("__popc", "__popcll"), "abs": ("tg_abs", "tg_abs")}


def c_type(type: Type) -> str:
    """Of one element."""
    return "char*" if type.kind == "p" else TYPES[type.scalar.text] if type.scalar.text in TYPES else "unsigned"


def _unsigned(type: Type) -> str:
    return {1: "bool", 8: "unsigned char", 16: "unsigned short", 32: "unsigned", 64: "u64"}[type.bits]


class SpreadKernel(Kernel):
    """What a kernel computes with; `CudaKernel` says how it branches, and what it reads and writes.

    Attributes:
        lanes, block: threads of a team and of a block.
        hazards: accesses to memory since the team last waited.
    """

    spread = True

    def __init__(self, lanes: int, block: int) -> None:
        self._code: list[str] = []
        self._known: list[dict[str, Value]] = [{}]
        self._tables: list[str] = []
        self._exchanges = self.has_angles = False
        self.hazards = Hazards()
        self.block = block
        super().__init__(TARGET)
        self.lanes = lanes

    def _line(self, text: str) -> None:
        self._code.append(text)

    def _name(self, what: str = "v") -> str:
        self._count += 1
        return f"{what}{self._count}"

    def _fits(self, type: Type) -> Type:
        if type.lanes > self.lanes:
            raise UnsupportedError(f"[cuda] wanted vectors of at most {self.lanes} lanes; got {type.lanes}")
        return type

    def _value(self, text: str, type: Type) -> Value:
        """The value of an expression that always has the same one."""
        self._fits(type)
        key = f"{type} {text}"
        for known in self._known:
            if key in known:
                return known[key]
        self._known[-1][key] = found = self._fresh(text, type)
        return found

    def _fresh(self, text: str, type: Type) -> Value:
        """The value of an expression as it is now."""
        name = self._name()
        self._line(f"const {c_type(type)} {name} = {text};" if type.kind != "p" else f"char* const {name} = {text};")
        return Value(self, name, self._fits(type))

    # Constants.

    def const(self, value: int | float, type: Type) -> Value:
        if type.kind == "p":
            ref = "(char*)0"
        elif type.bits == 1:
            ref = "true" if value else "false"
        elif type.kind == "i":
            ref = f"({c_type(type)}){int(value)}" if type.bits < 32 else whole(int(value), type.bits)
        elif type.bits == 64:
            ref = f"__longlong_as_double({whole(struct.unpack('<q', struct.pack('<d', value))[0], 64)})"
        else:
            ref = f"__int_as_float({whole(struct.unpack('<i', struct.pack('<f', value))[0], 32)})"
        return Value(self, ref, type)

    def zero(self, type: Type) -> Value:
        return self.const(0, type)

    def vector(self, values: Sequence[int | float], type: Type) -> Value:
        many = type.x(len(values))
        if list(values) == list(range(len(values))):
            return self._value(f"({c_type(type)})lane", many)
        place = f"lane % {len(values)}" if len(values) < self.lanes else "lane"
        return self._value(f"{self._array(values, type)}[{place}]", many)

    def table(self, values: Sequence[int | float], type: Type) -> Value:
        return self._value(f"(char*){self._array(values, type)}", PTR)

    def _array(self, values: Sequence[int | float], type: Type) -> str:
        text = f"[{len(values)}] = {{{', '.join(_literal(v, type) for v in values)}}};"
        for line in self._tables:
            if line.endswith(text) and f" {c_type(type)} tg_table" in line:
                return line.split("[")[0].split()[-1]
        self._tables.append(f"static __device__ const {c_type(type)} tg_table{len(self._tables)}{text}")
        return f"tg_table{len(self._tables) - 1}"

    def splat(self, value: Value, lanes: int) -> Value:
        return value if not lanes or value.lanes else Value(self, value.ref, self._fits(value.type.x(lanes)))

    def select(self, condition: Value, yes: Number, no: Number) -> Value:
        like = yes if isinstance(yes, Value) else no
        assert isinstance(like, Value)
        type = like.type.x(condition.lanes) if condition.lanes else like.type
        a, b = self.as_type(yes, type), self.as_type(no, type)
        found = self._value(f"{condition.ref} ? {a.ref} : {b.ref}", type)
        if self.hazards.root(a.ref) == self.hazards.root(b.ref):
            self.hazards.same(found.ref, a.ref)
        return found

    # Calls.

    def call(self, name: str, result: Type, *arguments: Value) -> Value:
        if name.startswith("llvm."):
            raise UnsupportedError(f"[cuda] there is no {name}")
        self.has_angles |= name in _OWN
        name = _OWN.get(name, name)
        return self._value(f"{name}({', '.join(a.ref for a in arguments)})", result)

    def unary(self, name: str, x: Value) -> Value:
        if name in _UNARY:
            return self._value(f"{_UNARY[name][x.type.bits == 64]}({x.ref})", x.type)
        return self._value(f"{name}{'f' if x.type.bits == 32 else ''}({x.ref})", x.type)

    def leading_zeros(self, x: Value) -> Value:
        return self._value(f"({c_type(x.type)}){'__clzll' if x.type.bits == 64 else '__clz'}({x.ref})", x.type)

    def each_lane(self, x: Value, function: Callable[[Value], Value]) -> Value:
        if not x.lanes:
            return function(x)
        found = function(Value(self, x.ref, x.type.scalar))
        return Value(self, found.ref, found.type.x(x.lanes))

    # Arithmetic.

    def binary(self, name: str, a: Value, b: Value) -> Value:
        type = a.type
        if name in _FLOAT:
            return self._value(f"{a.ref} {_FLOAT[name]} {b.ref}", type)
        if name in ("udiv", "urem") and type.bits == 64:
            return self._value(f"tg_{name}({a.ref}, {b.ref})", type)
        if name in ("ashr", "sdiv"):
            return self._value(f"({c_type(type)})({a.ref} {'>>' if name == 'ashr' else '/'} {b.ref})", type)
        if name not in _INTEGER:
            raise UnsupportedError(f"[cuda] there is no {name}")
        u = _unsigned(type)
        return self._value(f"({c_type(type)})(({u}){a.ref} {_INTEGER[name]} ({u}){b.ref})", type)

    def compare(self, name: str, a: Value, b: Value) -> Value:
        type = I1.x(a.lanes)
        if name == "uno":
            return self._value(f"{a.ref} != {a.ref} || {b.ref} != {b.ref}", type)
        if name == "ult":
            return self._value(f"({_unsigned(a.type)}){a.ref} < ({_unsigned(a.type)}){b.ref}", type)
        return self._value(f"{a.ref} {_ORDER[name[-2:]]} {b.ref}", type)

    def negative(self, x: Value) -> Value:
        return self._value(f"-{x.ref}", x.type)

    def fma(self, a: Value, b: Number, c: Number) -> Value:
        type = next((v.type for v in (a, b, c) if isinstance(v, Value) and v.lanes), a.type)
        x, y, z = (self.as_type(v, type) for v in (a, b, c))
        return self._value(f"{'fma' if type.bits == 64 else 'fmaf'}({x.ref}, {y.ref}, {z.ref})", type)

    def bits(self, x: Value, type: Type) -> Value:
        a, b = x.type, type
        if a.bits == 1 and b == Type("i", a.lanes):
            return self._ballot(x)
        if (a.bits, a.lanes) != (b.bits, b.lanes):
            raise UnsupportedError(f"[cuda] there is no {a} as {b}")
        whole, wide = ("int", "float") if a.bits == 32 else ("longlong", "double")
        named = f"__{whole}_as_{wide}" if b.kind == "f" else f"__{wide}_as_{whole}"
        return self._value(f"{named}({x.ref})", b)

    def _ballot(self, mask: Value) -> Value:
        if self.lanes > WARP:
            raise UnsupportedError("[cuda] lanes are counted within a warp")
        text = f"__ballot_sync(~0u, {mask.ref})" if self.lanes > 1 else f"(unsigned){mask.ref}"
        kept = f" & {(1 << mask.lanes) - 1}u" if mask.lanes < WARP else ""
        return self._fresh(f"{text}{kept}", Type("i", mask.lanes))

    # Lanes.

    def fold(self, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
        if not x.lanes:
            return x
        half = min(x.lanes, WARP) // 2
        while half:
            x = combine(x, self._shuffle(x, f"lane ^ {half}"))
            half //= 2
        if x.lanes <= WARP:
            return Value(self, self._shuffle(x, "0").ref, x.type.scalar) if self.lanes > 1 else Value(self, x.ref, x.type.scalar)
        self._exchanges = True
        c = c_type(x.type)
        self._line(f"if (lane % 32 == 0) (({c}*)tg_exchange)[lane / 32] = {x.ref};")
        self._line("__syncthreads();")
        parts = [self._fresh(f"(({c}*)tg_exchange)[{i}]", x.type.scalar) for i in range(self.block // WARP)]
        self._line("__syncthreads();")
        total = parts[0]
        for part in parts[1:]:
            total = combine(total, part)
        return total

    def _shuffle(self, x: Value, source: str) -> Value:
        """What the thread of another lane has: within a warp, or for all of a block."""
        c = c_type(x.type)
        if self.lanes == 1:
            return x
        if self.lanes == WARP or "^" in source:
            narrow = f"({c})" if x.type.bits < 32 else ""
            return self._fresh(f"{narrow}__shfl_sync(~0u, {'(int)' if narrow else ''}{x.ref}, {source})", x.type)
        self._exchanges = True
        self._line(f"(({c}*)tg_exchange)[lane] = {x.ref};")
        self._line("__syncthreads();")
        found = self._fresh(f"(({c}*)tg_exchange)[{source}]", x.type)
        self._line("__syncthreads();")
        return found

    def lane(self, x: Value, at: Value) -> Value:
        return Value(self, self._shuffle(x, f"(int){at.ref}").ref, x.type.scalar)

    def with_lane(self, x: Value, at: Value, put: Value) -> Value:
        return self._value(f"lane == (int){at.ref} ? {put.ref} : {x.ref}", x.type)

    def shuffled(self, x: Value, lanes: Sequence[int], other: Value | None) -> Value:
        type = self._fits(x.type.x(len(lanes)))
        place = self.vector([i % x.lanes for i in lanes], I32)
        mine = self._shuffle(x, place.ref)
        found = Value(self, mine.ref, type)
        if all(i < x.lanes for i in lanes):
            return found
        assert other is not None
        theirs = self._shuffle(other, place.ref)
        return self.select(self.vector([int(i < x.lanes) for i in lanes], I32).ne(0), found, Value(self, theirs.ref, type))

    # Conversions.

    def convert(self, x: Value, type: Type, *, signed: bool = True) -> Value:
        type = type.x(x.lanes)
        a, b = x.type, type
        if a == b:
            return x
        if b.bits == 1:
            return self._value(f"(bool)({x.ref} & 1)", b)
        from_unsigned = a.kind == "i" and (not signed or a.bits == 1) and a.bits in (1, 8, 16, 32, 64)
        return self._value(f"({c_type(b)}){f'({_unsigned(a)})' if from_unsigned else ''}{x.ref}", b)

    def number_of(self, address: Value) -> Value:
        return self._value(f"(i64){address.ref}", I64)

    def convert_pointer(self, number: Value) -> Value:
        found = self._value(f"(char*){number.ref}", PTR)
        self.hazards.give(found.ref, Root.FAR)
        return found

    def half_to_f32(self, bits: Value) -> Value:
        return self._value(f"tg_half_to_float((unsigned short){bits.ref})", F32.x(bits.lanes))

    def f32_to_half(self, x: Value) -> Value:
        return self._value(f"(short)tg_float_to_half({x.ref})", Type("i", 16, x.lanes))


def whole(value: int, bits: int) -> str:
    """A number as a literal of so many bits."""
    value = (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    if bits == 64:
        return f"{value}LL" if value != -(1 << 63) else "(-9223372036854775807LL - 1)"
    return str(value) if value != -(1 << 31) else "(-2147483647 - 1)"


def _literal(value: int | float, type: Type) -> str:
    """In a list of constants, which holds no calls."""
    if type.kind == "i":
        return whole(int(value), max(type.bits, 32))
    return f"{float(value).hex()}" if value == value and abs(value) != float("inf") else "(1.0 / 0.0)"
