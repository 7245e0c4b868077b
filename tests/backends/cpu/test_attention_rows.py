"""What random cases of flash_attn seldom hold: rows not seen that hold infinities or NaN, sinks, refusals; and sums of lanes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu.ir import F32
from tensorgraph.backends.cpu.jit import Jit
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.backends.cpu.target import find_target
from tensorgraph.errors import InputError
from tensorgraph.ops.attention import flash_attn
from tensorgraph.ops.attention.attend_tile_cpu import lane_sums
from tests.ops.attention_oracle import Array, Slots, attention
from tests.ops.evaluate import runner

BACKENDS = ["cpu", "cpu:avx2", "cpu:baseline"]


def attrs(**given: Any) -> dict[str, Any]:
    return flash_attn.check_attrs({"scale": 0.4, "segments": ((1, None, True),), **given})


def prompt(rng: np.random.Generator, n: int, heads: int, kv_heads: int, width: int) -> Slots:
    """Two sequences of n tokens in all, which see each other's rows as little as later ones of their own."""
    cut = int(rng.integers(0, n + 1))
    pos, seq = np.r_[:cut, : n - cut].astype(np.int32), np.repeat([0, 1], [cut, n - cut]).astype(np.int32)
    slots: Slots = {"q": rng.standard_normal((n, heads, width), np.float32), "pos": pos, "seq": seq, "pos0": pos, "seq0": seq}
    return slots | {f"{name}0": rng.standard_normal((n, kv_heads, width), np.float32) for name in "kv"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 9])
def test_rows_that_a_query_does_not_see_may_hold_anything(group: int, backend: str) -> None:
    """Tokens that share rows with others of their sequence, or of another, are not spoilt by what these others see."""
    rng = np.random.default_rng(group)
    run, n = runner(flash_attn, backend), 21
    slots = prompt(rng, n, 2 * group, 2, 16)
    clean = attention(slots, attrs())
    np.testing.assert_allclose(run(slots, **attrs()), clean, rtol=0, atol=1e-5)
    for slot, bad in (("k0", np.nan), ("k0", np.inf), ("v0", np.nan), ("v0", np.inf)):
        row = int(rng.integers(0, n))
        spoilt = slots[slot].copy()
        spoilt[row] = bad
        got = run({**slots, slot: spoilt}, **attrs())
        seeing = (slots["seq"] == slots["seq"][row]) & (slots["pos"] >= slots["pos"][row])
        np.testing.assert_allclose(got[~seeing], clean[~seeing], rtol=0, atol=1e-5)
        assert seeing.any() and not np.allclose(got[seeing], clean[seeing], equal_nan=False)


@dataclass(frozen=True)
class Prompt:
    """Sizes that take several tiles of queries, and several blocks of rows."""

    n_tokens: int
    n_rows: int
    kv_heads: int
    group: int
    d_k: int
    d_v: int
    dtype: str = "float32"
    rule: tuple[int, int | None, bool] = (1, None, True)
    own_values: bool = True
    sinks: bool = False
    softcap: float = 0.0

    def slots(self, rng: np.random.Generator) -> Slots:
        """Rows of three sequences in any order, for tokens of two of them."""
        kind, n = np.dtype(self.dtype), self.n_rows
        slots: Slots = {"q": rng.standard_normal((self.n_tokens, self.kv_heads * self.group, self.d_k)).astype(kind)}
        slots["k0"] = rng.standard_normal((n, self.kv_heads, self.d_k)).astype(kind)
        if self.own_values:
            slots["v0"] = rng.standard_normal((n, self.kv_heads, self.d_v)).astype(kind)
        if self.sinks:
            slots["sinks"] = rng.standard_normal(self.kv_heads * self.group).astype(np.float32)
        slots |= {"pos0": rng.permutation(n).astype(np.int32), "seq0": np.sort(rng.integers(0, 3, n)).astype(np.int64)}
        return slots | {"pos": rng.integers(0, n, self.n_tokens), "seq": rng.integers(1, 3, self.n_tokens).astype(np.int32)}


