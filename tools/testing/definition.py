"""A result that is farther off than most, judged by the op's own conditioning, as conformance judges it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.device import Device
from tensorgraph.dims import Bindings, evaluate_shape
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import STRUCTURAL, Node
from tensorgraph.tools.conformance.criterion import DRAWS, MULTIPLE, STEP, judge
from tensorgraph.tools.conformance.evaluate import Meaning
from tensorgraph.tools.testing.difference import INT8_STEPS, Array, difference, is_float, peak_of, steps_of

MOST_FLOPS = 1e8
"""Of a node; the criterion computes it a hundred times."""
BLOCK = 32
"""Numbers are rounded to whole ones, times one number for each 32 of them."""
NOISE = 4.0
NOISE_DRAWS = 4


def conforms(node: Node, slots: Mapping[str, Array], got: Array, dims: Bindings, device: Device, *, exact: bool) -> bool:
    """Whether a value is right by `tools.conformance.criterion`, for the inputs that it was computed from.

    A whole number is right, too, where a rounding of the inputs changes the one that is wanted: a selection by scores that are
    computed. Where products are not exact, those that round (`steps_of`) are right if they are off by no more than four times
    the squared error that this costs, and their worst element by four times its worst. Of nodes that are too large for the
    criterion, none is excused.
    """
    if node.op in STRUCTURAL:
        return False
    op = registry.ops.get(node.op)
    flops = op.cost(node, dims).flops
    if op.reference_fn is None and op.expansion is None:
        return False
    attrs: dict[str, Any] = dict(node.attrs)
    if "shape" in attrs:
        attrs["shape"] = evaluate_shape(attrs["shape"], dims)
    dtypes = {slot: as_dtype(x.dtype) for slot, x in slots.items()}
    meaning = Meaning(op, attrs, dtypes, rounds=op.expansion is not None and not device.supports(node))
    wanted = meaning(slots)
    if got.shape != wanted.shape:
        return False
    steps = 0 if exact or not is_float(got) else steps_of(node)
    if steps:
        quantised = {slot for slot, source in zip(node.slots, node.inputs, strict=True) if source.base.op == "constant"}
        kept = quantised if steps == INT8_STEPS else set()
        rng = np.random.default_rng(0)
        draws = [{k: x if k in kept else dithered(x, rng, steps) for k, x in slots.items()} for _ in range(NOISE_DRAWS)]
        found, moved = difference(got, wanted), [difference(meaning(draw), wanted) for draw in draws]
        most = max(peak_of(steps), NOISE * max(each.peak for each in moved))
        return found.nmse <= NOISE * max(each.nmse for each in moved) and found.peak <= most
    if flops > MOST_FLOPS:
        return False
    if is_float(got):
        return judge(got, wanted, got.dtype, op.tolerance, meaning, slots).ok
    unstable = np.zeros(wanted.shape, bool)
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        unstable |= meaning({slot: perturbed(x, MULTIPLE * STEP, rng) for slot, x in slots.items()}) != wanted
    return not np.any((got != wanted) & ~unstable)


def dithered(x: Array, rng: np.random.Generator, steps: int = INT8_STEPS) -> Array:
    """As if floats were rounded to so many steps up to the largest of their block of 32 along the last axis: moved by up to half
    of one."""
    if not is_float(x) or not x.ndim:
        return x
    if steps > INT8_STEPS and x.dtype != np.float64:
        x = x.astype(np.float32)  # f16 and bf16 have no such small steps
    n = x.shape[-1]
    blocks = np.zeros((*x.shape[:-1], -(-n // BLOCK) * BLOCK))
    blocks[..., :n] = x
    blocks = blocks.reshape(*x.shape[:-1], -1, BLOCK)
    blocks += np.abs(blocks).max(-1, keepdims=True) / steps * rng.uniform(-0.5, 0.5, blocks.shape)
    return blocks.reshape(*x.shape[:-1], -1)[..., :n].astype(x.dtype)


def perturbed(x: Array, step: float, rng: np.random.Generator) -> Array:
    """Every float multiplied by 1 + step or 1 - step."""
    return (x * (1 + step * rng.choice((-1.0, 1.0), x.shape))).astype(x.dtype) if is_float(x) else x
