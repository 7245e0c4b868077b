"""Formats whose codes are numbers of vectors of a grid: decoding against the `gguf` package's own NumPy code, encoding against a
search through its grids and what ggml's own quantiser loses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import quants as peer

from tensorgraph.ops.formats import block_format, decode, encode
from tensorgraph.ops.formats.bits import read_f16
from tensorgraph.ops.formats.grid_searches import CODINGS, PARTS, encode_blocks
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


def peer_grid(name: str) -> Array:
    """In units of which iq1's are eighths."""
    form = getattr(peer, name.upper())
    form.init_grid()
    vectors: Array = form.grid.reshape(form.grid_shape) * (8 if name.startswith("iq1") else 1)
    return vectors


@pytest.mark.parametrize("name", GRIDDED)
def test_every_vector_of_a_grid(name: str) -> None:
    ours = grid(CODINGS[name].grid)
    assert ours.dtype == np.int8 and np.array_equal(ours, peer_grid(name))


@pytest.mark.parametrize("name", GRIDDED)
def test_every_f16_scale_decodes_as_the_peer_does(name: str) -> None:
    """Zeros of both signs, subnormal, infinite and undefined ones too."""
    every = np.arange(65536, dtype=np.uint16)
    apart = np.concatenate([every[::11], every[:1100:7], every[0x7BFF:0x7C03], every[0xFBFF:0xFC03], every[0x8000:0x8003]])
    raw = scaled(name, random_blocks(name, len(apart)), apart.view(np.float16))
    assert_same_bits(decode(raw, name), peer_values(raw, name))


# Encoding.

GGML = {
    "iq2_xxs": (0.1180, 0.1509),
    "iq2_xs": (0.0891, 0.1094),
    "iq2_s": (0.0617, 0.0886),
    "iq3_xxs": (0.0329, 0.0385),
    "iq3_s": (0.0187, 0.0242),
    "iq1_s": (0.2342, 0.3029),
    "iq1_m": (0.2030, 0.2358),
}
"""NMSE of what ggml's `ggml_quantize_chunk` (llama-cpp-python 0.3.36, all importances one) wrote of the same numbers, cut to four
digits: normal ones, and those of a Laplace distribution."""


@pytest.mark.parametrize("name", GRIDDED)
def test_encoding_loses_less_than_ggml_does(name: str) -> None:
    rng = np.random.default_rng(7)
    normal, laplace = rng.standard_normal((64, 1024), np.float32), rng.laplace(size=(64, 1024)).astype(np.float32)
    for x, ggml in zip((normal, laplace), GGML[name], strict=True):
        error = decode(encode(x, name), name).astype(np.float64) - x
        assert np.sum(error**2) < ggml * np.sum(x.astype(np.float64) ** 2)


@pytest.mark.parametrize("name", GRIDDED)
def test_no_other_vector_is_nearer(name: str) -> None:
    """With the signs or shifts and the scales that were chosen; numbers are compared as rounded to 16ths of a unit."""
    x, coding = np.random.default_rng(9).standard_normal((8, 256), np.float32), CODINGS[name]
    head, scales, _ = encode_blocks(coding, x)
    unit = read_f16(head, 0).astype(np.float64) * coding.step * (2 * scales.astype(int) + 1)
    wanted, got = (each.reshape(*unit.shape, coding.group) / unit[:, :, None] for each in (x, decode(encode(x, name), name)))
    vectors = peer_grid(name)
    size = vectors.shape[1]
    together = (coding.shared or size) // size
    if not coding.shared:
        wanted, got = wanted * np.sign(got), np.abs(got)
    wanted, got = wanted.reshape(-1, size), got.reshape(-1, size)
    error = np.sum((wanted - got) ** 2, axis=1).reshape(-1, together).sum(axis=1)
    for shift in (1, -1) if coding.shared else (0,):
        others = vectors[:, None] + shift
        beyond = np.abs(others - got) / PARTS  # by how much it may seem nearer than it is
        least = np.sum((others - wanted) ** 2 + beyond, axis=2).min(axis=0)
        assert np.all(error <= least.reshape(-1, together).sum(axis=1) + 1e-3)


@pytest.mark.parametrize("name", [name for name in GRIDDED if CODINGS[name].even])
def test_where_signs_are_even_the_smallest_gives_way(name: str) -> None:
    x = np.random.default_rng(9).standard_normal((40, 256), np.float32)
    eights, values = x.reshape(-1, 8), decode(encode(x, name), name).reshape(-1, 8)
    assert not np.any(np.sum(values < 0, axis=1) % 2)
    changed = (values < 0) != (eights < 0)
    assert np.array_equal(changed.sum(axis=1), np.sum(eights < 0, axis=1) % 2)
    slack = np.abs(values).min(axis=1) / 32  # a unit is less, and numbers count as rounded to 16ths of it
    assert np.all(np.abs(eights[changed]) <= (np.abs(eights).min(axis=1) + slack)[changed.any(axis=1)])


@pytest.mark.parametrize("name", ["iq2_s", "iq3_s"])
def test_signs_of_any_number_are_kept(name: str) -> None:
    patterns = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), -1, 1).astype(np.float32)
    x = patterns.reshape(-1, 256) * 3
    values = decode(encode(x, name), name)
    assert np.array_equal(np.signbit(values), x < 0)
    if name == "iq2_s":
        np.testing.assert_array_equal(np.abs(values), np.abs(values[0, 0]))


@pytest.mark.parametrize("name", GRIDDED)
def test_other_units_change_the_scale_alone(name: str) -> None:
    x = np.random.default_rng(3).standard_normal((20, 256), np.float32)
    raw = encode(x, name)
    heads = read_f16(encode_blocks(CODINGS[name], x)[0], 0)
    assert_same_bits(decode(scaled(name, raw, heads[:, 0]), name), decode(raw, name))
    assert np.array_equal(encode(x * 64, name), scaled(name, raw, heads[:, 0] * 64))
