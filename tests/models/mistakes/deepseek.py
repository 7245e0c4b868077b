"""Mistakes in V2 and V3 (routers, latent attention), V3.2 and GLM (the indexer)."""

from __future__ import annotations

from tests.models.planting import Mistake

_V2, _V32, _EXPERTS, _GLM = "models/deepseek_v2.py", "models/deepseek_v32.py", "models/experts.py", "models/glm_dsa.py"

ROUTERS_AND_MLA = (
    # The routers.
    Mistake("V3's bias leaks into the weights", _V2, "w = weigh(scores, ids", "w = weigh(scores + bias, ids", "v3"),
    Mistake("the bias selects nothing", _EXPERTS, "scores if bias is None else scores + bias", "scores", "v3"),
    Mistake("groups are skipped", _EXPERTS, "if n_group > 1:", "if n_group > 99:", "v3"),
    Mistake("groups are closed with 0", _EXPERTS, "value=-math.inf", "value=0.0", "group_router"),
    Mistake("V3's groups score by one expert", _V2, "group_top = 2 if", "group_top = 1 if", "group_router"),
    Mistake(
        "V2's groups score by two experts",
        _V2,
        'if c.scoring_func == "sigmoid" else 1',
        'if c.scoring_func == "sigmoid" else 2',
        "group_router",
    ),
    Mistake("one group less is kept", _EXPERTS, "k=topk_group)", "k=topk_group - 1)", "group_router"),
    Mistake("weights are not normalised", _EXPERTS, "if normalise:", "if False:", "v3"),
    Mistake("V2's weights are normalised", _EXPERTS, "if normalise:", "if True:", "v2"),
    Mistake("weights are not scaled", _EXPERTS, "return w * scale", "return w", "v3"),
    Mistake(
        "V2 scores by sigmoid",
        _V2,
        'scores = sigmoid(logits) if c.scoring_func == "sigmoid"',
        "scores = sigmoid(logits) if True",
        "v2",
    ),
    Mistake(
        "V3 scores by soft-max",
        _V2,
        'scores = sigmoid(logits) if c.scoring_func == "sigmoid"',
        "scores = sigmoid(logits) if False",
        "v3",
    ),
    Mistake(
        "no shared expert",
        _V2,
        'return routed + feed_forward(g, x, c.n_shared_experts * c.moe_intermediate_size, "_shexp")',
        "return routed",
        "v3",
    ),
    Mistake("experts are not weighed", _EXPERTS, "down * w.reshape(n_tokens, -1, 1)", "down", "v3"),
    Mistake("every expert's row is the first's", "ops/products/mul_mat_id.py", "used if b.shape[1] != 1 else 0", "0", "v3"),
    Mistake("one dense layer too many", _V2, "i < c.first_k_dense_replace", "i <= c.first_k_dense_replace", "v3"),
    # Latent attention.
    Mistake("V3's rope is half-split", _V2, "plain = {", 'plain: dict[str, Any] = {"layout": "half_split", ', "v3"),
    Mistake(
        "the shared key is not rotated",
        _V2,
        "rope(latent[:, c.kv_lora_rank :], g.positions, **rotary(c))",
        "latent[:, c.kv_lora_rank :]",
        "v3",
    ),
    Mistake(
        "latents are not normed",
        _V2,
        'norm(g, "attn_kv_a_norm", latent[:, : c.kv_lora_rank], c.rms_norm_eps)',
        "latent[:, : c.kv_lora_rank]",
        "v3",
    ),
    Mistake(
        "the query's latent is not normed",
        _V2,
        'norm(g, "attn_q_a_norm", g.linear("attn_q_a", x, c.q_lora_rank), c.rms_norm_eps)',
        'g.linear("attn_q_a", x, c.q_lora_rank)',
        "v3",
    ),
    Mistake("mscale counts twice as often", _V2, "s.mscale_all_dim) ** 2", "s.mscale_all_dim) ** 4", "v3"),
    Mistake("mscale is left out", _V2, "s.mscale_all_dim) ** 2", "s.mscale_all_dim) ** 0", "v3"),
    Mistake(
        "mscale is in cos and sin too",
        _V2,
        "magnitude(s, s.mscale) / magnitude(s, s.mscale_all_dim)",
        "magnitude(s, s.mscale)",
        "v3",
    ),
    Mistake(
        "the file's mscale is read as it stands",
        "models/config.py",
        '"yarn_log_multiplier") * 10.0',
        '"yarn_log_multiplier") * 1.0',
        "v3",
    ),
    Mistake("no YaRN", _V2, 's.rope_type != "yarn"', "True", "v3"),
    Mistake("YaRN's fast end is its slow one", _V2, '"beta_fast": s.beta_fast', '"beta_fast": s.beta_slow', "v3"),
    Mistake("latent queries in the wrong order", _V2, "concat(q_latent, q_pe", "concat(q_pe, q_latent", "v3"),
    Mistake("naive queries in the wrong order", _V2, "concat(q_nope, q_pe", "concat(q_pe, q_nope", "v3"),
    Mistake(
        "naive values are keys",
        _V2,
        "v = mul_mat(value_weight(g, c), latents)",
        "v = mul_mat(cont(to_latent.permute(0, 2, 1)), latents)",
        "v3",
    ),
    Mistake("V3's epsilon is fixed", _V2, 'norm(b, "ffn_norm", x, c.rms_norm_eps)', 'norm(b, "ffn_norm", x, 1e-5)', "epsilons"),
)

