"""Memory for constants: pieces that lie side by side, and live as long as they are used."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tensorgraph.backends.cpu import constants
from tensorgraph.backends.cpu.constants import ALIGNMENT, LARGE_PAGE, SLAB_BYTES, ConstantMemory


def address(piece: np.ndarray) -> int:
    return int(piece.ctypes.data)


def test_pieces_are_zeroed_aligned_and_neighbours() -> None:
    memory = ConstantMemory()
    sizes = [0, 1, 63, 64, 65, 4096, 1_000_003]
    pieces = [memory.take(n) for n in sizes]
    assert [len(p) for p in pieces] == sizes
    assert address(pieces[0]) % LARGE_PAGE == 0
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert address(after) % ALIGNMENT == 0
        assert ALIGNMENT <= address(after) - (address(before) + len(before)) < 2 * ALIGNMENT  # readable, and no more
    for i, piece in enumerate(pieces):
        assert not piece.any()
        piece[:] = i + 1
    assert [set(p.tolist()) for p in pieces[1:]] == [{i + 1} for i in range(1, len(sizes))]


def test_a_piece_may_be_larger_than_a_slab() -> None:
    memory = ConstantMemory()
    small = memory.take(5)
    large = memory.take(SLAB_BYTES + LARGE_PAGE)
    large[-1] = 7
    assert len(large) == SLAB_BYTES + LARGE_PAGE and address(large) % LARGE_PAGE == 0 and not small.any()


def test_threads_take_from_one_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first is making the slab that both need."""
    made: list[int] = []

    def slowly(size_bytes: int) -> np.ndarray:
        made.append(size_bytes)
        time.sleep(0.1)
        return real(size_bytes)

    real = constants._slab
    monkeypatch.setattr(constants, "_slab", slowly)
    memory = ConstantMemory()
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda _: memory.take(64), range(4)))
    assert len(made) == 1 and len({address(p) for p in pieces}) == 4


def test_a_slab_is_given_back_with_its_last_piece() -> None:
    memory = ConstantMemory()
    a, b = memory.take(100), memory.take(100)
    slab = weakref.ref(a.base)
    assert a.base is b.base
    del a
    gc.collect()
    assert slab() is not None
    c = memory.take(100)
    assert c.base is slab()
    del b, c
    gc.collect()
    assert slab() is None
    assert not memory.take(100).any()
