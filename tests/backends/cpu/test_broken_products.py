"""Products broken on purpose: what is asserted of every type catches each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tensorgraph.backends.cpu import activations, blocks, codes, device, fixed, gemm, int8, matvec
from tensorgraph.backends.cpu.blocks import Block
from tensorgraph.backends.cpu.codes import Codes
from tensorgraph.backends.cpu.device import code_for
from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import Kernel
from tests.backends.cpu.emulated import emulation
from tests.backends.cpu.products import assert_any_size_is_right, assert_nothing_overflows, assert_rows_are_right, wide

Patch = pytest.MonkeyPatch
Break = Callable[[Patch], None]


@pytest.fixture
def apart() -> Iterator[Patch]:
    """Code of its own, none of it on disk."""
    code_for.cache_clear()
    with pytest.MonkeyPatch.context() as patch, emulation():
        patch.setattr(device, "default_folder", lambda: None)
        yield patch
    code_for.cache_clear()


# Blocks.


def of_blocks(change: Callable[[Block], Block]) -> Break:
    """What is read of a block, changed."""

    def make(patch: Patch) -> None:
        right = blocks.read_block
        for module in (gemm, matvec):
            patch.setattr(module, "read_block", lambda *given: change(right(*given)))

    return make


def one_factor_for_both_halves(block: Block) -> Block:
    return replace(block, factors=[block.factors[0]] * 2)


def centre_forgotten(block: Block) -> Block:
    return replace(block, offset=None)


def minima_of_the_other_half(block: Block) -> Block:
    assert block.minima is not None and block.least is not None
    return replace(block, least=block.least + block.minima, minima=-block.minima)


def centre_of_fewer_bits(patch: Patch) -> None:
    right = blocks._Tail.__init__
    patch.setattr(blocks._Tail, "__init__", lambda self, k, of, *row: right(self, k, replace(of, centre=of.centre // 2), *row))


def table_one_on(patch: Patch) -> None:
    right = codes.lookup
    patch.setattr(codes, "lookup", lambda k, table, of: right(k, (*table[1:], table[0]), of))


def high_bits_of_the_next_group(patch: Patch) -> None:
    right = codes._moved
    patch.setattr(codes, "_moved", lambda word, start, bits, to: right(word, (start + bits) % 8 if to else start, bits, to))


def factors_without_signs(patch: Patch) -> None:
    right = Codes.factors_at

    def factors_at(self: Codes, *given: Any) -> tuple[list[Value], list[Value]]:
        scales, minima = right(self, *given)
        return [v & 255 for v in scales], minima

    patch.setattr(Codes, "factors_at", factors_at)


# Dot products of bytes.


def closed_too_late(patch: Patch) -> None:
    """Sums of pairs go on until they no longer fit into 16 bits."""
    right = int8._Pairs.__init__

    def begin(self: Any, *given: Any) -> None:
        right(self, *given)
        self.run *= 2

    patch.setattr(int8._Pairs, "__init__", begin)


def bytes_whole(patch: Patch) -> None:
    """Codes of 8 bits are not taken in halves."""
    right = int8._Pairs.__init__
    patch.setattr(int8._Pairs, "__init__", lambda self, k, most, lanes: right(self, k, min(most, 127), lanes))


def divided_by_too_little(patch: Patch) -> None:
    """Activations are divided by scales that have no inverse."""
    patch.setattr(activations, "_TINY", 0.0)


def pairs_turned(patch: Patch) -> None:
    right = fixed._joined
    patch.setattr(fixed, "_joined", lambda low, high: right(high, low))


# Slices, groups and tiles.


def last_slice_left_out(patch: Patch) -> None:
    """Where it is not whole."""
    integer, floating = gemm._integer_tiles, gemm._float_tiles

    def of_codes(k: Kernel, panels: int, codes: Any, dot: Any, x: Any, start: Value, n: Value, *given: Any) -> None:
        with k.when(n.eq(gemm.slice_length(codes, dot))):
            integer(k, panels, codes, dot, x, start, n, *given)

    def of_floats(k: Kernel, sources: Any, x: Any, start: Value, n: Value, *given: Any) -> None:
        with k.when(n.eq(256)):
            floating(k, sources, x, start, n, *given)

    patch.setattr(gemm, "_integer_tiles", of_codes)
    patch.setattr(gemm, "_float_tiles", of_floats)


def last_group_left_out(patch: Patch) -> None:
    right = gemm.multiply_piece

    def piece(k: Kernel, weights: Any, tiling: Any, group: Value, *given: Any) -> None:
        with k.when(group.lt(2)):
            right(k, weights, tiling, group, *given)

    patch.setattr(gemm, "multiply_piece", piece)


def not_stored(which: Callable[[Value, Value, Value], Value]) -> Break:
    """Results of which `which(tile, row, rows)` does not hold are lost."""

    def make(patch: Patch) -> None:
        right = gemm.multiply_piece

        def piece(k: Kernel, weights: Any, tiling: Any, group: Value, matrix: Any, x: Any, count: Value, store: Any) -> None:
            def stored(tile: Value, n: Value, sums: list[Value]) -> None:
                with k.when(which(tile, n, count)):
                    store(tile, n, sums)

            right(k, weights, tiling, group, matrix, x, count, stored)

        patch.setattr(gemm, "multiply_piece", piece)

    return make


def sums_of_two_panels_in_one_place(patch: Patch) -> None:
    right = gemm._Room.sums
    patch.setattr(gemm._Room, "sums", lambda self, panel: right(self, panel // 2 * 2))


def rows(backend: str, name: str) -> None:
    assert_rows_are_right(backend, name, False, wide(backend, name, False))


def ends(backend: str, name: str) -> None:
    assert_nothing_overflows(backend, name, False)


def sizes(backend: str, name: str) -> None:
    assert_any_size_is_right(backend, name, False)


AVX512, VNNI, ANY = "cpu:as-avx512", "cpu:as-vnni", "cpu"
BROKEN: list[tuple[str, str, str, Break, Callable[[str, str], None]]] = [
    ("one factor for both halves", ANY, "q6_k", of_blocks(one_factor_for_both_halves), rows),
    ("centre forgotten", VNNI, "q3_k", of_blocks(centre_forgotten), rows),
    ("centre of fewer bits", ANY, "q5_0", centre_of_fewer_bits, rows),
    ("minima of the other half", ANY, "q2_k", of_blocks(minima_of_the_other_half), rows),
    ("table one on", ANY, "iq4_nl", table_one_on, rows),
    ("high bits of the next group", ANY, "q5_k", high_bits_of_the_next_group, rows),
    ("factors without signs", ANY, "iq4_xs", factors_without_signs, rows),
    ("closed too late", AVX512, "q5_1", closed_too_late, ends),
    ("bytes whole", AVX512, "q8_0", bytes_whole, ends),
    ("divided by too little", ANY, "q4_1", divided_by_too_little, sizes),
    ("pairs turned", ANY, "bf16", pairs_turned, rows),
    ("last slice left out", ANY, "q4_k", last_slice_left_out, rows),
    ("last slice of floats left out", ANY, "f32", last_slice_left_out, rows),
    ("last group left out", ANY, "q4_0", last_group_left_out, rows),
    ("last tile of a group left out", VNNI, "q4_0", not_stored(lambda tile, n, count: (tile % 2).eq(0)), rows),
    ("rows of the last tile left out", ANY, "q4_0", not_stored(lambda tile, n, count: n.lt(count // 4 * 4)), rows),
    ("sums of two panels in one place", VNNI, "q4_0", sums_of_two_panels_in_one_place, rows),
]


@pytest.mark.parametrize(("backend", "name", "make", "catches"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_product_is_caught(apart: Patch, backend: str, name: str, make: Break, catches: Callable[..., None]) -> None:
    make(apart)
    with pytest.raises(AssertionError, match=r"off by \S+ more|differ, the first|sums are wrong"):
        catches(backend, name)
