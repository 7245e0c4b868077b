"""DeepSeek V4's published checkpoints: of which tensors its weights are made; routed experts in BF16, or as MXFP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tensorgraph.dtypes import as_dtype, i32
from tensorgraph.models.names import Made, mxfp4_blocks, mxfp4_width, same, stacked

TOP = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
    **{f"output_hc_{part}.weight": f"hc_head_{part}" for part in ("base", "fn", "scale")},
}
LAYER = {
    **{f"{name}.weight": f"{name}.weight" for name in ("attn_norm", "ffn_norm")},
    "attn_sinks.weight": "attn.attn_sink",
    "attn_kv.weight": "attn.wkv.weight",
    "attn_kv_a_norm.weight": "attn.kv_norm.weight",
    "attn_q_a.weight": "attn.wq_a.weight",
    "attn_q_a_norm.weight": "attn.q_norm.weight",
    "attn_q_b.weight": "attn.wq_b.weight",
    "attn_output_a.weight": "attn.wo_a.weight",
    "attn_output_b.weight": "attn.wo_b.weight",
    "indexer.proj.weight": "attn.indexer.weights_proj.weight",
    "indexer.attn_q_b.weight": "attn.indexer.wq_b.weight",
    "ffn_gate_inp.weight": "ffn.gate.weight",
    "exp_probs_b.bias": "ffn.gate.bias",
    "ffn_gate_shexp.weight": "ffn.shared_experts.w1.weight",
    "ffn_up_shexp.weight": "ffn.shared_experts.w3.weight",
    "ffn_down_shexp.weight": "ffn.shared_experts.w2.weight",
    **{f"hc_{at}_{part}.weight": f"hc_{at}_{part}" for at in ("attn", "ffn") for part in ("base", "fn", "scale")},
}
COMPRESSOR = {"ape": "ape", "norm": "norm.weight", "gate": "wgate.weight", "kv": "wkv.weight"}
LAYER |= {f"attn_compressor_{ours}.weight": f"attn.compressor.{theirs}" for ours, theirs in COMPRESSOR.items()}
LAYER |= {f"indexer_compressor_{ours}.weight": f"attn.indexer.compressor.{theirs}" for ours, theirs in COMPRESSOR.items()}
EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}


def names(c: Any) -> dict[str, Made]:
    found = {ours: same(theirs) for ours, theirs in TOP.items()}
    for i in range(c.num_hidden_layers):
        found |= {f"blk.{i}.{ours}": same(f"layers.{i}.{theirs}") for ours, theirs in LAYER.items()}
        found[f"blk.{i}.ffn_gate_tid2eid.weight"] = replace(same(f"layers.{i}.ffn.gate.tid2eid"), dtype=i32)
        for ours, theirs in EXPERTS.items():
            each = [f"layers.{i}.ffn.experts.{e}.{theirs}" for e in range(c.n_routed_experts)]
            plain = stacked([f"{name}.weight" for name in each])
            found[f"blk.{i}.ffn_{ours}_exps.weight"] = replace(mxfp4(each), otherwise=plain)
    return found


def mxfp4(experts: Sequence[str]) -> Made:
    """Matrices of 4-bit numbers with a scale for 32 of them, as blocks. Shapes: E x [M, N / 2], E x [M, N / 32] -> [E, M, N]."""
    n = len(experts)
    return Made(
        (*(f"{name}.weight" for name in experts), *(f"{name}.scale" for name in experts)),
        lambda given: np.stack([mxfp4_blocks(codes, scales) for codes, scales in zip(given[:n], given[n:], strict=True)]),
        lambda shapes: (n, shapes[0][0], mxfp4_width(shapes[0], shapes[n])),
        as_dtype("mxfp4"),
        kinds=2,
    )
