"""Types that are recoded when they are packed, without loss: each block of 32 gets a scale and a minimum in f32, and codes of 4
or 8 bits.

A type's own decoder tells them: of blocks whose scales say one and whose minima say nothing it gives the codes, of blocks
whose codes are all one the scales, of blocks whose codes are all nothing the minima.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.ops.formats.affine_cpu import declare_affine
from tensorgraph.ops.formats.bits import pack
from tensorgraph.ops.formats.blocks import F32, U8, block_format

BLOCK = 32
Fields = Mapping[int, bytes]
"""What stands in a block instead, from which byte on."""
_ONE, _NONE = np.float16(1).tobytes(), bytes(2)


def _declare(name: str, codes: Fields, scale: Fields, minimum: Fields | None = None, bits: int = 8) -> None:
    form = block_format(name)

    def probe(blocks: U8, fields: Fields) -> F32:
        """What blocks with other fields decode to, by blocks of 32."""
        changed = blocks.copy()
        for at, content in fields.items():
            changed[:, at : at + len(content)] = np.frombuffer(content, np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):
            return form.decode(changed).reshape(-1, BLOCK)

    def recode(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        blocks = np.ascontiguousarray(rows).reshape(-1, form.dtype.block_bytes)
        whole = probe(blocks, codes).astype(np.int8).view(np.uint8)
        heads: list[NDArray[Any]] = [probe(blocks, fields)[:, :1] for fields in (scale, minimum) if fields is not None]
        parts = [np.ascontiguousarray(h).view(np.uint8) for h in heads] + [pack(whole, 4, 16) if bits == 4 else whole]
        return np.concatenate(parts, axis=1).reshape(len(rows), -1)

    declare_affine(name, bits, 0 if minimum else 128, has_min=minimum is not None, scale_bytes=4, recode=recode)


_declare("q5_0", {0: _ONE}, {2: b"\xff" * 4 + b"\x11" * 16})
_declare("q5_1", {0: _ONE + _NONE}, {2: _NONE + bytes(4) + b"\x11" * 16}, {0: _NONE, 4: bytes(20)})
_declare("q1_0", {0: _ONE}, {2: b"\xff" * 16})
_declare("q2_0", {0: _ONE}, {2: b"\xaa" * 16})
_declare("tq1_0", {52: _ONE}, {0: b"\xff" * 52})
_declare("tq2_0", {64: _ONE}, {0: b"\xaa" * 64})
_declare("mxfp4", {0: b"\x80"}, {1: b"\x11" * 16})
_declare("iq4_nl", {0: _ONE}, {2: b"\x88" * 16})
_declare("iq4_xs", {0: _ONE + b"\xaa" * 2 + b"\x11" * 4}, {8: b"\x88" * 128})
_ONE_EACH = {0: _ONE + _NONE + b"\1" * 4 + bytes(4) + b"\1" * 4}  # of the eight scales; none of the minima
_declare("q4_k", _ONE_EACH, {2: _NONE, 16: b"\x11" * 128}, {0: _NONE, 16: bytes(128)}, bits=4)
_declare("q5_k", _ONE_EACH, {2: _NONE, 16: bytes(32) + b"\x11" * 128}, {0: _NONE, 16: bytes(160)})
