"""Block types in layout r16: what their codes and scales are, from which kernels are made.

A type's form is no larger than its blocks in files by more than a bit an element, but for grids, whose vectors are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tensorgraph.backends.cpu.codes import BLOCK, PLANES, Codes
from tensorgraph.backends.cpu.file_blocks import InFiles
from tensorgraph.backends.cpu.weights import FORMS, coded
from tensorgraph.ops.formats.bits import pack
from tensorgraph.ops.formats.blocks import FORMATS, U8, BlockFormat
from tensorgraph.ops.formats.gridded import iq1_m_scale
from tensorgraph.ops.formats.grids import grid_values
from tensorgraph.ops.formats.group_codes_cpu import READERS
from tensorgraph.ops.formats.tabled import FP4, IQ4


def _heads(form: BlockFormat, raw: U8) -> Sequence[U8]:
    """The bytes of blocks' scales, and of their minima if any: [n, bytes] each."""
    if form.scales[0].kind == "f16_nibbles":
        return [iq1_m_scale(raw)]
    return [raw[:, scale.at : scale.at + (1 if scale.kind == "e8m0" else 2)] for scale in form.scales]


def unit_parts(form: BlockFormat, codes: Codes) -> Callable[[U8], U8]:
    """Blocks as they are in files to what a row has of units."""
    assert form.parts is not None
    parts, dtype = form.parts, form.dtype

    def make(raw: U8) -> U8:
        found, n = parts(raw), len(raw) * dtype.block_size // codes.block
        of_block = [] if not codes.factors else [found.factors.view(np.uint8)]
        if codes.factors == "nibbles":
            of_block = [found.factors.view(np.uint8) | found.minima << np.uint8(4)]
        elif codes.factors and codes.has_min:
            of_block.append(found.minima)
        whole, to = found.codes.reshape(-1, BLOCK), 0
        for bits in PLANES[codes.bits]:
            of_block.append(pack(whole >> np.uint8(to), bits, 4 * bits))
            to += bits
        blocks = np.concatenate([each.reshape(n, codes.n_blocks, -1) for each in of_block], axis=2)
        listed = [np.repeat(head, dtype.block_size // codes.block, axis=0) for head in _heads(form, raw)]
        return np.concatenate([*listed, blocks.reshape(n, -1)], axis=1).reshape(len(raw), -1)

    return make


def _declare(name: str, codes: Codes) -> None:
    FORMS[name] = coded(codes, InFiles(FORMATS[name].dtype, unit_parts(FORMATS[name], codes), READERS.get(name)))


def _raised(values: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """A table without negative numbers, and what was added to it."""
    centre = -min(values)
    return tuple(int(v) + centre for v in values), centre


for _bits in (4, 5):
    _declare(f"q{_bits}_0", Codes(_bits, 1 << (_bits - 1)))
    _declare(f"q{_bits}_1", Codes(_bits, has_min=True))
_declare("q8_0", Codes(8, 128))
_declare("q1_0", Codes(1, 1, (0, 2)))
_declare("q2_0", Codes(2, 1))
_declare("tq1_0", Codes(2, 1))
_declare("tq2_0", Codes(2, 1))

_declare("q2_k", Codes(2, has_min=True, n_blocks=8, factors="nibbles", per_factor=16))
_declare("q3_k", Codes(3, 4, n_blocks=8, factors="i8", per_factor=16))
_declare("q4_k", Codes(4, has_min=True, n_blocks=8, factors="u8"))
_declare("q5_k", Codes(5, has_min=True, n_blocks=8, factors="u8"))
_declare("q6_k", Codes(6, 32, n_blocks=8, factors="i8", per_factor=16))

_table, _centre = _raised([int(v) for v in IQ4])
_declare("iq4_nl", Codes(4, _centre, _table))
_declare("iq4_xs", Codes(4, _centre, _table, n_blocks=8, factors="i8"))
_table, _centre = _raised([int(v) for v in FP4])
_declare("mxfp4", Codes(4, _centre, _table, head="e8m0"))

for _name, _unit, _group in (
    ("iq1_s", 0.125, 32),
    ("iq1_m", 0.125, 16),
    ("iq2_xxs", 0.125, 32),
    ("iq2_xs", 0.125, 16),
    ("iq2_s", 0.125, 16),
    ("iq3_xxs", 0.25, 32),
    ("iq3_s", 1.0, 32),
):
    _table, _centre = _raised([int(v) for v in grid_values(_name)])
    _codes = Codes(3 if len(_table) <= 8 else 4, _centre, _table, unit=_unit, n_blocks=8, factors="u8", per_factor=_group)
    _declare(_name, _codes)
