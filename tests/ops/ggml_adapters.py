"""ggml's single ops in our ops: one function an op, from a case's operands (NumPy order, four axes) to its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph import ops, registry
from tensorgraph.graph import Node, constant
from tensorgraph.ops.attention import Segment

Case = dict[str, Any]
Operands = Mapping[str, Node]
Adapter = Callable[[Case, Operands], Node]

ADAPTERS: dict[str, Adapter] = {}


def adapter(*names: str) -> Callable[[Adapter], Adapter]:
    def declare(fn: Adapter) -> Adapter:
        ADAPTERS.update(dict.fromkeys(names, fn))
        return fn

    return declare


def _attrs(case: Case, *names: str) -> dict[str, Any]:
    return {name: case["params"][name] for name in names if name in case["params"]}


def _over(x: Node, axis: int) -> Node:
    """The sum over an axis, which goes."""
    last = [*(i for i in range(x.ndim) if i != axis), axis]
    total = ops.sum_rows(x.permute(*last))
    return total.reshape(*total.shape[:-1])


@adapter(
    *("abs", "neg", "sgn", "step", "sqr", "sqrt", "exp", "expm1", "log", "sin", "cos", "tanh", "floor", "ceil", "trunc"),
    *("round", "relu", "leaky_relu", "elu", "sigmoid", "silu", "gelu", "gelu_quick", "gelu_erf", "hardsigmoid"),
    *("hardswish", "softplus", "clamp", "scale", "cumsum", "mean", "sum_rows", "rms_norm", "norm", "l2_norm", "group_norm"),
    *("xielu", "diag", "diag_mask_inf", "diag_mask_zero"),
)
def same_name(case: Case, x: Operands) -> Node:
    op = registry.ops.get(case["op"])
    return op(x["x"], **_attrs(case, *op.attrs))


@adapter("sum")
def total(case: Case, x: Operands) -> Node:
    return ops.sum(x["x"]).reshape(1, 1, 1, 1)


@adapter("add", "sub", "mul", "div")
def binary(case: Case, x: Operands) -> Node:
    a = ops.cast(x["a"], dtype="f32") if x["a"].dtype.is_block else x["a"]
    return registry.ops.get(case["op"])(a, x["b"])


@adapter("add_id")
def add_id(case: Case, x: Operands) -> Node:
    ids = x["ids"]
    return ops.add_id(x["a"], x["b"].reshape(*x["b"].shape[-2:]), ids.reshape(*x["a"].shape[:-1]))


@adapter("reglu", "geglu", "swiglu", "geglu_erf", "geglu_quick", "swiglu_oai", "swiglu_clamp")
def gated(case: Case, x: Operands) -> Node:
    swapped = bool(case["params"]["swapped"])
    return registry.ops.get(case["op"])(x["a"], x.get("b"), swapped=swapped, **_attrs(case, "alpha", "limit"))


@adapter("argmax")
def argmax(case: Case, x: Operands) -> Node:
    return ops.argmax(x["x"]).reshape(*case["out"]["numpy_shape"])


@adapter("argsort")
def argsort(case: Case, x: Operands) -> Node:
    return ops.argsort(x["x"], descending=case["params"]["order"] == "desc")


@adapter("top_k")
def top_k(case: Case, x: Operands) -> Node:
    return ops.top_k(x["x"], k=case["params"]["k"])


@adapter("mul_mat", "mul_mat_prec_hint")
def mul_mat(case: Case, x: Operands) -> Node:
    return ops.mul_mat(x["a"], x["b"])


@adapter("mul_mat_hadamard")
def mul_mat_hadamard(case: Case, x: Operands) -> Node:
    return ops.fwht(ops.cast(x["b"], dtype="f32"))


@adapter("mul_mat_id")
def mul_mat_id(case: Case, x: Operands) -> Node:
    y = ops.mul_mat_id(x["as"][0], x["b"][0], x["ids"][0, 0])
    return y.reshape(1, *y.shape)


@adapter("get_rows")
def get_rows(case: Case, x: Operands) -> Node:
    return ops.get_rows(x["a"], x["rows"][0])


@adapter("set_rows")
def set_rows(case: Case, x: Operands) -> Node:
    return ops.set_rows(x["dst"], x["src"], x["rows"][0])


@adapter("cpy")
def cpy(case: Case, x: Operands) -> Node:
    source, dtype = x["src"], x["dst"].dtype
    copied = ops.cont(source) if source.dtype == dtype else ops.cast(source, dtype=dtype)
    return copied.reshape(*x["dst"].shape)


@adapter("cont", "dup")
def cont(case: Case, x: Operands) -> Node:
    return ops.cont(x["x"])


@adapter("concat")
def concat(case: Case, x: Operands) -> Node:
    return ops.concat(x["a"], x["b"], axis=3 - case["params"]["dim"])


@adapter("repeat")
def repeat(case: Case, x: Operands) -> Node:
    return ops.repeat(x["x"], shape=case["out"]["numpy_shape"])


@adapter("pad")
def pad(case: Case, x: Operands) -> Node:
    before, after = ([case["params"][f"{side}{d}"] for d in (3, 2, 1, 0)] for side in ("lp", "rp"))
    return ops.pad(x["x"], before=before, after=after, mode="circular" if case["params"]["circular"] else "zeros")


@adapter("pad_reflect_1d")
def pad_reflect_1d(case: Case, x: Operands) -> Node:
    return ops.pad(x["x"], before=(case["params"]["p0"],), after=(case["params"]["p1"],), mode="reflect")


@adapter("roll")
def roll(case: Case, x: Operands) -> Node:
    return ops.roll(x["x"], shifts=[case["params"][f"shift{d}"] for d in (3, 2, 1, 0)])


@adapter("tri")
def tri(case: Case, x: Operands) -> Node:
    return ops.tri(x["x"], kind=case["params"]["type"])


@adapter("acc", "set")
def window(case: Case, x: Operands) -> Node:
    left, offset = case["params"]["offset_bytes"], []
    for n_bytes in (*(case["params"][f"nb{d}"] for d in (3, 2, 1)), x["a"].dtype.block_bytes):
        at, left = divmod(left, n_bytes)
        offset.append(at)
    return registry.ops.get(case["op"])(x["a"], x["b"], offset=offset)


@adapter("repeat_back")
def repeat_back(case: Case, x: Operands) -> Node:
    wanted = case["out"]["numpy_shape"]
    tiles = x["x"].reshape(*(n for pair in zip(case["params"]["repeats"][::-1], wanted, strict=True) for n in pair))
    for axis in (6, 4, 2, 0):
        tiles = _over(tiles, axis)
    return tiles


@adapter("out_prod")
def out_prod(case: Case, x: Operands) -> Node:
    a = ops.cast(x["a"], dtype="f32") if x["a"].dtype.is_block else x["a"]
    return ops.mul_mat(a.permute(0, 1, 3, 2), x["b"].permute(0, 1, 3, 2))


@adapter("arange")
def arange(case: Case, x: Operands) -> Node:
    return ops.arange(**_attrs(case, "start", "stop", "step")).reshape(*case["out"]["numpy_shape"])


@adapter("fill")
def fill(case: Case, x: Operands) -> Node:
    return ops.fill(shape=x["x"].shape, value=case["params"]["c"], dtype=x["x"].dtype)


@adapter("soft_max")
def soft_max(case: Case, x: Operands) -> Node:
    sinks = x["sinks"].reshape(-1) if "sinks" in x else None
    return ops.soft_max(x["x"], x.get("mask"), sinks, **_attrs(case, "scale", "max_bias"))


@adapter("rope", "rope_back")
def rope(case: Case, x: Operands) -> Node:
    p = case["params"]
    factors = x["freq_factors"].reshape(-1) if "freq_factors" in x else None
    magnitude = p["attn_factor"] * (1 + 0.1 * math.log(1 / p["freq_scale"]) if p["ext_factor"] else 1)
    rotated = ops.rope(
        x["x"].permute(1, 0, 2, 3),  # [T, batch, H, D]
        x["pos"].reshape(-1),
        factors,
        n_dims=p["n_dims"],
        base=p["freq_base"],
        layout={"normal": "interleaved", "neox": "half_split"}[p["mode"]],
        offset=p["n_offs"],
        inverse=case["op"] == "rope_back",
        freq_scale=p["freq_scale"],
        ext_factor=p["ext_factor"],
        beta_fast=p["beta_fast"],
        beta_slow=p["beta_slow"],
        original_context=p["n_ctx_orig"],
        magnitude=magnitude,
    )
    return rotated.permute(1, 0, 2, 3)


def _slopes(n_head: int, max_bias: float) -> np.ndarray[Any, Any]:
    low = 1 << (n_head.bit_length() - 1)
    first = [2 ** (-max_bias * (h + 1) / low) for h in range(low)]
    rest = [2 ** (-max_bias * (2 * h + 1) / (2 * low)) for h in range(n_head - low)]
    return np.array(first + rest, np.float32)


@adapter("flash_attn_ext")
def flash_attn_ext(case: Case, x: Operands) -> Node:
    p, n_head = case["params"], case["params"]["n_head"]
    sinks = x["sinks"].reshape(-1) if "sinks" in x else None
    results = []
    for i in range(case["out"]["numpy_shape"][0]):
        q, k, v = (x[name][i].permute(1, 0, 2) for name in ("q", "k", "v"))  # [T or S, heads, D]
        mask = None
        if "mask" in x:
            given = ops.cast(x["mask"][i % x["mask"].shape[0]], dtype="f32")  # [heads or 1, T, S]
            mask = ops.repeat(given, shape=(n_head, *given.shape[1:]))
            if p["max_bias"] > 0:
                mask = ops.mul(mask, constant(f"slopes{i}", _slopes(n_head, p["max_bias"]).reshape(-1, 1, 1)))
        results.append(
            ops.flash_attn(q, Segment(k, v, causal=False, mask=mask), scale=p["scale"], softcap=p["logit_softcap"], sinks=sinks)
        )
    return ops.concat(*(y.reshape(1, *y.shape) for y in results), axis=0)


@adapter("lightning_indexer")
def lightning_indexer(case: Case, x: Operands) -> Node:
    k = x["k"].permute(0, 2, 1, 3)  # [stream, 1, S, D]
    dots = ops.mul_mat(k, x["q"])  # [stream, T, H, S]
    weights = x["weights"].permute(0, 2, 3, 1)  # [stream, T, H, 1]
    score = _over(ops.mul(ops.relu(dots), weights), 2)  # [stream, T, S]
    return ops.add(score.reshape(score.shape[0], 1, *score.shape[1:]), x["mask"])


@adapter("dsv4_hc_comb")
def dsv4_hc_comb(case: Case, x: Operands) -> Node:
    p, hc = case["params"], case["params"]["hc"]
    mixes, base = x["mixes"][0, 0][:, 2 * hc :], x["base"][0, 0, 0, 2 * hc :]
    logits = ops.add(ops.mul(mixes, x["scale"][0, 0, 0, 2:3]), base).reshape(-1, hc, hc)  # [T, source, target]
    y = ops.scale(ops.soft_max(logits), scale=1.0, bias=p["eps"])

    def balanced(y: Node, axis: int) -> Node:
        sums = ops.scale(_over(y, axis), scale=1.0, bias=p["eps"])
        shape = list(y.shape)
        shape[axis] = 1
        return ops.div(y, sums.reshape(*shape))

    y = balanced(y, 1)
    for _ in range(p["n_iter"] - 1):
        y = balanced(balanced(y, 2), 1)
    return y.reshape(1, *y.shape)


@adapter("dsv4_hc_pre")
def dsv4_hc_pre(case: Case, x: Operands) -> Node:
    streams = x["x"][0]  # [T, hc, n]
    if case["params"]["gated"]:
        weighted = ops.mul(streams, ops.sigmoid(x["gate"][0]))
    else:
        weighted = ops.mul(streams, x["weights"][0, 0][:, :, None])
    mixed = ops.scale(_over(weighted, 1), scale=case["params"]["scale"])
    return mixed.reshape(1, 1, *mixed.shape)


@adapter("dsv4_hc_post")
def dsv4_hc_post(case: Case, x: Operands) -> Node:
    residual, post = x["residual"][0], x["post"][0, 0]  # [T, hc, n], [T, hc]
    out = x["x"][0, 0][:, None, :]  # [T, 1, n]
    written = ops.mul(ops.repeat(out, shape=residual.shape), post[:, :, None])
    if "comb" in x:
        comb = x["comb"][0].permute(0, 2, 1)  # [T, target, source]
        residual = ops.mul_mat(residual.permute(0, 2, 1), comb)  # [T, target, n]
    y = ops.add(written, residual)
    return y.reshape(1, *y.shape)
