"""Normalisations and soft-max against loops over rows in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tensorgraph import ops
from tensorgraph.compiler import run_op
from tensorgraph.dims import Dim
from tensorgraph.errors import AttributeValueError, ShapeError
from tensorgraph.graph import input

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("d", [1, 5, 64, 67])
@pytest.mark.parametrize("eps", [1e-6, 0.25])
def test_norms(d: int, eps: float) -> None:
    x, weight, bias = normal(3, 2, d) + 0.5, normal(d), normal(d)
    for i in np.ndindex(3, 2):
        row = [float(v) for v in x[i]]
        root = math.sqrt(math.fsum(v * v for v in row) / d + eps)
        mean = math.fsum(row) / d
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in row) / d + eps)
        plain = [v / root for v in row]
        centred = [(v - mean) / deviation for v in row]
        np.testing.assert_allclose(run_op("rms_norm", x, eps=eps)[i], plain, rtol=1e-6)
        np.testing.assert_allclose(run_op("rms_norm", x, weight, eps=eps)[i], np.multiply(plain, weight), rtol=1e-6)
        np.testing.assert_allclose(run_op("norm", x, eps=eps)[i], centred, rtol=1e-6, atol=1e-7)
        want = np.multiply(centred, weight) + bias
        np.testing.assert_allclose(run_op("norm", x, weight, bias, eps=eps)[i], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_groups", "groups"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (4, [2, 2, 1]), (9, [1] * 5)])
def test_group_norm(n_groups: int, groups: list[int]) -> None:
    """Groups of five channels, as many as `groups` says."""
    x = normal(2, 5, 3, 4) + 0.5
    got = run_op("group_norm", x, n_groups=n_groups, eps=1e-5)
    for b in range(2):
        first = 0
        for n in groups:
            part = [float(v) for v in x[b, first : first + n].reshape(-1)]
            mean = math.fsum(part) / len(part)
            deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in part) / len(part) + 1e-5)
            want = np.reshape([(v - mean) / deviation for v in part], (n, 3, 4))
            np.testing.assert_allclose(got[b, first : first + n], want, rtol=1e-5, atol=1e-6)
            first += n
        assert first == 5


def test_norms_of_what_would_overflow() -> None:
    x = np.array([[3e38, -3e38, 0, 0]], np.float32)
    np.testing.assert_allclose(run_op("rms_norm", x, eps=1e-6), [[math.sqrt(2), -math.sqrt(2), 0, 0]], rtol=1e-6)
    assert run_op("rms_norm", np.zeros((1, 4), np.float32), eps=1e-6).tolist() == [[0.0] * 4]


def test_norm_refusals() -> None:
    x = input("x", [Dim("T", 8), 4])
    with pytest.raises(ShapeError, match=r"\[rms_norm\] weight must be \[4\]; got \[5\] .*\"attn_norm\""):
        ops.rms_norm(x, input("attn_norm", [5]), eps=1e-6)
    with pytest.raises(AttributeValueError, match=r"\[rms_norm\] eps must be within"):
        ops.rms_norm(x, eps=-1.0)
    with pytest.raises(ShapeError, match=r"\[group_norm\] x must be \[.*C, H, W\]; got \[T, 4\]"):
        ops.group_norm(x, n_groups=1, eps=1e-6)
    with pytest.raises(AttributeValueError, match=r"\[group_norm\] n_groups must be within"):
        ops.group_norm(x, n_groups=0, eps=1e-6)


def soft_max_by_hand(x: np.ndarray, mask: np.ndarray | None, sinks: np.ndarray | None, scale: float, bias: float) -> np.ndarray:
    """x [B, H, R, N]; the textbook sum, without taking the maximum off."""
    n_head = x.shape[1]
    power = 2 ** math.floor(math.log2(n_head))
    y = np.zeros(x.shape)
    for b, h, r in np.ndindex(*x.shape[:3]):
        slope = 1.0
        if bias > 0:
            slope = 2 ** (-bias / power * (h + 1)) if h < power else 2 ** (-bias / (2 * power) * (2 * (h - power) + 1))
        logits = [scale * float(v) for v in x[b, h, r]]
        if mask is not None:
            row = mask[b % mask.shape[0], h % mask.shape[1], r]
            logits = [z + slope * float(m) for z, m in zip(logits, row, strict=True)]
        parts = [math.exp(z) for z in logits]
        total = math.fsum(parts) + (math.exp(float(sinks[h])) if sinks is not None else 0)
        y[b, h, r] = [p / total if total else 0.0 for p in parts]
    return y


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("max_bias", [0.0, 8.0])
@pytest.mark.parametrize("mask_shape", [None, (1, 1, 3, 9), (2, 6, 3, 9), (1, 2, 3, 9), (2, 3, 5, 9), (1, 3, 4, 9)])
def test_soft_max(mask_shape: tuple[int, ...] | None, max_bias: float, with_sinks: bool) -> None:
    x = normal(2, 6, 3, 9)
    mask = None
    if mask_shape is not None:
        mask = np.where(RNG.random(mask_shape) < 0.3, -np.inf, normal(*mask_shape)).astype(np.float16)
    sinks = normal(6) if with_sinks else None
    got = run_op("soft_max", x, mask, sinks, scale=0.5, max_bias=max_bias)
    np.testing.assert_allclose(got, soft_max_by_hand(x, mask, sinks, 0.5, max_bias), rtol=1e-6, atol=1e-7)


def test_soft_max_of_large_values_and_of_nothing() -> None:
    x = np.array([[1e30, 1e30, -1e30], [-np.inf, -np.inf, -np.inf], [-np.inf, 0, -np.inf]], np.float32)
    assert run_op("soft_max", x).tolist() == [[0.5, 0.5, 0], [0, 0, 0], [0, 1, 0]]
    assert run_op("soft_max", x[1], sinks=np.zeros(1, np.float32)).tolist() == [0, 0, 0]
    masked = run_op("soft_max", np.zeros((2, 3), np.float32), np.array([[0, 0, -np.inf], [-np.inf] * 3], np.float32))
    assert masked.tolist() == [[0.5, 0.5, 0], [0, 0, 0]]


def test_soft_max_refusals_and_runtime_extents() -> None:
    t, s = Dim("T", 8), Dim("S", 64)
    x = input("x", [4, t, s])
    assert ops.soft_max(x, input("m", [t, s])).shape == (4, t, s)
    with pytest.raises(ShapeError, match=r"\[soft_max\] mask must be .*\[4, T, S\]; got \[3, T, S\]"):
        ops.soft_max(x, input("m", [3, t, s]))
    with pytest.raises(ShapeError, match=r"\[soft_max\] mask must be"):
        ops.soft_max(input("x", [4, 3, 9]), input("m", [2, 9]))
    with pytest.raises(ShapeError, match=r"\[soft_max\] sinks must be \[4\], one for each head"):
        ops.soft_max(x, sinks=input("s", [3]))
