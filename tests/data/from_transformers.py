"""Makes a tiny model with random weights and its logits by transformers: `python from_transformers.py NAME FOLDER`.

Runs in an environment of its own that has torch and transformers; the results are packed by `make.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

N_TOKENS, N_PREFILL, N_GREEDY = 96, 64, 16
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
GPT_OSS = {
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "sliding_window": 20,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "rope_parameters": YARN | {"original_max_position_embeddings": 64},
}
MODELS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, COMMON),
    "smollm3": (
        transformers.SmolLM3Config,
        transformers.SmolLM3ForCausalLM,
        COMMON | {"num_hidden_layers": 5, "tie_word_embeddings": True, "pad_token_id": 0},
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        {k: v for k, v in (COMMON | GPT_OSS).items() if k != "rope_theta"},
    ),
}

BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
    "pad_token_id": 0,
}
BERT_LENGTHS = (32, 11)
"""All positions, and some."""


def weighted(model: Any, folder: Path) -> None:
    """Gives a model random weights that are exact in BF16, norms and biases away from what they begin with, and saves it."""
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 2.0 / parameter.shape[-1] ** 0.5
            centre = 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0
            parameter.copy_((centre + spread * torch.randn_like(parameter)).to(torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(folder)


def decoder(name: str, folder: Path) -> None:
    """Logits, hidden states and greedy tokens in float64."""
    config_class, model_class, given = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    weighted(model_class(config_class(**given)), folder)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = model_class.from_pretrained(folder, dtype=torch.float64, **plain).eval()  # above, rotary angles are BF16's
    ids = torch.randint(3, given["vocab_size"], (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
    states: list[torch.Tensor] = []
    watched = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    hooks = [m.register_forward_hook(lambda _, __, y: states.append(y[0] if isinstance(y, tuple) else y)) for m in watched]
    with torch.no_grad():
        out = model(ids)
        for hook in hooks:
            hook.remove()
        greedy, greedy_logits, so_far = [], [], ids
        for _ in range(N_GREEDY):
            last = model(so_far).logits[0, -1]
            greedy_logits.append(last.numpy())
            greedy.append(int(last.argmax()))
            so_far = torch.cat([so_far, torch.tensor([[greedy[-1]]])], 1)
    positions = np.arange(0, N_TOKENS, 5)
    hidden = [state[0].numpy()[positions] for state in states]
    logits = out.logits[0].numpy().astype(np.float32)
    arrays = {
        "input_ids": ids[0].numpy(),
        "n_prefill": np.array(N_PREFILL),
        "logits": logits,
        "decode_logits": logits[N_PREFILL:],
        "greedy_tokens": np.array(greedy),
        "greedy_logits": np.stack(greedy_logits).astype(np.float32),
        "hidden_pos": positions,
        "hidden_embed": hidden[0].astype(np.float32),
        **{f"hidden_layer{i}": hidden[i + 1].astype(np.float32) for i in range(len(hidden) - 2)},
        "hidden_norm": hidden[-1].astype(np.float32),
    }
    np.savez(folder / "reference.npz", **arrays)


def encoder(folder: Path) -> None:
    """Hidden states of two sequences in float64: `hidden/i` [layers + 1, n, D], the first of the embeddings."""
    torch.manual_seed(sum(map(ord, "bert")))
    weighted(transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False), folder)
    model = transformers.BertModel.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", add_pooling_layer=False
    ).eval()
    arrays: dict[str, Any] = {}
    for i, n in enumerate(BERT_LENGTHS):
        ids = torch.randint(1, BERT["vocab_size"], (1, n), generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        arrays[f"ids/{i}"] = ids[0].numpy().astype(np.int32)
        arrays[f"hidden/{i}"] = np.stack([state[0].numpy() for state in states]).astype(np.float32)
    np.savez(folder / "reference.npz", **arrays)


def main(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name == "bert":
        encoder(folder)
    else:
        decoder(name, folder)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (folder / "report.json").write_text(json.dumps({"name": name, **versions}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
