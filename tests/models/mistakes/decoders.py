"""Mistakes in the other decoders of Llama's family."""

from __future__ import annotations

from tests.models.planting import Mistake

_DECODER, _QWEN3, _MOE, _GEMMA, _GPT_OSS = (f"models/{name}.py" for name in ("decoder", "qwen3", "qwen3moe", "gemma3", "gpt_oss"))
_CLAMPED = "import gather, soft_max, swiglu_clamp\nswiglu_oai = lambda a, b, alpha, limit: swiglu_clamp(a, b, limit=limit)\n"

_WEIGHTS = "tests.models.text.test_checkpoint:test_weights_are_those_of_the_gguf_file:"

DECODERS = (
    Mistake("no biases", "models/builder.py", "return y if bias is None else y + bias", "return y", "qwen2"),
    Mistake(
        "Qwen2's pairs are neighbours",
        "models/qwen2.py",
        "base=c.rope_theta)",
        'base=c.rope_theta, layout="interleaved")',
        "qwen2",
    ),
    Mistake("norms as they are published", "models/names.py", " + np.float32(1.0)", "", f"{_WEIGHTS}gemma3"),
    Mistake("pairs as they are published", "models/names.py", ".swapaxes(1, 2).reshape(halves.shape)", "", f"{_WEIGHTS}llama"),
    Mistake(
        "keys of latents as they are published",
        "models/names.py",
        "[:, :width].swapaxes(1, 2)",
        "[:, :width]",
        f"{_WEIGHTS}deepseek_v3",
    ),
    Mistake("Qwen's pairs are neighbours", _DECODER, 'layout: str = "half_split"', 'layout: str = "interleaved"', "qwen3"),
    Mistake("no norm of queries and keys", _QWEN3, "qk_norm=True", "qk_norm=False", "qwen3"),
    Mistake(
        "the norm of keys is that of queries",
        _DECODER,
        'norm(g, "attn_k_norm", k, c.rms_norm_eps)',
        'norm(g, "attn_q_norm", k, c.rms_norm_eps)',
        "qwen3",
    ),
    Mistake("keys are not turned", _QWEN3, "for h in (q, k))", "for h in (q, q))", "qwen3"),
    Mistake("Qwen's base is Llama's", _QWEN3, "base=c.rope_theta", "base=1e4", "qwen3"),
    Mistake("a sigmoid router", _MOE, "import soft_max\n", "import sigmoid as soft_max\n", "qwen3moe"),
    Mistake("weights of experts do not sum to one", _MOE, "normalise=c.norm_topk_prob", "normalise=False", "qwen3moe"),
    Mistake("one expert less", _MOE, "route(scores, None, c.num_experts_per_tok)", "route(scores, None, 2)", "qwen3moe"),
    Mistake("no norm before the experts", _DECODER, "else mix(b, y)", "else mix(b, x)", "qwen3moe"),
    Mistake("layers see all first", _DECODER, '== "sliding_attention"', '!= "sliding_attention"', "gpt_oss"),
    Mistake("gpt-oss has no sinks", _GPT_OSS, "window=window, sinks=sinks)", "window=window)", "gpt_oss"),
    Mistake("a ramp of whole pairs", _GPT_OSS, "truncate=False", "truncate=True", "gpt_oss"),
    Mistake("no magnitude", _DECODER, "layout=layout, magnitude=magnitude)", "layout=layout)", "gpt_oss"),
    Mistake("weighed among all experts", _GPT_OSS, "soft_max(gather(logits, ids))", "gather(soft_max(logits), ids)", "gpt_oss"),
    Mistake("experts without biases", "models/experts.py", "y if bias is None else add_id(y, bias, ids)", "y", "gpt_oss"),
    Mistake("SwiGLU without the added one", _GPT_OSS, "import gather, soft_max, swiglu_oai\n", _CLAMPED, "gpt_oss"),
    Mistake("gates are the odd rows", _GPT_OSS, 'slice(0, None, 2)), "up"', 'slice(1, None, 2)), "up"', "gpt_oss"),
    Mistake("embeddings as they are stored", _GEMMA, ", math.sqrt(c.hidden_size))", ")", "gemma3"),
    Mistake("the first of six layers sees all", _GEMMA, "(layer + 1) %", "layer %", "gemma3"),
    Mistake("all layers see all", _GEMMA, "c, scale=c.scale, window=window)", "c, scale=c.scale)", "gemma3"),
    Mistake("one base for all of Gemma's layers", _GEMMA, "(c.rope_local_base_freq, Ro", "(c.rope_theta, Ro", "gemma3"),
    Mistake("no norm after attention", _GEMMA, 'x + norm(b, "post_attention_norm", y, c.rms_norm_eps)', "x + y", "gemma3"),
    Mistake(
        "the norm after the feed-forward normalises the sum",
        _GEMMA,
        'x + norm(b, "post_ffw_norm", y, c.rms_norm_eps)',
        'norm(b, "post_ffw_norm", x + y, c.rms_norm_eps)',
        "gemma3",
    ),
    Mistake("SiLU instead of GELU", _GEMMA, ", unit=geglu)", ")", "gemma3"),
    Mistake("GELU by erf", _GEMMA, "import geglu\n", "import geglu_erf as geglu\n", "gemma3"),
    Mistake("queries are not scaled as published", _GEMMA, "self.query_pre_attn_scalar or size", "size", "scale_of_gemma"),
)
