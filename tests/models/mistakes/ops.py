"""Mistakes in ops: attention's predicates, sinks and empty rows, rope, selection, norms, products."""

from __future__ import annotations

from tests.models.planting import Mistake

_ATTEND, _VISIBLE, _ROPE = "ops/attention/attend.py", "ops/attention/visibility.py", "ops/position/rope.py"
_TESTS, _ROWS = "tests.ops.test_attention:test_", "tests.ops.test_attention_rows:test_"
_ROPES = "tests.ops.test_rope:test_every_variant"

OPS = (
    Mistake("a token does not see itself", _VISIBLE, "else k_pos <= at", "else k_pos < at", f"{_TESTS}flash_attn"),
    Mistake("a token sees the next one", _VISIBLE, "else k_pos <= at", "else k_pos <= at + 1", f"{_TESTS}flash_attn"),
    Mistake(
        "sequences do not matter",
        _VISIBLE,
        "seen = q_seq[:, None] == k_seq",
        "seen = q_seq[:, None] >= 0 * k_seq",
        f"{_TESTS}flash_attn",
    ),
    Mistake("causality where there is none", _VISIBLE, "if causal:", "if True:", f"{_TESTS}flash_attn"),
    Mistake("a window counts from the row", _VISIBLE, "k_pos > at - window", "k_pos < at + window", f"{_TESTS}flash_attn"),
    Mistake(
        "masks count blocks as rows",
        "ops/attention/attn_mask.py",
        "every=every, window=window)\n    assert",
        "window=window)\n    assert",
        f"{_TESTS}attn_mask",
    ),
    Mistake(
        "sinks take no weight",
        _ATTEND,
        "np.zeros_like(top) if sinks is None else np.exp(sinks - top)",
        "np.zeros_like(top)",
        f"{_TESTS}sinks_take_weight_and_give_nothing",
    ),
    Mistake("the maximum of the first segment", _ATTEND, "for s in logits[1:]:", "for s in logits[:0]:", "large_second_segment"),
    Mistake(
        "a query that sees nothing is not a number",
        _ATTEND,
        "top = np.where(top == -np.inf, 0.0, top)",
        "top = top",
        f"{_TESTS}queries_that_see_nothing_give_zero",
    ),
    Mistake(
        "nothing is divided by nothing",
        _ATTEND,
        "y /= np.where(total == 0, 1.0, total)",
        "y /= total",
        f"{_TESTS}queries_that_see_nothing_give_zero",
    ),
    Mistake(
        "stale rows reach those that do not see them",
        _ATTEND,
        "if not used.all():",
        "if False:",
        f"{_TESTS}rows_that_a_query_does_not_see_may_hold_anything",
    ),
    Mistake(
        "rows seen by some queries spoil others",
        _ATTEND,
        "if n_tokens > 1 and np.isnan(y).any():",
        "if False:",
        f"{_TESTS}rows_that_a_query_does_not_see_may_hold_anything",
    ),
    Mistake(
        "no id is the first row",
        _ATTEND,
        "ids = ids[tokens]",
        "ids = np.maximum(ids[tokens], 0)",
        f"{_TESTS}row_lists_equal_the_explicit_mask",
    ),
    Mistake(
        "queries of later tiles stand at the first ones' positions",
        _ATTEND,
        "None if x is None else x[tokens] for x in",
        "None if x is None else x[: tokens.stop - tokens.start] for x in",
        f"{_TESTS}many_queries_are_taken_in_tiles",
    ),
    Mistake(
        "softcap without its factor", _ATTEND, "np.tanh(s / softcap) * softcap", "np.tanh(s / softcap)", f"{_TESTS}flash_attn"
    ),
    Mistake(
        "higher rows win ties",
        "ops/select/top_k.py",
        'order = np.argsort(-rows, -1, kind="stable")[:, :kept]',
        'order = (n - 1 - np.argsort(-rows[:, ::-1], -1, kind="stable"))[:, :kept]',
        "ties",
    ),
    Mistake("long rows lose ties", "ops/select/top_k.py", "np.flatnonzero(row >= least)", "np.flatnonzero(row > least)", "ties"),
    Mistake(
        "hidden rows are selected",
        "ops/select/top_k.py",
        "order, -1) > -np.inf, order, -1)",
        "order, -1) > -np.inf, order, order)",
        "ties",
    ),
    Mistake(
        "the fused indexer's scores are not rounded",
        "ops/attention/index_top_k.py",
        "product.sum(1, dtype=np.float64)",
        "product[:, ::2].sum(1, dtype=np.float64)",
        f"{_ROWS}index_top_k",
    ),
    Mistake(
        "a pooled block of another length",
        "ops/attention/block_pool.py",
        "[:, None] * every + np.arange(every)",
        "[:, None] * every + np.arange(every) // 2",
        f"{_ROWS}block_pool",
    ),
    Mistake("YaRN's ramp runs the other way", _ROPE, "return 1 - stretched", "return stretched", _ROPES),
    Mistake("YaRN's ramp starts one pair late", _ROPE, "math.floor(pair_turning(fast))", "math.ceil(pair_turning(fast))", _ROPES),
    Mistake(
        "frequency factors multiply",
        _ROPE,
        "per_position = per_position / freq_factors",
        "per_position = per_position * freq_factors",
        _ROPES,
    ),
    Mistake("the magnitude turns cos alone", _ROPE, "cos * magnitude, sin * magnitude", "cos * magnitude, sin", _ROPES),
    Mistake(
        "epsilon outside the root", "ops/norms/norms.py", "np.sqrt(_mean(x * x) + eps)", "(np.sqrt(_mean(x * x)) + eps)", "norms"
    ),
    Mistake(
        "a norm without its mean",
        "ops/norms/norms.py",
        "centred = x - np.where(alike, x[..., :1], _mean(x))",
        "centred = x",
        "norms",
    ),
    Mistake(
        "matrices are tiled, not repeated",
        "ops/products/mul_mat.py",
        "for e in (m, n // max(m, 1))), *b.shape[-2:])",
        "for e in (n // max(m, 1), m)), *b.shape[-2:]).swapaxes(0, 1)",
        "repeated_matrices",
    ),
)
