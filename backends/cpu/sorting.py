"""Order and selection: keys that compare as floats do, the order of keys, and the least of many that are offered in turn.

Memory is the caller's: what is taken of it is said by a function of the extents. Keys are signed integers, i32 or i64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import I32, I64, Int, Type, Value
from tensorgraph.backends.cpu.kernel import Kernel

TILE = 1024
"""As many elements are offered to a selection between two looks at how full it is."""
_RANKED = 128  # up to so many keys are ordered by counting, for each, those before it
AHEAD = 64
"""Elements that may be read, and written, beyond the end of an array."""


def running(k: Kernel, x: Value) -> Value:
    """In each lane the sum of all lanes up to it."""
    zero, by = k.zero(x.type), 1
    while by < x.lanes:
        x = x + x.shuffle([i - by if i >= by else x.lanes + i for i in range(x.lanes)], zero)
        by *= 2
    return x


def key_type(x: Type) -> Type:
    """Of the keys of floats."""
    return I64 if x.bits == 64 else I32


def _highest(type: Type) -> int:
    return (1 << (type.bits - 1)) - 1


def ordered_key(k: Kernel, x: Value, *, descending: bool) -> Value:
    """Integers that stand in the order of floats, or in the reverse; zeros of both signs are equal, NaN the highest in either."""
    type = key_type(x.type).x(x.lanes)
    bits = (x + 0.0).bits_as(type)  # -0 becomes 0
    key = bits ^ ((bits >> (type.bits - 1)) & _highest(type))
    return k.select(x.is_nan(), _highest(type), key.invert() if descending else key)


def lowest_key(type: Type) -> int:
    """The key of -inf in descending order: those of all other numbers are below it, that of NaN is above."""
    return 0x7FF0000000000000 if type.bits == 64 else 0x7F800000


# Order.


def sort_bytes(n: int) -> int:
    """Memory that `sorted_positions` of at most n keys takes."""
    return 2 * 4 * (n + AHEAD) + (8 * 256 * 4 if n > _RANKED else 0)


def sorted_positions(k: Kernel, keys: Value, type: Type, n: Int, most: Int, memory: Value) -> Value:
    """The address of the positions (i32) of n keys in ascending order, equal ones by position.

    `most` is the largest n, by which `memory` is laid out; after the keys there is room for AHEAD more.
    """
    k.store(k.const(_highest(type), type.x(k.lanes)), keys + k.i64(n) * type.size_bytes)
    if isinstance(most, int) and most <= _RANKED:
        return _by_rank(k, keys, type, n, memory)
    few = k.i64(n).le(_RANKED)
    return k.either(few, lambda: [_by_rank(k, keys, type, n, memory)], lambda: [_by_digits(k, keys, type, n, most, memory)])[0]


def _by_rank(k: Kernel, keys: Value, type: Type, n: Int, to: Value) -> Value:
    """Each position goes to the place that is the number of keys before it."""
    size, wide = type.size_bytes, type.x(k.lanes)
    with k.loop(0, n) as outer:
        outer.next()
        own = k.splat(k.load(keys + outer.i * size, type), k.lanes)
        place = k.splat(k.convert(outer.i, type), k.lanes)
        with k.loop(0, n, k.lanes, [k.zero(wide)]) as inner:
            other = k.load(keys + inner.i * size, wide)
            at = k.lane_numbers(k.lanes, type) + k.convert(inner.i, type)
            before = other.lt(own) | (other.eq(own) & at.lt(place))
            inner.next(inner.values[0] + k.convert(before, type))
        rank = k.convert(k.sum(inner.results[0]), I64)
        k.store(k.narrow(outer.i, I32), to + rank * 4)
    return to


def _by_digits(k: Kernel, keys: Value, type: Type, n: Int, most: Int, memory: Value) -> Value:
    """Positions moved by one byte of their keys at a time, the lowest first; bytes that are the same in all are passed over."""
    digits, size = type.bits // 8, type.size_bytes
    room = (k.i64(most) + AHEAD) * 4
    first, second = memory, memory + room
    counts = second + room

    def digit(position: Value, shift: Int) -> Value:
        key = k.load(keys + position * size, type) ^ -(1 << (type.bits - 1))
        return k.convert(key.shift_right(shift) & 255, I64)

    def write(i: Value, mask: Value | None, _: list[Value]) -> None:
        k.store(k.lane_numbers(k.lanes) + k.narrow(i, I32), first + i * 4, mask=mask)

    k.sweep(n, write)
    with k.loop(0, digits * 256, k.lanes) as loop:
        loop.next()
        k.store(k.zero(I32.x(k.lanes)), counts + loop.i * 4)
    with k.loop(0, n) as loop:
        loop.next()
        for d in range(digits):
            at = counts + (digit(loop.i, 8 * d) + 256 * d) * 4
            k.store(k.load(at, I32) + 1, at)

    with k.loop(0, digits, 1, [first, second]) as loop:
        source, to = loop.values
        own, shift = counts + loop.i * 1024, k.convert(loop.i * 8, type)

        def move() -> list[Value]:
            with k.loop(0, 256, 1, [k.const(0, I32)]) as sums:
                at = own + sums.i * 4
                count = k.load(at, I32)
                k.store(sums.values[0], at)
                sums.next(sums.values[0] + count)
            with k.loop(0, n) as each:
                each.next()
                position = k.load(source + each.i * 4, I32)
                at = own + digit(k.convert(position, I64), shift) * 4
                place = k.load(at, I32)
                k.store(position, to + k.convert(place, I64) * 4)
                k.store(place + 1, at)
            return [to, source]

        alike = k.load(own + digit(k.i64(0), shift) * 4, I32).eq(k.narrow(k.i64(n), I32))
        loop.next(*k.either(alike, lambda: [source, to], move))
    return loop.results[0]


# Selection.


def lane_bits(k: Kernel, mask: Value) -> Value:
    """A mask as the low bits of an i64."""
    return k.convert(mask.bits_as(Type("i", mask.lanes)), I64, signed=False)


def write_lanes(k: Kernel, mask: Value, count: Value, *written: tuple[Value, Value]) -> Value:
    """The lanes in the mask, one after another, of each vector to its address; returns `count` plus how many they are.

    A whole vector is written where there are any. A vector must not be wider than a register (LLVM 22 crashes on AVX-512 code
    for those).
    """
    bits = lane_bits(k, mask)

    def write() -> list[Value]:
        for vector, address in written:
            k.store(_compress(k, vector, mask), address)
        return [count + k.unary("ctpop", bits)]

    return k.either(bits.ne(0), write, lambda: [count])[0]


@dataclass(frozen=True)
class Least:
    """The `n` least of many keys with their numbers, of equal keys those that were offered first.

    All that is offered and below the limit is written down; when that is many more than n, the n-th least of them is the new
    limit and the others go. What is carried is [how many are written down, the limit].

    Attributes:
        memory: `least_bytes(n, type)` bytes.
    """

    k: Kernel
    memory: Value
    n: int
    type: Type

    @property
    def lanes(self) -> int:
        """Of the vectors that are offered: a register of keys."""
        return self.k.target.vector_bytes // self.type.size_bytes

    @property
    def keys(self) -> Value:
        return self.memory

    @property
    def numbers(self) -> Value:
        return self.memory + _room(self.n) * self.type.size_bytes

    @property
    def rest(self) -> Value:
        """Memory for the sort."""
        return self.numbers + _room(self.n) * 4

    def begin(self, limit: int) -> list[Value]:
        """Nothing yet; only keys below `limit` are taken."""
        return [self.k.i64(0), self.k.const(limit, self.type)]

    def offer(self, n: Int, key: Callable[[Value, Value | None], tuple[Value, Value]], state: list[Value]) -> list[Value]:
        """Keys and numbers (i32) i, i + 1, ... of n, at most TILE; `key(i, mask)` gives a vector of each, `lanes` wide."""
        k = self.k
        limit = k.splat(state[1], self.lanes)

        def take(i: Value, mask: Value | None, carried: list[Value]) -> list[Value]:
            keys, numbers = key(i, mask)
            taken = keys.lt(limit)
            return [self._write(keys, numbers, taken if mask is None else taken & mask, carried[0])]

        return [*k.sweep(n, take, state[:1], self.lanes), state[1]]

    def _write(self, keys: Value, numbers: Value, taken: Value, count: Value) -> Value:
        size = self.type.size_bytes
        return write_lanes(self.k, taken, count, (keys, self.keys + count * size), (numbers, self.numbers + count * 4))

    def cut(self, state: list[Value], last: Value) -> list[Value]:
        """After each offer: down to n where it is time; after the last one (i1), whenever there are more than n."""
        k, count = self.k, state[0]
        full = count.gt(self.n + _slack(self.n)) | (last & count.gt(self.n))
        return k.either(full, lambda: self._cut(count), lambda: state)

    def _cut(self, count: Value) -> list[Value]:
        k, type, size = self.k, self.type, self.type.size_bytes
        wide = type.x(self.lanes)
        for i in range(0, 4 * self.lanes, self.lanes):
            k.store(k.const(_highest(type), wide), self.keys + (count + i) * size)
        sign = -(1 << (type.bits - 1))
        with k.loop(0, type.bits, 1, [k.const(0, type), k.const(0, type)]) as bits:  # from the highest bit of unsigned keys on
            below, n_below = bits.values
            higher = below | (k.const(1, type) << k.convert(type.bits - 1 - bits.i, type))
            found = self._count_below(higher ^ sign, count)
            fits = found.lt(self.n)
            bits.next(k.select(fits, higher, below), k.select(fits, found, n_below))
        limit = bits.results[0] ^ sign
        highest = k.splat(limit, self.lanes)
        with k.loop(0, count, self.lanes, [k.i64(0), self.n - bits.results[1]]) as kept:
            to, left = kept.values
            keys, numbers = k.load(self.keys + kept.i * size, wide), k.load(self.numbers + kept.i * 4, I32.x(self.lanes))
            equal = keys.eq(highest)
            ranks = running(k, k.convert(equal, type))
            taken = keys.lt(highest) | (equal & ranks.le(left))
            kept.next(self._write(keys, numbers, taken, to), left - ranks[self.lanes - 1])
        return [kept.results[0], limit]

    def _count_below(self, key: Value, count: Value) -> Value:
        k, wide = self.k, self.type.x(self.lanes)
        at = k.splat(key, self.lanes)
        with k.loop(0, count, 4 * self.lanes, [k.zero(wide)] * 2) as loop:
            sums = list(loop.values)
            for i in range(4):
                below = k.load(self.keys + (loop.i + i * self.lanes) * self.type.size_bytes, wide).lt(at)
                sums[i % 2] = sums[i % 2] + k.convert(below, self.type)
            loop.next(*sums)
        return k.sum(loop.results[0] + loop.results[1])

    def write(self, state: list[Value], put: Callable[[Value, Value], None]) -> None:
        """`put(place, number)` for each of the n places: the numbers by ascending key, then -1."""
        k, count = self.k, state[0]
        order = sorted_positions(k, self.keys, self.type, count, self.n, self.rest)
        with k.loop(0, count) as loop:
            loop.next()
            position = k.convert(k.load(order + loop.i * 4, I32), I64)
            put(loop.i, k.load(self.numbers + position * 4, I32))
        with k.loop(count, self.n) as loop:
            loop.next()
            put(loop.i, k.const(-1, I32))


def least_bytes(n: int, type: Type) -> int:
    """Memory that the selection of n takes."""
    return _room(n) * (type.size_bytes + 4) + sort_bytes(n)


def _slack(n: int) -> int:
    return max(n, 256)


def _room(n: int) -> int:
    """Of each array; a multiple of 64."""
    return -(-(n + _slack(n) + TILE) // 64) * 64 + AHEAD


def _compress(k: Kernel, x: Value, mask: Value) -> Value:
    """The lanes in the mask, from the first lane on; what follows them is any."""
    x_type = x.type
    name = f"llvm.experimental.vector.compress.{x_type.suffix}"
    k.declare(name, x_type, (x_type, mask.type, x_type))
    return k.instruction(f"call {x_type} @{name}({x_type} {x.ref}, {mask.type} {mask.ref}, {x_type} poison)", x_type)


__all__ = [
    *("AHEAD", "TILE", "Least", "key_type", "lane_bits", "least_bytes", "lowest_key", "ordered_key", "running", "sort_bytes"),
    *("sorted_positions", "write_lanes"),
]
