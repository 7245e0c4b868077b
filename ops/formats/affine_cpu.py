"""Types of a scale, and a minimum if any, for each block of 32 codes of 4 or 8 bits, in layout r16: q4_0, q4_1, q8_0.

A unit is scales of 16 rows, minima of 16 rows, then codes in groups of four bytes: the first group of each of 16 rows, the
second, ... As in the file a group of 4-bit codes is elements 4 j to 4 j + 3 in the low halves of its bytes, and 16 + 4 j to
19 + 4 j in the high ones. Signed codes of 8 bits are kept with the sign bit flipped, hence unsigned and centred at 128.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.ir import F32, I8, I16, I32, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.weights import FORMS, ROWS, Codes, Interleaved, Recode


def declare_affine(
    name: str, bits: int, centre: int, *, has_min: bool, scale_bytes: int = 2, recode: Recode | None = None
) -> None:
    """The form of a type whose row of a block is (as `recode` gives it, else in the file) scale, minimum, codes.

    Args:
        scale_bytes: of a scale, and a minimum: 2 for f16, 4 for f32.
    """
    n_heads = 1 + has_min
    column = ROWS * scale_bytes
    head = n_heads * column
    flip = -0x7F7F7F80 if centre == 128 else 0  # 0x80 in each byte
    stored = I16 if scale_bytes == 2 else I32

    def write(k: Kernel, sources: Sequence[Value], to: Value) -> None:
        for r, source in enumerate(sources):
            for h in range(n_heads):
                k.store(k.load(source + scale_bytes * h, stored, align=2), to + (h * column + scale_bytes * r))
            for word in range(bits):
                four = k.load(source + (scale_bytes * n_heads + 4 * word), I32, align=2)
                k.store(four ^ flip if flip else four, to + (head + 64 * word + 4 * r))

    def read(k: Kernel, at: Value, lanes: int) -> Value:
        return k.half_to_f32(k.load(at, I16.x(lanes))) if scale_bytes == 2 else k.load(at, F32.x(lanes))

    def scale(k: Kernel, unit: Value, part: int, lanes: int) -> Value:
        return read(k, unit + part * lanes * scale_bytes, lanes)

    def minimum(k: Kernel, unit: Value, part: int, lanes: int) -> Value:
        return read(k, unit + (column + part * lanes * scale_bytes), lanes)

    def groups(k: Kernel, unit: Value, part: int, lanes: int, word: Int) -> Sequence[tuple[Int, Value]]:
        raw = k.load(unit + k.i64(word) * 64 + (head + 4 * lanes * part), I8.x(4 * lanes), align=4)
        if bits == 8:
            return [(word, raw)]
        high = (raw.bits_as(I16.x(2 * lanes)).shift_right(4) & 0x0F0F).bits_as(raw.type)
        return [(word, raw & 15), (word + 4, high)]

    def place(element: int) -> tuple[int, int]:
        """Of an element: its group of bytes, and how far its bits are shifted in the group."""
        high, low = divmod(element, 16) if bits == 4 else (0, element)
        return low // 4, low % 4 * 8 + 4 * high

    def values(k: Kernel, unit: Value, element: int, part: int, lanes: int) -> Value:
        group, shift = place(element)
        four = k.load(unit + (head + 64 * group + 4 * lanes * part), I32.x(lanes))
        code = (four.shift_right(shift) if shift else four) & ((1 << bits) - 1)
        value = k.convert(code - centre if centre else code, F32)
        by = scale(k, unit, part, lanes)
        return k.fma(value, by, minimum(k, unit, part, lanes)) if has_min else value * by

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
        scaled = whole * k.splat(read(k, unit + row * scale_bytes, 1)[0], lanes)
        return scaled + k.splat(read(k, unit + (row * scale_bytes + column), 1)[0], lanes) if has_min else scaled

    codes = Codes(bits, centre, groups, scale, minimum if has_min else None)
    FORMS[name] = Interleaved(32, head + 64 * bits, scale_bytes * n_heads + 4 * bits, write, values, row_values, codes, recode)


declare_affine("q4_0", 4, 8, has_min=False)
declare_affine("q4_1", 4, 0, has_min=True)
declare_affine("q8_0", 8, 128, has_min=False)