PROMPTS = {
    "many tiles": Prompt(131, 200, 2, 1, 24, 17),
    "blocks alone": Prompt(13, 320, 1, 4, 64, 32, "float16", sinks=True),
    "pieces of heads": Prompt(9, 70, 1, 100, 40, 16, own_values=False),
    "windows": Prompt(60, 150, 3, 3, 33, 48, rule=(4, 25, True), softcap=3.0),
    "not causal": Prompt(50, 129, 2, 2, 32, 32, rule=(1, 40, False)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROMPTS)
def test_tiles_of_queries(name: str, backend: str) -> None:
    prompt = PROMPTS[name]
    slots = prompt.slots(np.random.default_rng(sorted(PROMPTS).index(name)))
    given = attrs(segments=(prompt.rule,), d_v=prompt.d_v, softcap=prompt.softcap)
    wanted = runner(flash_attn, "reference")(slots, **given)
    np.testing.assert_allclose(runner(flash_attn, backend)(slots, **given), wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted).max() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_may_hold_anything(backend: str) -> None:
    """Tokens 0 and 1 see row 3 by the mask, the others do not."""
    rng = np.random.default_rng(2)
    slots = {f"{name}0": rng.standard_normal((5, 2, 8), np.float32) for name in "kv"}
    slots["q"] = rng.standard_normal((6, 4, 8), np.float32)
    slots["mask0"] = rng.standard_normal((6, 5), np.float32)
    slots["mask0"][2:, 3] = -np.inf
    clean = attention(slots, attrs())
    for slot in ("k0", "v0"):
        for bad in (np.inf, -np.inf, np.nan):
            spoilt = {**slots, slot: slots[slot].copy()}
            spoilt[slot][3] = bad
            got = runner(flash_attn, backend)(spoilt, **attrs())
            np.testing.assert_allclose(got[2:], clean[2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_tokens", [2, 7])
def test_queries_that_see_nothing_give_zero(n_tokens: int, backend: str) -> None:
    rng, run = np.random.default_rng(6), runner(flash_attn, backend)
    slots = {"q": rng.standard_normal((n_tokens, 4, 8), np.float32), "k0": rng.standard_normal((5, 2, 8), np.float32)}
    sinks = rng.standard_normal(4, np.float32)
    none = np.full((n_tokens, 5), -np.inf, np.float32)
    for blind in (
        {"mask0": none},
        {"mask0": none, "sinks": sinks},
        {"k0": slots["k0"][:0]},
        {"k0": slots["k0"][:0], "sinks": sinks},
        {"ids0": np.full((n_tokens, 2), -1, np.int32)},
        {"pos": np.zeros(n_tokens, np.int32), "pos0": np.arange(1, 6, dtype=np.int32)},
        {"seq": np.zeros(n_tokens, np.int32), "seq0": np.ones(5, np.int32)},
    ):
        assert np.array_equal(run({**slots, **blind}, **attrs()), np.zeros((n_tokens, 4, 8)))
    blind_head = np.zeros((4, n_tokens, 5), np.float32)
    blind_head[2] = -np.inf
    y = run({**slots, "mask0": blind_head}, **attrs())
    assert not y[:, 2].any() and np.all(y[:, [0, 1, 3]] != 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend: str) -> None:
    """A sink takes weight and gives nothing; what is infinite or NaN does as in the reference."""
    run = runner(flash_attn, backend)
    slots = {"q": np.ones((1, 2, 1), np.float32), "k0": np.zeros((2, 1, 1), np.float32)}
    slots["v0"] = np.array([[[1.0]], [[3.0]]], np.float32)
    sinks = {
        (0.0, np.log(6)): [4 / 3, 4 / 8],
        (800.0, -800.0): [0, 2],
        (-np.inf, 0.0): [2, 4 / 3],
        (np.inf, np.nan): [np.nan, np.nan],
    }
    for given_sinks, want in sinks.items():
        y = run({**slots, "sinks": np.array(given_sinks, np.float32)}, **attrs())
        np.testing.assert_allclose(y[0, :, 0], want, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("ids", [[[0, 5], [1, 2], [3, 4]], [[0, -2], [7, 2], [3, 4]], [[-9, 0], [0, 0], [0, 0]]])
def test_ids_out_of_range_are_refused_as_by_the_reference(ids: list[list[int]]) -> None:
    slots = {"q": np.ones((3, 2, 4), np.float32), "k0": np.ones((5, 1, 4), np.float32), "ids0": np.array(ids, np.int32)}
    said = []
    for backend in ("reference", "cpu"):
        with pytest.raises(InputError) as error:
            runner(flash_attn, backend)(slots, **attrs())
        said.append(str(error.value))
    assert said[0] == said[1]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([1, 2, 4, 8, 16]), lanes=st.sampled_from([4, 8, 16]))
def test_lane_sums(seed: int, n: int, lanes: int) -> None:
    n = min(n, lanes)
    k = Kernel(find_target("baseline"))
    vectors = [k.load(k.args + i * lanes * 4, F32.x(lanes)) for i in range(n)]
    k.store(lane_sums(k, vectors), k.args + n * lanes * 4)
    x: Array = np.random.default_rng(seed).integers(-9, 10, (n + 1, lanes)).astype(np.float32)
    jit = Jit(find_target("baseline"), None)
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_bool)(jit.compile([k.text()])[0])
    kernel(x.ctypes.data, 0, 0, 1, True)
    np.testing.assert_array_equal(x[n, :n], x[:n].sum(1))
