"""What the `gguf` package's own NumPy code decodes, and how results are compared with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf import quants as peer

Array = np.ndarray[Any, Any]
WITHOUT_PEER = ("q1_0", "q2_0")
"""Types that the package has not."""


def peer_type(name: str) -> GGMLQuantizationType:
    return next(each for each in GGMLQuantizationType if each.name.lower() == name)


def peer_values(raw: Array, name: str) -> Array:
    with np.errstate(all="ignore"):
        values: Array = peer.dequantize(raw, peer_type(name))
    return values


def assert_same_bits(got: Array, want: Array) -> None:
    """Equal to the last bit, the sign of zero included; every NaN equals every other."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    differs = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
    assert not differs.any()
