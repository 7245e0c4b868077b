"""A GGUF file of the tiny encoder, with llama.cpp's names and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from tests.models import tiny

N_WORDS = 59
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581w{i}" for i in range(N_WORDS))]


def write(path: Path, **more: Any) -> Path:
    """`more`: other metadata by key; None leaves an entry out."""
    config, file = tiny.model("bert").config, tiny.model("bert").file
    assert file is not None
    out = gguf.GGUFWriter(path, "bert")
    given: dict[str, Any] = {
        "bert.block_count": config.num_hidden_layers,
        "bert.context_length": config.max_position_embeddings,
        "bert.embedding_length": config.hidden_size,
        "bert.feed_forward_length": config.intermediate_size,
        "bert.attention.head_count": config.num_attention_heads,
        "bert.attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 5 + [1] * N_WORDS,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        **more,
    }
    for key, value in given.items():
        if isinstance(value, list):
            out.add_array(key, value)
        elif isinstance(value, bool):
            out.add_bool(key, value)
        elif isinstance(value, float):
            out.add_float32(key, value)
        elif isinstance(value, str):
            out.add_string(key, value)
        elif value is not None:
            out.add_uint32(key, value)
    for name in file.tensors:
        out.add_tensor(name, file.data(name).astype("float32"))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
