"""Random blocks: what they decode to, by the `gguf` package where it can."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as peer

from tensorgraph.errors import DTypeError
from tensorgraph.ops.formats import FORMATS, block_format, decode, random_blocks
from tests.ops.formats.peer_values import WITHOUT_PEER

ELEMENTS = 1 << 19


def drawn(name: str, deviation: float, seed: int = 0) -> np.ndarray:
    n = ELEMENTS // block_format(name).dtype.block_size
    return random_blocks(name, n, deviation, np.random.Generator(np.random.SFC64(seed)))


@pytest.mark.parametrize("deviation", [7168**-0.5, 2048**-0.5, 1.0])
@pytest.mark.parametrize("name", FORMATS)
def test_values_have_the_wanted_deviation_and_no_mean(name: str, deviation: float) -> None:
    raw = drawn(name, deviation)
    values = decode(raw, name) if name in WITHOUT_PEER else peer.dequantize(raw, GGMLQuantizationType[name.upper()])
    assert values.std(dtype=np.float64) == pytest.approx(deviation, rel=0.04)
    assert abs(values.mean(dtype=np.float64)) < 0.02 * deviation and np.abs(values).max() < 40 * deviation


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_differ_in_scale_and_by_seed(name: str) -> None:
    raw = drawn(name, 0.1)
    sizes = np.abs(decode(raw, name)).max(axis=1)
    assert len(np.unique(raw, axis=0)) == len(raw) and sizes.max() > 1.2 * sizes.min() > 0
    assert np.array_equal(raw, drawn(name, 0.1)) and not np.array_equal(raw, drawn(name, 0.1, seed=1))


def test_the_empty_and_the_unknown() -> None:
    rng = np.random.default_rng(0)
    assert random_blocks("q4_k", 0, 1.0, rng).shape == (0, 144)
    with pytest.raises(DTypeError, match="wanted a block type"):
        random_blocks("f32", 3, 1.0, rng)
