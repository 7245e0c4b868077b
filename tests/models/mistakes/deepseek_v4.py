"""Mistakes in V4."""

from __future__ import annotations

from tests.models.planting import Mistake

_V4, _EXPERTS, _POOL, _ROPE = "models/deepseek_v4.py", "models/experts.py", "ops/attention/block_pool.py", "ops/position/rope.py"
_GLU = "ops/elementwise/glu.py"
_CLAMPED = "gate = np.minimum(gate, limit)\n    up = np.clip(up, -limit, limit)\n    return gate * _sigmoid(gate) * up"

COMPRESSION = (
    # Rotation.
    Mistake(
        "one base for all layers",
        _V4,
        '    return last | {\n        "base": c.compress_rope_theta',
        '    return last | {\n        "base": c.rope_theta',
        "v4",
    ),
    Mistake(
        "plain layers are stretched too",
        _V4,
        "    if not ratio:\n        return last",
        "    if ratio is None:\n        return last",
        "v4",
    ),
    Mistake("no YaRN in compressed layers", _V4, 's.rope_type != "yarn"', "True", "v4"),
    Mistake("the first channels are rotated", _V4, '"offset": width - c.qk_rope_head_dim', '"offset": 0', "v4"),
    Mistake(
        "rope forgets where its channels start",
        _ROPE,
        "slice(offset, end, 2), slice(offset + 1, end, 2)",
        "slice(0, n_dims, 2), slice(1, n_dims, 2)",
        "v4",
    ),
    Mistake("the output is rotated on", _V4, "**rotation, inverse=True)", "**rotation, inverse=False)", "v4"),
    Mistake("the output is not rotated back", _V4, "o = rope(o, g.positions, **rotation, inverse=True)", "o = o", "v4"),
    Mistake("the inverse is no inverse", _ROPE, "-sin if inverse else sin", "sin if inverse else sin", "v4"),
    Mistake("blocks rotated at their number", _V4, "g.new_row_positions(rows), **rotation", "g.new_rows(rows), **rotation", "v4"),
    Mistake(
        "blocks rotated at their last token",
        "tensorgraph/extents.py",
        "rows.new.rows * stream.every,",
        "rows.new.rows * stream.every + stream.every - 1,",
        "v4",
    ),
    Mistake("mscale on V4", _V4, "scale=width**-0.5", "scale=width**-0.5 * 1.277**2", "v4"),
    # Windows, sinks and what is visible.
    Mistake(
        "queries are not normed by head",
        _V4,
        'q = rms_norm(heads(g.linear("attn_q_b", qr, n_head * width), n_head), eps=c.rms_norm_eps)',
        'q = heads(g.linear("attn_q_b", qr, n_head * width), n_head)',
        "v4",
    ),
    Mistake("no sinks", _V4, "sinks=sinks, pos", "sinks=None, pos", "v4"),
    Mistake(
        "V4's window is left out",
        _V4,
        'one_head(g.append("window", kv)), window=c.sliding_window)',
        'one_head(g.append("window", kv)))',
        "v4",
    ),
    Mistake(
        "the window is one row narrower", "ops/attention/visibility.py", "k_pos > at - window", "k_pos > at - window + 1", "v4"
    ),
    Mistake("the window is one row wider", "ops/attention/visibility.py", "k_pos > at - window", "k_pos >= at - window", "v4"),
    Mistake("a block is seen one token early", "ops/attention/visibility.py", "* every - 1 <= at", "* every - 2 <= at", "v4"),
    Mistake("a block is seen one token late", "ops/attention/visibility.py", "* every - 1 <= at", "* every <= at", "v4"),
    Mistake(
        "blocks are seen as single rows",
        "models/builder.py",
        "window=window, every=every, ids=ids",
        "window=window, ids=ids",
        "v4",
    ),
    Mistake(
        "compressed rows are left out", _V4, 'segments.append(g.segment("rows", one_head(rows), ids=ids))', "pass", "v4_hidden"
    ),
    Mistake("sparse layers attend to every row", _V4, "one_head(rows), ids=ids)", "one_head(rows))", "v4_hidden"),
    Mistake(
        "output groups are mixed",
        _V4,
        "o.reshape(n_tokens, n, wide).permute(1, 0, 2)",
        "o.reshape(n_tokens, wide, n).permute(2, 0, 1)",
        "v4",
    ),
    # Compressors and the indexer.
    Mistake("halves of overlapping blocks are swapped", _POOL, "gates[..., :half])", "gates[..., half:])", "v4"),
    Mistake("values of the wrong half", _POOL, "c[before][..., :half]", "c[before][..., half:]", "v4"),
    Mistake("blocks do not overlap", _V4, "overlap = ratio == CSA", "overlap = False", "v4"),
    Mistake(
        "the first block pools what is not there",
        _POOL,
        "first[:, None, None], -np.inf, gates",
        "first[:, None, None], 0.0, gates",
        "v4",
    ),
    Mistake(
        "position weights in reverse",
        _POOL,
        "z[own] if bias is None else z[own] + bias",
        "z[own] if bias is None else z[own] + bias[::-1]",
        "v4",
    ),
    Mistake(
        "position weights of the block before are lost",
        _POOL,
        "z[before] if bias is None else z[before] + bias",
        "z[before]",
        "v4",
    ),
    Mistake(
        "pooled by one weight for all channels",
        _POOL,
        "np.exp(logits - logits.max(1, keepdims=True))",
        "np.exp(logits - logits.max(1, keepdims=True)).mean(2, keepdims=True) + 0 * logits",
        "v4",
    ),
    Mistake(
        "blocks pool other sequences' rows",
        _POOL,
        "keys = row_seq.astype(np.int64) * stride",
        "keys = row_seq.astype(np.int64) * 0",
        "v4",
    ),
    Mistake("the overlap is lost between steps", _V4, "keep=n * ratio", "keep=ratio", "v4"),
    Mistake(
        "unfinished blocks are kept in f16",
        _V4,
        "StateSpec((2, n * width), f32,",
        "StateSpec((2, n * width), None,",
        "declared_state",
    ),
    Mistake("compressed rows are not normed", _V4, 'norm(g, f"{weights}_norm", pooled, c.rms_norm_eps)', "pooled", "v4"),
    Mistake(
        "the window's stream keeps one row less",
        _V4,
        "(c.head_dim,), keep=c.sliding_window)",
        "(c.head_dim,), keep=c.sliding_window - 1)",
        "v4",
    ),
    Mistake(
        "the indexer turns as plain layers do", _V4, "rotation = rotary(c, CSA, width)", "rotation = rotary(c, 0, width)", "v4"
    ),
    Mistake("compressed index keys without Hadamard", _V4, "fwht(row) if name else row", "row", "v4"),
    Mistake(
        "the indexer sees blocks to come", "models/deepseek_v32.py", "seen.seq, every=seen.every)", "seen.seq, every=1)", "v4"
    ),
)

