"""Which models are measured: shapes and types as they are published, weights drawn."""

from __future__ import annotations

from dataclasses import dataclass

N_LLAMA = 32
_MORE_BITS = [i for i in range(N_LLAMA) if i < N_LLAMA // 8 or i >= 7 * N_LLAMA // 8 or (i - N_LLAMA // 8) % 3 == 2]
Q4_K_M = ("q4_k", "output.weight=q6_k", *(f"blk.{i}.{name}.weight=q6_k" for i in _MORE_BITS for name in ("attn_v", "ffn_down")))
"""As llama.cpp mixes types: more bits for values and for the way down in half of the layers."""
V4_FLASH = ("q8_0", "token_embd.weight=f16", "*ffn_gate_exps*=iq2_xxs", "*ffn_up_exps*=iq2_xxs", "*ffn_down_exps*=q2_k")
"""Experts in 2.06 bits, and in 2.6 on the way down: 80 GiB as a file."""


@dataclass(frozen=True)
class ModelCase:
    """A model, and how long its sequences are.

    Attributes:
        preset: a configuration that comes with the package.
        types, layers, changes: as `synth` takes them.
        depths: tokens that are there before decoding.
        prompt: tokens that are evaluated at once.
        target: tokens a second, by depth, of estimates for some card.
        estimate_s: what it takes, about, on a card.
    """

    name: str
    preset: str
    types: tuple[str, ...]
    depths: tuple[int, ...]
    prompt: int = 512
    layers: str | None = None
    changes: tuple[str, ...] = ()
    target: str = ""
    estimate_s: float = 30.0
    small: tuple[str, ...] = ()
    """Further changes where a processor stands for a card."""


SMOLLM2 = (
    *("hidden_size=576", "num_hidden_layers=30", "num_attention_heads=9", "num_key_value_heads=3", "intermediate_size=1536"),
    *("vocab_size=49152", "tie_word_embeddings=true", "rope_theta=100000", "max_position_embeddings=8192"),
)
SMALL = ("num_hidden_layers=2", "vocab_size=64", "hidden_size=64", "num_attention_heads=2", "num_key_value_heads=1")

CASES = (
    ModelCase(
        "SmolLM2-135M Q4_1", "llama-3.1-8b", ("q4_1",), (0, 1024), changes=SMOLLM2,
        target="5,000 at 0 (H100)", estimate_s=20, small=(*SMALL, "intermediate_size=96"),
    ),
    ModelCase("Llama-3.1-8B Q4_K_M", "llama-3.1-8b", Q4_K_M, (0, 4096, 32768), target="450-500 at 0 (H100)", estimate_s=60),
    ModelCase(
        "V3.2, 1 layer of experts", "deepseek-v3.2", ("q8_0", "*exps*=q4_k"), (4096, 32768, 131000), layers="3,",
        changes=("vocab_size=4096",), target="attention at most 30 us at 131,000", estimate_s=60,
    ),
    ModelCase(
        "V3.2, 4 layers of experts", "deepseek-v3.2", ("q8_0", "*exps*=q4_k"), (4096, 131000), layers="3-6",
        changes=("vocab_size=4096",), estimate_s=90,
    ),
    ModelCase("V4-Flash, layers 2-5", "deepseek-v4-flash", V4_FLASH, (0, 4096, 131072), layers="2-5", estimate_s=60),
    ModelCase(
        "V4-Flash", "deepseek-v4-flash", V4_FLASH, (0, 32768), target="250-300 at 0 (H200)", estimate_s=120,
    ),
)  # fmt: skip
