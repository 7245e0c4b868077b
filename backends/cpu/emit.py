"""A thin emitter of LLVM IR: one function, written as text, with structured loops and vectors of any width.

A Python `for` unrolls; `with f.loop(...)` does not. Nothing is optimised afterwards but by code generation, so what is
written here is what runs: values carried by loops are phis, never memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorgraph.backends.cpu.arithmetic import Arithmetic
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


class Function(Arithmetic):
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

    def move(self, item: Type, to: Value, to_stride: Int, source: Value, stride: Int, n: Int) -> None:
        """Copy n elements from one address to another that has none in common with it; strides in elements."""
        size = item.size_bytes
        if _is(stride, 1) and _is(to_stride, 1):
            name = "llvm.memcpy.p0.p0.i64"
            self.declare(name, None, (PTR, PTR, I64, I1))
            self.write(f"call void @{name}(ptr {to.ref}, ptr {source.ref}, i64 {(self.i64(n) * size).ref}, i1 false)")
            return
        done: Int = 0
        value = None
        if _is(stride, 0):
            value = self.load(source, item)
            if _is(to_stride, 1):
                lanes = self.target.vector_bytes // size
                done, many = n // lanes * lanes, self.splat(value, lanes)
                with self.loop(0, self.i64(done), lanes) as loop:
                    self.store(many, to + loop.i * size)
                    loop.next()
        with self.loop(done, self.i64(n)) as loop:
            self.store(value or self.load(source + loop.i * stride * size, item), to + loop.i * to_stride * size)
            loop.next()

    def clear(self, to: Value, n_bytes: Int) -> None:
        """Write zeros."""
        name = "llvm.memset.p0.i64"
        self.declare(name, None, (PTR, I8, I64, I1))
        self.write(f"call void @{name}(ptr {to.ref}, i8 0, i64 {self.i64(n_bytes).ref}, i1 false)")

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


def _is(value: Int, number: int) -> bool:
    return isinstance(value, int) and value == number


__all__ = ["F32", "F64", "I1", "I8", "I16", "I32", "I64", "PTR", "Function", "Loop", "Values"]