STREAMS_AND_EXPERTS = (
    # Hyper-connections.
    Mistake(
        "Sinkhorn starts with rows",
        _V4,
        "    m = soft_max(scores) + c.hc_eps\n",
        "    m = soft_max(scores.permute(0, 2, 1)).permute(0, 2, 1) + c.hc_eps\n",
        "hyper_connections",
    ),
    Mistake(
        "Sinkhorn's turns the other way round",
        _V4,
        "    m = over_src(m, c)\n",
        "    m = l1_norm(m, eps=c.hc_eps)\n",
        "hyper_connections",
    ),
    Mistake(
        "one Sinkhorn iteration less",
        _V4,
        "range(c.hc_sinkhorn_iters - 1)",
        "range(c.hc_sinkhorn_iters - 2)",
        "hyper_connections",
    ),
    Mistake(
        "Sinkhorn's denominators without epsilon", _V4, "l1_norm(m, eps=c.hc_eps)", "l1_norm(m, eps=0.0)", "hyper_connections"
    ),
    Mistake("epsilon is left out of comb", _V4, "m = soft_max(scores) + c.hc_eps", "m = soft_max(scores)", "hyper_connections"),
    Mistake("epsilon on post", _V4, "* 2.0\n", "* 2.0 + c.hc_eps\n", "hyper_connections"),
    Mistake("post without its factor", _V4, "base[n : 2 * n]) * 2.0", "base[n : 2 * n]) * 1.0", "hyper_connections"),
    Mistake("epsilon is left out of pre", _V4, "base[:n]) + c.hc_eps", "base[:n])", "hyper_connections"),
    Mistake("epsilon is left out of the head", _V4, "* scale + base) + c.hc_eps", "* scale + base)", "hyper_connections"),
    Mistake("post scaled as pre", _V4, "scale[1:2]", "scale[0:1]", "hyper_connections"),
    Mistake("source and destination transposed", _V4, "comb.permute(0, 2, 1))  # [T, dst, D]", "comb)  # [T, dst, D]", "v4"),
    Mistake(
        "comb is read transposed",
        _V4,
        ".reshape(n_tokens, n, n), c)",
        ".reshape(n_tokens, n, n).permute(0, 2, 1), c)",
        "hyper_connections",
    ),
    Mistake(
        "streams are not normed before mixing",
        _V4,
        "flat = rms_norm(streams.reshape(streams.shape[0], -1), eps=c.rms_norm_eps)",
        "flat = streams.reshape(streams.shape[0], -1)",
        "hyper_connections",
    ),
    Mistake("outputs go to all streams alike", _V4, "* post.reshape(n_tokens, n, 1)", "* 1.0", "v4"),
    Mistake(
        "the head takes the first stream", _V4, "gather_streams(wanted, head_weights(g, wanted, c))", "wanted[:, 0]", "v4_head"
    ),
    Mistake("the head does not scale", _V4, "c.hc_mult, c) * scale + base", "c.hc_mult, c) + base", "v4_head"),
    Mistake("V4's epsilon is fixed", _V4, 'norm(b, "ffn_norm", x, c.rms_norm_eps)', 'norm(b, "ffn_norm", x, 1e-5)', "epsilons"),
    # Experts.
    Mistake("hashed by position", _V4, "c.num_experts_per_tok), g.tokens)", "c.num_experts_per_tok), g.positions)", "v4"),
    Mistake("one hash layer less", _V4, "i < c.num_hash_layers", "i < c.num_hash_layers - 1", "v4"),
    Mistake(
        "V4 scores without the root",
        _V4,
        'sqrt(softplus(g.linear("ffn_gate_inp", x, c.n_routed_experts)))',
        'softplus(g.linear("ffn_gate_inp", x, c.n_routed_experts))',
        "v4",
    ),
    Mistake(
        "V4's bias leaks into the weights",
        _V4,
        "w = weigh(scores, ids",
        'w = weigh(scores if i < c.num_hash_layers else scores + g.weight("exp_probs_b.bias", c.n_routed_experts), ids',
        "v4",
    ),
    Mistake(
        "V4's bias selects nothing",
        _V4,
        'route(scores, g.weight("exp_probs_b.bias", c.n_routed_experts), c.num_experts_per_tok)',
        "route(scores, None, c.num_experts_per_tok)",
        "v4",
    ),
    Mistake(
        "hashed experts weigh alike",
        _V4,
        "w = weigh(scores, ids",
        "w = weigh(scores * 0.0 + 1.0 if i < c.num_hash_layers else scores, ids",
        "v4",
    ),
    Mistake("V4's weights are not normalised", _V4, "normalise=c.norm_topk_prob", "normalise=False", "v4"),
    Mistake("V4's weights are not scaled", _V4, "scale=c.routed_scaling_factor)", "scale=1.0)", "v4"),
    Mistake(
        "the shared expert is not clamped",
        _V4,
        "hidden = unit(",
        "hidden = partial(swiglu_clamp, limit=1e9)(",
        "v4",
    ),
    Mistake("routed experts are not clamped", _V4, "unit=unit)", "unit=partial(swiglu_clamp, limit=1e9))", "v4"),
    Mistake(
        "clamped after silu", _GLU, _CLAMPED, "return np.minimum(gate * _sigmoid(gate), limit) * np.clip(up, -limit, limit)", "v4"
    ),
    Mistake(
        "the gate is clamped below too",
        _GLU,
        "    gate = np.minimum(gate, limit)\n",
        "    gate = np.clip(gate, -limit, limit)\n",
        "v4",
    ),
    Mistake("up is not clamped below", _GLU, "    up = np.clip(up, -limit, limit)\n", "    up = np.minimum(up, limit)\n", "v4"),
)
