"""Published checkpoints: of which of their tensors, and how, the weights are made that model files build with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.dtypes import DType, f32

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """A weight made of tensors of a checkpoint.

    Attributes:
        of: the tensors' names.
        make: the weight, from their values; vectors are given in f32.
        shape: its shape, from theirs; IndexError or ValueError where they do not fit.
        dtype: its type where that is not the first tensor's.
        kinds: into how many runs of equal tensors `of` falls.
        otherwise: how it is made where a tensor is missing.
    """

    of: tuple[str, ...]
    make: Callable[[Sequence[Array]], Array]
    shape: Callable[[Sequence[Shape]], Shape]
    dtype: DType | None = None
    kinds: int = 1
    otherwise: Made | None = None


LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What most published checkpoints call a layer's weights and biases."""


def made_of_layers(n_layers: int, layer: Mapping[str, str] = LAYER, *, tied: bool = False) -> dict[str, Made]:
    """All weights of a decoder: `layer` by the names here; without an output of its own where that is `tied`."""
    found = {"token_embd.weight": same("model.embed_tokens.weight"), "output_norm.weight": same("model.norm.weight")}
    if not tied:
        found["output.weight"] = same("lm_head.weight")
    for i in range(n_layers):
        for ours, theirs in layer.items():
            for kind in ("weight", "bias"):
                found[f"blk.{i}.{ours}.{kind}"] = same(f"model.layers.{i}.{theirs}.{kind}")
    return found


def made_of_experts(layers: Iterable[int], n_experts: int) -> dict[str, Made]:
    """The weights of all experts of some layers, of a matrix for each."""
    return {
        f"blk.{i}.ffn_{which}_exps.weight": stacked(
            [f"model.layers.{i}.mlp.experts.{e}.{which}_proj.weight" for e in range(n_experts)]
        )
        for i in layers
        for which in ("gate", "up", "down")
    }


def same(name: str) -> Made:
    """A tensor as it is."""
    return Made((name,), lambda given: given[0], lambda shapes: shapes[0])


def plus_one(name: str) -> Made:
    """A norm's weight, stored as its distance from 1; in f32."""
    return Made((name,), lambda given: given[0].astype(np.float32) + np.float32(1.0), lambda shapes: shapes[0], f32)


def neighbours(name: str, n_head: int) -> Made:
    """Rows of queries or keys, by heads, whose rotary pairs are the two halves of a head: as neighbours."""

    def make(given: Sequence[Array]) -> Array:
        (halves,) = given
        rest = halves.shape[1:]
        return halves.reshape(n_head, 2, -1, *rest).swapaxes(1, 2).reshape(halves.shape)

    return Made((name,), make, lambda shapes: shapes[0])


def keys_of_latents(name: str, n_head: int, width: int) -> Made:
    """From rows [key | value] for each head, the keys, whose width is given. Shapes: [H * (K + V), R] -> [H, R, K]."""
    return Made(
        (name,),
        lambda given: given[0].reshape(n_head, -1, given[0].shape[1])[:, :width].swapaxes(1, 2),
        lambda shapes: (n_head, shapes[0][1], min(width, _each(n_head, shapes[0]))),
    )


def values_of_latents(name: str, n_head: int, width: int) -> Made:
    """From the same rows, the values; `width` is the keys'. Shapes: [H * (K + V), R] -> [H, V, R]."""
    return Made(
        (name,),
        lambda given: given[0].reshape(n_head, -1, given[0].shape[1])[:, width:],
        lambda shapes: (n_head, _each(n_head, shapes[0]) - width, shapes[0][1]),
    )


def _each(n_head: int, shape: Shape) -> int:
    """Rows of each head of a matrix."""
    rows, _ = shape
    if rows % n_head:
        raise ValueError
    return rows // n_head


def stacked(names: Sequence[str]) -> Made:
    """One matrix for each expert: all of them. Shapes: E x [M, N] -> [E, M, N]."""
    return Made(tuple(names), np.stack, lambda shapes: (len(shapes), *shapes[0]))


def mxfp4_width(codes: Shape, scales: Shape) -> int:
    """Elements of a row, from the shapes of its codes [..., N / 2] and scales [..., N / 32]."""
    if codes != (*scales[:-1], 16 * scales[-1]):
        raise ValueError
    return 32 * scales[-1]


def mxfp4_blocks(codes: Array, scales: Array) -> Array:
    """Rows of 4-bit numbers with a scale for 32 of them, as blocks.

    Published: byte j of a row holds elements 2j, in its low half, and 2j + 1. A block: its scale, then 16 bytes, of which
    byte j holds elements j, in its low half, and j + 16.

    Shapes: codes [..., M, N / 2] or [..., M, N / 32, 16], scales [..., M, N / 32] -> uint8 [..., M, N / 32 * 17].
    """
    pairs = codes.view(np.uint8).reshape(*scales.shape, 16)
    elements = np.stack([pairs & 15, pairs >> 4], -1).reshape(*scales.shape, 32)
    packed = elements[..., :16] | elements[..., 16:] << 4
    return np.concatenate([scales.view(np.uint8)[..., None], packed], -1).reshape(*scales.shape[:-1], -1)
