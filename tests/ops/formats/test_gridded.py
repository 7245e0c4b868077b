"""Formats whose codes are numbers of vectors of a grid, against the `gguf` package's own NumPy code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import quants as peer

from tensorgraph.ops.formats import block_format, decode
from tensorgraph.ops.formats.grids import grid
from tests.ops.formats.peer_values import assert_same_bits, peer_values

Array = np.ndarray[Any, Any]

GRIDDED = ["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m"]


def random_blocks(name: str, count: int) -> Array:
    return np.random.default_rng(len(name)).integers(0, 256, (count, block_format(name).dtype.block_bytes), np.uint8)


def scaled(name: str, raw: Array, scale: Array | float) -> Array:
    """Blocks with other f16 scales: the first two bytes, or four bits in each of iq1_m's last four words."""
    raw, bits = raw.copy(), np.broadcast_to(np.asarray(scale, np.float16), len(raw)).copy().view(np.uint16)
    if name == "iq1_m":
        raw[:, 49::2] = raw[:, 49::2] & 15 | (bits[:, None] >> np.arange(0, 16, 4) & 15) << 4
    else:
        raw[:, :2] = bits.view(np.uint8).reshape(-1, 2)
    return raw


@pytest.mark.parametrize("name", ["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s"])
def test_every_vector_of_a_grid(name: str) -> None:
    theirs = getattr(peer, name.upper())
    theirs.init_grid()
    values = theirs.grid.reshape(theirs.grid_shape) * (8 if name == "iq1_s" else 1)
    ours = grid("iq1" if name == "iq1_s" else name)
    assert ours.dtype == np.int8 and np.array_equal(ours, values)


@pytest.mark.parametrize("name", GRIDDED)
def test_every_f16_scale_decodes_as_the_peer_does(name: str) -> None:
    """Zeros of both signs, subnormal, infinite and undefined ones too."""
    every = np.arange(65536, dtype=np.uint16)
    apart = np.concatenate([every[::11], every[:1100:7], every[0x7BFF:0x7C03], every[0xFBFF:0xFC03], every[0x8000:0x8003]])
    raw = scaled(name, random_blocks(name, len(apart)), apart.view(np.float16))
    assert_same_bits(decode(raw, name), peer_values(raw, name))


@pytest.mark.parametrize("name", GRIDDED)
def test_every_value_of_every_byte_decodes_as_the_peer_does(name: str) -> None:
    """Beside bytes of zeros, of ones, and any."""
    for start in (np.zeros_like(random_blocks(name, 1)), ~np.zeros_like(random_blocks(name, 1)), random_blocks(name, 1)):
        size = start.shape[1]
        raw = np.tile(scaled(name, start, 1.0), (size, 256, 1))
        raw[np.arange(size), :, np.arange(size)] = np.arange(256)
        raw = raw.reshape(-1, size)
        assert_same_bits(decode(raw, name), peer_values(raw, name))
