"""Every type that can be written, and how the CPU rounds a block to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.operands import Row
from tensorgraph.ops.formats import rounding_cpu as one
from tensorgraph.ops.formats import searches_cpu as many
from tensorgraph.ops.formats.blocks import block_format
from tensorgraph.ops.formats.grid_searches import CODINGS
from tensorgraph.ops.formats.grid_searches_cpu import round_to_grid

ROUNDINGS: dict[str, Callable[[one.Block], None]] = {
    "q8_0": partial(one.round_whole, centre=127.0),
    **{f"q{bits}_0": partial(one.round_centred, bits=bits) for bits in (4, 5)},
    **{f"q{bits}_1": partial(one.round_from_minimum, bits=bits) for bits in (4, 5)},
    **{name: partial(one.round_whole, centre=1.0) for name in ("q2_0", "tq1_0", "tq2_0")},
    "q1_0": one.round_signs,
    "mxfp4": one.round_mxfp4,
    "nvfp4": one.round_nvfp4,
    "iq4_nl": one.round_iq4_nl,
    "iq4_xs": many.round_iq4_xs,
    "q2_k": partial(many.round_affine, size=16, bits=2, scale_bits=4, first=-0.5, steps=15),
    "q4_k": partial(many.round_affine, size=32, bits=4, scale_bits=6, first=-1.0, steps=20),
    "q5_k": partial(many.round_affine, size=32, bits=5, scale_bits=6, first=-0.5, steps=15),
    "q3_k": partial(many.round_centred, bits=3, scale_bits=6, search=many.descended_scale),
    "q6_k": partial(many.round_centred, bits=6, scale_bits=8, search=many.centred_scale),
    **{name: partial(round_to_grid, name=name) for name in CODINGS},
}


def round_block(k: Kernel, name: str, x: Row, y: Row, first: Value) -> None:
    """Elements of a row from `first` on, as many as a block of the type has, to the same of another."""
    ROUNDINGS[name](one.Block(k, x, y, first, block_format(name).dtype.block_size))
