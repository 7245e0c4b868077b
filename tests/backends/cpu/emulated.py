"""Targets that this machine need not be: it runs their code, with instructions that it may lack spelled out.

What is emitted for them differs from theirs in these instructions alone; that LLVM takes the instructions is another test's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tensorgraph.backends.cpu import device, jit
from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.ir import I16, I32, Type, Value
from tensorgraph.backends.cpu.target import TARGETS, can_run, host

_HERE = host().has - {"avx512", "vnni", "avxvnni", "avx512bf16"}
EMULATED = {
    t.name: t
    for t in (
        replace(host(), name="wide", vector_bytes=64, has=_HERE & {"fma", "neon"}),
        replace(host(), name="as-avx512", vector_bytes=64, has=_HERE | {"avx512"}),
        replace(host(), name="as-vnni", vector_bytes=64, has=_HERE | {"avx512", "vnni"}),
        replace(host(), name="as-avxvnni", vector_bytes=32, has=_HERE | {"avxvnni"}),
    )
}
"""Registers of 64 bytes and no instruction for bytes; pairs of bytes; four bytes; and these in registers of 32 bytes."""


@contextmanager
def emulation() -> Iterator[None]:
    """The targets can be had by name; their code is not kept on disk."""
    right, folder, runs = Function.call, device.default_folder, can_run

    def call(fn: Function, name: str, result: Type, *arguments: Value) -> Value:
        spelled = _SPELLED.get(name) if fn.target.name in EMULATED else None
        return spelled(fn, *arguments) if spelled is not None else right(fn, name, result, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for name, target in EMULATED.items():
            patch.setitem(TARGETS, name, target)
        patch.setattr(Function, "call", call)
        patch.setattr(jit, "can_run", lambda target: target.name in EMULATED or runs(target))
        patch.setattr(device, "default_folder", lambda: None)
        for target in EMULATED.values():
            device.code_for(target)
        patch.setattr(device, "default_folder", folder)
        yield


def _halves(word: Value, signed: bool) -> tuple[Value, Value]:
    """The even and the odd numbers of twice as many, each in the width of two."""
    bits = word.type.bits // 2
    low = word << bits
    return (low >> bits, word >> bits) if signed else (low.shift_right(bits), word.shift_right(bits))


def _products_of_bytes(unsigned: Value, signed: Value) -> tuple[Value, Value]:
    """i16, of even and of odd bytes: 255 * 128 at most."""
    words = I16.x(unsigned.lanes // 2)
    (a, b), (c, d) = _halves(unsigned.bits_as(words), False), _halves(signed.bits_as(words), True)
    return a * c, b * d


def _pairs_of_bytes(k: Function, unsigned: Value, signed: Value) -> Value:
    even, odd = _products_of_bytes(unsigned, signed)
    return Function.call(k, f"llvm.sadd.sat.{even.type.suffix}", even.type, even, odd)


def _pairs_of_words(k: Function, a: Value, b: Value) -> Value:
    wide = I32.x(a.lanes // 2)
    (p, q), (r, s) = _halves(a.bits_as(wide), True), _halves(b.bits_as(wide), True)
    return p * r + q * s


def _fours_of_bytes(k: Function, total: Value, unsigned: Value, signed: Value) -> Value:
    for products in _products_of_bytes(unsigned, signed):
        low, high = _halves(products.bits_as(total.type), True)
        total = total + low + high
    return total


def _look_up(k: Function, table: Value, codes: Value) -> Value:
    """In each 16 bytes, by the low bits of a code; 0 where its highest is set."""
    found = k.zero(codes.type)
    for n in range(16):
        from_each = table.shuffle([lane // 16 * 16 + n for lane in range(codes.lanes)])
        found = k.select((codes & 0x8F).eq(n), from_each, found)
    return found


_SPELLED: dict[str, Callable[..., Value]] = {
    "llvm.x86.avx512.pmaddubs.w.512": _pairs_of_bytes,
    "llvm.x86.avx512.pmaddw.d.512": _pairs_of_words,
    "llvm.x86.avx512.vpdpbusd.512": _fours_of_bytes,
    "llvm.x86.avx512.vpdpbusd.256": _fours_of_bytes,
    "llvm.x86.avx512.pshuf.b.512": _look_up,
}
