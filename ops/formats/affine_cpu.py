"""q4_0, q4_1 and q8_0 in layout r16.

A unit is f16 scales of 16 rows, f16 minima of 16 rows (q4_1), then codes in groups of four bytes: the first group of each of 16
rows, the second, ... As in the file a group of 4-bit codes is elements 4 j to 4 j + 3 in the low halves of its bytes, and
16 + 4 j to 19 + 4 j in the high ones.
q8_0 is kept with its sign bit flipped, hence unsigned and centred at 128.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.weights import FORMS, ROWS, Codes, Interleaved

HALVES = ROWS * 2  # bytes of one f16 of each row


def _declare(name: str, bits: int, centre: int, has_min: bool) -> None:
    n_halves = 1 + has_min
    head = n_halves * HALVES
    n_groups = bits  # of 16 rows, 64 bytes each
    flip = -0x7F7F7F80 if bits == 8 else 0  # 0x80 in each byte

    def write(k: Kernel, sources: Sequence[Value], to: Value) -> None:
        for r, source in enumerate(sources):
            for h in range(n_halves):
                k.store(k.load(source + 2 * h, I16), to + (h * HALVES + 2 * r))
            for g in range(n_groups):
                four = k.load(source + (2 * n_halves + 4 * g), I32, align=2)
                k.store(four ^ flip if flip else four, to + (head + 64 * g + 4 * r))

    def half(k: Kernel, unit: Value, number: int, part: int, lanes: int) -> Value:
        return k.half_to_f32(k.load(unit + (number * HALVES + 2 * lanes * part), I16.x(lanes)))

    def scale(k: Kernel, unit: Value, part: int, lanes: int) -> Value:
        return half(k, unit, 0, part, lanes)

    def minimum(k: Kernel, unit: Value, part: int, lanes: int) -> Value:
        return half(k, unit, 1, part, lanes)

    def groups(k: Kernel, unit: Value, part: int, lanes: int) -> Sequence[Value]:
        raw = [k.load(unit + (head + 64 * g + 4 * lanes * part), I8.x(4 * lanes), align=4) for g in range(n_groups)]
        if bits == 8:
            return raw
        pairs = [v.bits_as(I16.x(2 * lanes)) for v in raw]
        return [v & 15 for v in raw] + [(v.shift_right(4) & 0x0F0F).bits_as(I8.x(4 * lanes)) for v in pairs]

    def place(element: int) -> tuple[int, int]:
        """Of an element: its group of bytes, and how far its bits are shifted in the group."""
        high, low = divmod(element, 16) if bits == 4 else (0, element)
        return low // 4, low % 4 * 8 + 4 * high

    def values(k: Kernel, unit: Value, element: int, part: int, lanes: int) -> Value:
        group, shift = place(element)
        word = k.load(unit + (head + 64 * group + 4 * lanes * part), I32.x(lanes))
        code = (word.shift_right(shift) if shift else word) & ((1 << bits) - 1)
        value = k.convert(code - centre if centre else code, F32)
        least = minimum(k, unit, part, lanes) if has_min else 0.0
        return k.fma(value, scale(k, unit, part, lanes), least) if has_min else value * scale(k, unit, part, lanes)

    def row_values(k: Kernel, unit: Value, row: Value, first: Value, lanes: int) -> Value:
        high, low = (first // 16, first % 16) if bits == 4 else (k.i64(0), first)
        words = Value(k, "poison", I32.x(lanes // 4))
        at = unit + low // 4 * 64 + row * 4 + head
        for i in range(words.lanes):
            words = words.with_lane(i, k.load(at + 64 * i, I32))
        codes = words.bits_as(I8.x(lanes))
        if bits == 4:
            codes = codes.shift_right(k.convert(high * 4, I8)) & 15
        whole = k.convert(codes, F32, signed=False) - float(centre)
        scaled = whole * k.splat(_one_half(k, unit + row * 2), lanes)
        return scaled + k.splat(_one_half(k, unit + row * 2 + HALVES), lanes) if has_min else scaled

    FORMS[name] = Interleaved(
        32, head + 64 * n_groups, write, values, row_values, Codes(bits, centre, groups, scale, minimum if has_min else None)
    )


def _one_half(k: Kernel, at: Value) -> Value:
    """A single f16 as f32."""
    return k.half_to_f32(k.load(at, I16.x(1)))[0]


_declare("q4_0", 4, 8, has_min=False)
_declare("q4_1", 4, 0, has_min=True)
_declare("q8_0", 8, 128, has_min=False)