SPARSE = (
    Mistake("V3.2's index rope is interleaved", _V32, 'layout: str = "half_split"', 'layout: str = "interleaved"', "v32"),
    Mistake("GLM's index rope is half-split", _GLM, 'layout="interleaved"', 'layout="half_split"', "glm"),
    Mistake(
        "index keys are RMS-normed",
        _V32,
        'k = norm(g.linear("indexer.attn_k", x, width), weight, bias, eps=KEY_NORM_EPS)',
        'k = deepseek_v2.norm(g, "indexer.k_norm", g.linear("indexer.attn_k", x, width), KEY_NORM_EPS) + bias',
        "v32",
    ),
    Mistake("index keys without their bias", _V32, "weight, bias, eps=", "weight, None, eps=", "v32"),
    Mistake("index keys take the model's epsilon", _V32, "eps=KEY_NORM_EPS", "eps=c.rms_norm_eps", "epsilons"),
    Mistake("index keys are not rotated", _V32, "fwht(rope(k, g.positions, **rotation))", "fwht(k)", "v32"),
    Mistake(
        "the Hadamard rotation of queries alone",
        _V32,
        "fwht(rope(k, g.positions, **rotation))",
        "rope(k, g.positions, **rotation)",
        "v32",
    ),
    Mistake("index scores without ReLU", _V32, "relu(mul_mat(k, q))", "mul_mat(k, q)", "v32"),
    Mistake(
        "index heads are not weighed", _V32, "relu(mul_mat(k, q)) * w.reshape(n_tokens, n_head, 1)", "relu(mul_mat(k, q))", "v32"
    ),
    Mistake(
        "the plain indexer selects rows to come",
        _V32,
        "scores + attn_mask(g.positions, g.seqs, seen.pos, seen.seq, every=seen.every)",
        "scores",
        "v32",
    ),
    Mistake(
        "the fused indexer selects rows to come",
        "ops/attention/index_top_k.py",
        "np.where(seen, scores, -np.inf)",
        "scores",
        "v32",
    ),
    Mistake("one row more is selected", _V32, "w, c.index_topk))", "w, c.index_topk + 1))", "v32"),
    Mistake("on latents, what was selected is ignored", _V2, 'g.segment("latent", k, ids=ids)', 'g.segment("latent", k)', "v32"),
    Mistake("naively, what was selected is ignored", _V2, "k_pe, axis=-1), v, ids=ids)", "k_pe, axis=-1), v)", "v32"),
    Mistake(
        "attention ignores row lists",
        "ops/attention/attend.py",
        "    if ids is None:\n        return seen",
        "    if True:\n        return seen",
        "v32",
    ),
    Mistake(
        "listed rows need not be visible",
        "ops/attention/attend.py",
        "chosen[:, :-1] if seen is None else seen & chosen[:, :-1]",
        "chosen[:, :-1]",
        "tests.ops.test_attention:test_row_lists_equal_the_explicit_mask",
    ),
    Mistake("GLM reuses the first selection", _GLM, "return selected[-1]", "return selected[0]", "glm_hidden"),
    Mistake("GLM's layers all select", _GLM, "if c.is_full(i):", "if True:", "glm"),
    Mistake(
        "index keys of another width",
        _V32,
        "StateSpec((c.index_head_dim,))",
        "StateSpec((c.index_head_dim,), every=2)",
        "declared_state",
    ),
)
