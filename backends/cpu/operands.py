"""Operands of a kernel: where their elements lie, loads and stores that convert to and from the type computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorgraph.backends.cpu.ir import F32, F64, I8, I16, I32, I64, Int, Type, Value
from tensorgraph.dtypes import DType
from tensorgraph.errors import UnsupportedError

if TYPE_CHECKING:
    from tensorgraph.backends.cpu.kernel import Kernel

_STORED = {"f64": F64, "f32": F32, "f16": I16, "bf16": I16, "i64": I64, "i32": I32, "i16": I16, "i8": I8, "u8": I8, "bool": I8}
_COMPUTED = {"f64": F64, "i64": I64, "i32": I32, "i16": I32, "i8": I32, "u8": I32, "bool": I32}


def stored_type(dtype: DType) -> Type:
    """How an element lies in memory; f16 and bf16 as their bits. Values of block types that are no constants are held in f32."""
    if dtype.is_block:
        return F32
    if dtype.name not in _STORED:
        raise UnsupportedError(f"[cpu] there are no kernels for {dtype}")
    return _STORED[dtype.name]


def is_stored(dtype: DType) -> bool:
    """Whether there is a `stored_type`."""
    return dtype.is_block or dtype.name in _STORED


def computed_type(dtype: DType) -> Type:
    """What kernels compute in: f32 for floats, i32 or i64 for integers and bools."""
    return _COMPUTED.get(dtype.name, F32)


def read_value(k: Kernel, raw: Value, dtype: DType) -> Value:
    """A stored element (or vector of them) as the type computed in."""
    if dtype.name == "f16":
        return k.half_to_f32(raw)
    if dtype.name == "bf16":
        return k.bf16_to_f32(raw)
    return k.convert(raw, computed_type(dtype), signed=dtype.name not in ("u8", "bool"))


def written_value(k: Kernel, value: Value, dtype: DType) -> Value:
    """A value as it is stored; rounded to nearest for floats, cut for integers."""
    if dtype.name == "f16":
        return k.f32_to_half(value)
    if dtype.name == "bf16":
        return k.f32_to_bf16(value)
    return k.convert(value, stored_type(dtype))


def _is(value: Int, number: int) -> bool:
    """Whether an extent is known to be this number."""
    return isinstance(value, int) and value == number


@dataclass(frozen=True)
class Row:
    """Elements along one axis, `stride` elements apart: 1, 0 (all the same one), or any number, known or not."""

    k: Kernel
    dtype: DType
    address: Value
    stride: Int

    @property
    def type(self) -> Type:
        """The type that `load` gives, of one element."""
        return computed_type(self.dtype)

    def load(self, i: Int, lanes: int = 0, mask: Value | None = None) -> Value:
        """Elements i, i + 1, ... (one where `lanes` is 0) in the type computed in; lanes outside the mask are 0 and not read."""
        k = self.k
        if not lanes or _is(self.stride, 0):
            value = read_value(k, k.load(self.at(i), stored_type(self.dtype)), self.dtype)
            if mask is not None:
                return k.select(mask, k.splat(value, lanes), k.zero(value.type.x(lanes)))
            return k.splat(value, lanes)
        return read_value(k, self.raw(i, lanes, mask), self.dtype)

    def raw(self, i: Int, lanes: int, mask: Value | None = None) -> Value:
        """Elements i, i + 1, ... as they are stored; the stride must not be 0."""
        k, stored = self.k, stored_type(self.dtype).x(lanes)
        if self.together:
            return k.load(self.at(i), stored, mask=mask)
        return k.gather(self.at(i), self._offsets(lanes), stored, mask)

    def store(self, i: Int, value: Value, mask: Value | None = None) -> None:
        """Write a value (a vector: to elements i, i + 1, ...), rounded to this dtype; the stride must not be 0."""
        k, raw = self.k, written_value(self.k, value, self.dtype)
        if not value.lanes or self.together:
            k.store(raw, self.at(i), mask=mask)
        else:
            k.scatter(raw, self.at(i), self._offsets(value.lanes), mask)

    @property
    def together(self) -> bool:
        """Whether the elements of a vector lie side by side."""
        return _is(self.stride, 1)

    def at(self, i: Int) -> Value:
        """The address of an element."""
        item = stored_type(self.dtype).size_bytes
        return self.address if _is(self.stride, 0) else self.address + self.k.i64(i) * self.stride * item

    def _offsets(self, lanes: int) -> Value:
        k = self.k
        return k.lane_numbers(lanes, I64) * k.splat(k.i64(self.stride) * stored_type(self.dtype).size_bytes, lanes)


@dataclass(frozen=True)
class PanelRow(Row):
    """Elements that lie side by side in groups of `width`, the groups `stride` elements apart; a vector lies within one group."""

    width: int = 16

    @property
    def together(self) -> bool:
        return True

    def at(self, i: Int) -> Value:
        i = self.k.i64(i)
        return self.address + (i // self.width * self.stride + i % self.width) * stored_type(self.dtype).size_bytes


@dataclass(frozen=True)
class Operand:
    """One input or result of a kernel.

    Attributes:
        shape, strides: in elements; ints where known while emitting, else registers.
        layout: "dense" (any strides), "r16" for interleaved weights, that of a stream (`state.Layout`) for its pages.
        table: of a stream, the address of its class's table (`backends.cpu.streams`).
    """

    k: Kernel
    dtype: DType
    shape: tuple[Int, ...]
    strides: tuple[Int, ...]
    address: Value
    layout: str = "dense"
    table: Value | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def type(self) -> Type:
        """The type that loads give, of one element."""
        return computed_type(self.dtype)

    def at(self, index: Sequence[Int]) -> Value:
        """The address of an element, or of the first of those below a shorter index."""
        k, place = self.k, self.k.i64(0)
        for i, stride in zip(index, self.strides, strict=False):
            place = place + k.i64(i) * stride
        return self.address + place * stored_type(self.dtype).size_bytes

    def row(self, index: Sequence[Int], axis: int = -1) -> Row:
        """The elements along an axis, at an index over all the others (in order)."""
        axis %= self.ndim
        return Row(self.k, self.dtype, self.at([*index[:axis], 0, *index[axis:]]), self.strides[axis])

    def load(self, index: Sequence[Int]) -> Value:
        """One element in the type computed in."""
        return read_value(self.k, self.k.load(self.at(index), stored_type(self.dtype)), self.dtype)

    def store(self, index: Sequence[Int], value: Value) -> None:
        self.k.store(written_value(self.k, value, self.dtype), self.at(index))

    def broadcast(self, shape: Sequence[Int]) -> Operand:
        """By NumPy's rule. Axes whose length is known to be 1, and missing leading ones, get stride 0."""
        lead = len(shape) - self.ndim
        strides = [0 if isinstance(n, int) and n == 1 else s for n, s in zip(self.shape, self.strides, strict=True)]
        return Operand(self.k, self.dtype, tuple(shape), (*(0,) * lead, *strides), self.address, self.layout, self.table)
