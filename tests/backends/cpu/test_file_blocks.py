"""Bits of blocks that are moved: found out from any NumPy function that moves them, and moved by kernels in the same way."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.file_blocks import NONE, SEVERAL, Moves, find_moves
from tensorgraph.backends.cpu.ir import PTR
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.target import host
from tensorgraph.backends.cpu.weights import FORMS, interleaved
from tensorgraph.ops.formats import FORMATS
from tensorgraph.ops.formats.coded_cpu import unit_parts
from tensorgraph.ops.formats.group_codes_cpu import READERS

Array = np.ndarray[Any, Any]
SIZES = (1, 2, 4)


def mover(moves: Moves) -> Any:
    """The function that moves bits so."""

    def make(raw: Array) -> Array:
        bits = np.unpackbits(raw, axis=1, bitorder="little")
        taken = np.where(moves.source == NONE, 0, bits[:, moves.source]) ^ moves.flips
        return np.packbits(taken.astype(np.uint8), axis=1, bitorder="little")

    return make


def run(moves: Moves, size: int, block: Array) -> bytes:
    """What a kernel makes of a block, in numbers of so many bytes."""
    k: Any = Function("kernel", {"block": PTR, "to": PTR}, host())
    given, to = k.parameters.values()
    for at in range(0, len(moves.flips) // 8, size):
        k.store(moves.load(k, given, at, size), to + at, align=1)
    found = np.zeros(len(moves.flips) // 8, np.uint8)
    jit = Jit(host(), None)
    call = ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 2)(jit.compile([k.text()])[0])
    call(block.ctypes.data, found.ctypes.data)
    return found.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 9), st.sampled_from(SIZES), st.integers(1, 3), st.integers(0, 1 << 32), st.sampled_from((0.0, 0.2, 1.0)))
def test_any_moves_are_found_and_made(n: int, size: int, numbers: int, seed: int, rare: float) -> None:
    """Bits anywhere in a block, the first and last bytes of it too: nothing outside is read."""
    rng = np.random.default_rng(seed)
    m = 8 * size * numbers
    source = np.where(rng.random(m) < rare, NONE, rng.integers(0, 8 * n, m))
    moves = Moves(n, source, rng.integers(0, 2, m, np.uint8))
    found = find_moves(mover(moves), n)
    np.testing.assert_array_equal(found.source, source)
    np.testing.assert_array_equal(found.flips, moves.flips)
    block = rng.integers(0, 256, (1, n), np.uint8)
    assert run(found, size, block[0]) == mover(moves)(block).tobytes()


@pytest.mark.parametrize(
    "several",
    [
        lambda raw: raw[:, :1] + raw[:, 1:2],
        lambda raw: raw[:, :1] & raw[:, 1:2],
        lambda raw: raw[:, :1] ^ raw[:, 1:2],
        lambda raw: np.where(raw[:, :1] == 0, raw[:, 1:2], 3).astype(np.uint8),
        lambda raw: np.where(raw[:, :1] == 77, 0, raw[:, 1:2]).astype(np.uint8),
    ],
)
def test_what_is_more_than_moved_bits_is_known(several: Any) -> None:
    found = find_moves(lambda raw: np.concatenate([several(raw), raw[:, :1]], axis=1), 4)
    assert (found.source[:8] == SEVERAL).any() and found.source[8:].tolist() == list(range(8))
    k: Any = Function("kernel", {"block": PTR}, host())
    with pytest.raises(ValueError, match=r"\[moves\] wanted moved bits; byte 0"):
        found.load(k, k.parameters["block"], 0, 1)


def test_most_types_need_nothing_else() -> None:
    interleaved(FORMATS["q4_0"].dtype)
    more = set()
    for name, form in FORMS.items():
        if form.codes is not None and SEVERAL in find_moves(unit_parts(FORMATS[name], form.codes), form.file_block_bytes).source:
            more.add(name)
    assert more == READERS.keys()
