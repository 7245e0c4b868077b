"""flash_attn on kernels of CUDA's, run by the host, against the reference in float64: in tiles of tensor cores and in f32.

Bounds. In f32 (`exact`) logits of up to ten or so are wrong by some 2^-24 of their terms' sum, weights by as much of themselves,
and so results by 1e-5 of the largest value. Tensor cores multiply exactly and sum in f32, but weights are rounded to `UNIT` of
themselves, which moves a mean of values by at most `UNIT` of the largest. Queries, and what is held in f32, are chosen here so
that rounding them to the same type changes nothing, but in the test of what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.launches import Template
from tensorgraph.backends.cuda.program import Program
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim, Extent
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, Node, input
from tensorgraph.ops.attention import Segment, flash_attn, flash_attn_cuda
from tensorgraph.ops.attention.visibility import visible
from tensorgraph.ops.select import top_k
from tensorgraph.plan import Executable
from tests.backends.cuda import where

Array = NDArray[Any]
pytestmark = pytest.mark.usefixtures("machine")
UNIT = {"f16": 2.0**-11, "f32": 2.0**-11, "bf16": 2.0**-9}
EXACT = 1e-5
TOKENS = (0, 1, 2, 5, 9, 17, 40)
ROWS = (0, 1, 15, 16, 17, 33, 64, 65, 129)


@dataclass(frozen=True)
class Part:
    """A segment: what its rows have, and which of them are seen. `mask`: none, one for all heads (2 axes) or for each (3)."""

    window: int | None = None
    every: int = 1
    causal: bool = True
    own: bool = True
    n_ids: int = 0
    mask: int = 0


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    d_k: int
    d_v: int
    dtype: str
    parts: tuple[Part, ...] = (Part(),)
    q: str = "f32"
    pos: str = "i32"  # empty for none
    seq: str = "i32"
    sinks: bool = False
    softcap: float = 0.0

    @property
    def scale(self) -> float:
        return self.d_k**-0.5

    def node(self) -> Node:
        tokens, segments = Dim("T", 70), []
        for i, part in enumerate(self.parts):
            n = Dim(f"S{i}", 2200)

            def of(name: str, shape: Sequence[Extent], dtype: str, wanted: bool, i: int = i) -> Node | None:
                return input(f"{name}{i}", tuple(shape), dtype) if wanted else None

            k, v = input(f"k{i}", (n, self.kv_heads, self.d_k), self.dtype), (n, self.kv_heads, self.d_v)
            mask = ((self.heads,) if part.mask == 3 else ()) + (tokens, n)
            more = {"v": of("v", v, self.dtype, part.own), "mask": of("mask", mask, "f16", part.mask > 0)}
            more |= {"pos": of("pos", (n,), self.pos, bool(self.pos)), "seq": of("seq", (n,), self.seq, bool(self.seq))}
            more["ids"] = of("ids", (tokens, part.n_ids), "i32", part.n_ids > 0)
            segments.append(Segment(k, window=part.window, every=part.every, causal=part.causal, **more))
        at = {name: input(name, (tokens,), dtype) for name, dtype in (("pos", self.pos), ("seq", self.seq)) if dtype}
        sinks = input("sinks", (self.heads,)) if self.sinks else None
        q = input("q", (tokens, self.heads, self.d_k), self.q)
        return flash_attn(q, *segments, scale=self.scale, softcap=self.softcap, sinks=sinks, d_v=self.d_v, **at)

    def slots(self, rng: np.random.Generator, n_tokens: int, n_rows: Sequence[int]) -> dict[str, Array]:
        """Sequences mixed in any order; of each, rows at positions from 0 on."""

        def numbers(*shape: int) -> Array:
            return rounded(rng.standard_normal(shape), self.dtype)

        slots = {"q": (numbers(n_tokens, self.heads, self.d_k) * 2).astype(as_dtype(self.q).numpy)}
        if self.sinks:
            slots["sinks"] = numbers(self.heads).astype(np.float32)
        n_seq = int(rng.integers(1, 4))
        if self.pos:
            slots["pos"] = np.sort(rng.integers(0, max(n_rows, default=0) + 2, n_tokens)).astype(self.pos.replace("i", "int"))
        if self.seq:
            slots["seq"] = rng.integers(0, n_seq, n_tokens).astype(self.seq.replace("i", "int"))
        for i, (part, n) in enumerate(zip(self.parts, n_rows, strict=True)):
            slots[f"k{i}"] = numbers(n, self.kv_heads, self.d_k).astype(as_dtype(self.dtype).numpy)
            if part.own:
                slots[f"v{i}"] = numbers(n, self.kv_heads, self.d_v).astype(as_dtype(self.dtype).numpy)
            seq = np.sort(rng.integers(0, n_seq, n)) if rng.random() < 0.5 else rng.integers(0, n_seq, n)
            if self.seq:
                slots[f"seq{i}"] = seq.astype(self.seq.replace("i", "int"))
            if self.pos:
                pos = np.array([np.sum(seq[:j] == s) for j, s in enumerate(seq)], int)
                slots[f"pos{i}"] = pos.astype(self.pos.replace("i", "int"))
            if part.n_ids:
                slots[f"ids{i}"] = rng.integers(-1, n, (n_tokens, part.n_ids)).astype(np.int32)
            if part.mask:
                shape = ((self.heads,) if part.mask == 3 else ()) + (n_tokens, n)
                slots[f"mask{i}"] = np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape)).astype(np.float16)
        return slots


def rounded(x: Array, dtype: str) -> Array:
    """Numbers that are the same in f32, tf32 and f16, or in bf16."""
    return x.astype(ml_dtypes.bfloat16 if dtype == "bf16" else np.float16).astype(np.float32)


@cache
def device() -> CudaDevice:
    return where.device()


def executable(graph: Graph, exact: bool) -> Executable:
    return compile(graph, device(), CompileOptions(fuse=False, exact=exact)).bind()


@cache
def executables(case: Case) -> dict[bool, Executable]:
    return {exact: executable(Graph(y=case.node()), exact) for exact in (False, True)}


def launched(run: Executable, **dims: int) -> list[str]:
    """The functions of a step's launches."""
    calls = [call for groups in run.plan.groups for group in groups for call in getattr(group, "calls", ())]
    return [call.emit.function.partition("<")[0] for call in calls if call.guard.holds(dims)]


def reference(case: Case, slots: Mapping[str, Array]) -> Array:
    node = case.node()
    wide = {slot: x.astype(np.float64) if as_dtype(x.dtype).is_float else x for slot, x in slots.items()}
    found: Array = flash_attn.compute(wide, dict(node.attrs))
    return found


def largest(case: Case, slots: Mapping[str, Array]) -> float:
    values = [slots.get(f"v{i}", slots[f"k{i}"][..., : case.d_v]) for i in range(len(case.parts))]
    return max((float(np.nanmax(np.abs(np.where(np.isfinite(x), x, 0)), initial=0)) for x in map(np.float64, values)), default=0)


def check(case: Case, slots: dict[str, Array], schedules: Sequence[int] = (0, 1), kinds: Sequence[bool] = (False, True)) -> None:
    """In both ways, in several orders of a block's threads, which must not change a bit."""
    wanted, most = reference(case, slots), largest(case, slots)
    for exact in kinds:
        found = []
        for schedule in schedules:
            device().set_threads(schedule)
            found.append(executables(case)[exact].run(slots)["y"])
        assert all(y.tobytes() == found[0].tobytes() for y in found)
        bound = (EXACT if exact else UNIT[case.dtype] + EXACT) * most
        np.testing.assert_allclose(found[0], wanted, rtol=0, atol=bound, err_msg=f"{exact=}")


CASES = {
    "groups of three": Case(9, 3, 64, 64, "f16", sinks=True),
    "heads alone": Case(4, 4, 40, 24, "bf16", (Part(window=20),), q="bf16", pos="i64", softcap=3.0),
    "latents": Case(20, 1, 72, 64, "f16", (Part(own=False),)),
    "lists": Case(6, 1, 80, 64, "f16", (Part(own=False, n_ids=37),), sinks=True),
    "masks": Case(4, 2, 33, 17, "f16", (Part(mask=3), Part(mask=2)), pos="", seq=""),
    "segments": Case(
        *(12, 2, 48, 48, "f32"), (Part(window=9, own=False), Part(every=4, n_ids=9, mask=2), Part(causal=False)), sinks=True
    ),
    "texts": Case(3, 3, 32, 32, "f32", (Part(causal=False),), pos="", q="f16"),
}


@settings(deadline=None, max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("name", CASES)
def test_flash_attn(name: str, data: st.DataObject) -> None:
    """Any lengths; rows that no token sees hold anything."""
    case, draw = CASES[name], data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = case.slots(rng, draw(st.sampled_from(TOKENS)), [draw(st.sampled_from(ROWS)) for _ in case.parts])
    if draw(st.booleans()):
        spoil(case, slots, draw(st.sampled_from((np.inf, np.nan))))
    check(case, slots)


def spoil(case: Case, slots: dict[str, Array], bad: float) -> None:
    """Write a number to the rows that no token sees."""
    for i, part in enumerate(case.parts):
        n_tokens, n = len(slots["q"]), len(slots[f"k{i}"])
        at = [slots.get(name) for name in ("pos", "seq", f"pos{i}", f"seq{i}")]
        found = visible(*at, every=part.every, window=part.window, causal=part.causal)
        seen = np.ones((n_tokens, n), bool) if found is None else found
        if part.n_ids:
            seen = seen & (slots[f"ids{i}"][:, :, None] == np.arange(n)).any(1)
        if part.mask:
            shown = slots[f"mask{i}"] > -np.inf
            seen = seen & (shown if part.mask == 2 else shown.any(0))
        for slot in (f"k{i}", f"v{i}"):
            if slot in slots:
                slots[slot][~seen.any(0)] = bad


@pytest.mark.parametrize("name", ["groups of three", "segments", "lists"])
def test_without_splits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more tiles than blocks to divide rows among."""
    monkeypatch.setattr(flash_attn_cuda, "BLOCKS", (1, 1))
    case = replace(CASES[name], softcap=7.0)
    for n_tokens in (3, 12):
        check(case, case.slots(np.random.default_rng(n_tokens), n_tokens, [65] * len(case.parts)), schedules=(0, 1, 2))
    assert all("combine" not in launched(run, T=1, S0=1, S1=1, S2=1) for run in executables(case).values())


@pytest.mark.parametrize("n_tokens", [1, 3, 30])
def test_every_length(n_tokens: int) -> None:
    """Where rows end in a tile, and where splits do."""
    rng = np.random.default_rng(n_tokens)
    for n in ROWS:
        check(CASES["groups of three"], CASES["groups of three"].slots(rng, n_tokens, [n]), schedules=(2,))


LATENT = Case(18, 1, 576, 512, "f16", (Part(own=False, n_ids=45),))
WIDE = {
    "latents": Case(16, 1, 576, 512, "f16", (Part(own=False),)),
    "latents of many heads": Case(40, 1, 576, 512, "bf16", (Part(own=False),), sinks=True),
    "lists of latents": LATENT,
    "wide heads": Case(4, 1, 256, 256, "f16", (Part(window=40),), softcap=9.0),
    "expanded latents": Case(2, 2, 192, 128, "f32"),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_rows(name: str) -> None:
    rng = np.random.default_rng(7)
    for n_tokens, n in ((1, 70), (11, 33)):
        kinds = (False, True) if n_tokens == 1 else (False,)
        check(WIDE[name], WIDE[name].slots(rng, n_tokens, [n]), schedules=(3,), kinds=kinds)


def test_a_row_that_is_not_finite_counts_for_those_that_see_it() -> None:
    case = CASES["groups of three"]
    for n in (5, 30):
        slots = case.slots(np.random.default_rng(n), n, [n])
        slots |= {"pos": np.arange(n, dtype=np.int32), "pos0": np.arange(n, dtype=np.int32)}
        slots |= {"seq": np.zeros(n, np.int32), "seq0": np.zeros(n, np.int32)}
        check(case, slots)
        slots["v0"][n // 2] = np.inf
        with np.errstate(invalid="ignore"):
            wanted = reference(case, slots)
        for run in executables(case).values():
            y = run.run(slots)["y"]
            np.testing.assert_allclose(y, wanted, rtol=0, atol=(UNIT["f16"] + EXACT) * largest(case, slots))
            assert np.isfinite(y[: n // 2]).all() and np.isinf(y[n // 2 :]).all()
        slots["k0"][n // 2] = np.nan
        for run in executables(case).values():
            y = run.run(slots)["y"]
            assert np.isfinite(y[: n // 2]).all() and np.isnan(y[n // 2 :]).all()


@pytest.mark.parametrize("name", ["groups of three", "texts"])
def test_what_rounding_queries_costs(name: str) -> None:
    """Every term of a logit may be wrong by a unit for each factor that is rounded, and a weight by e to the power of that."""
    case, rng = CASES[name], np.random.default_rng(3)
    for n_tokens, size in ((2, 1.0), (20, 1.0), (2, 1e5)):  # large queries, which f16 has no room for, of small keys
        slots = case.slots(rng, n_tokens, [65])
        slots["k0"] = (slots["k0"].astype(float) / size).astype(slots["k0"].dtype)
        q = rng.standard_normal(slots["q"].shape) * size
        slots["q"] = q.astype(np.float32) if case.q == "f32" else slots["q"]
        terms = np.einsum("thd,skd->thsk", np.abs(slots["q"].astype(float)), np.abs(slots["k0"].astype(float)))
        lost = UNIT[case.dtype] * (2 if case.dtype == "f32" else 1) * case.scale * float(terms.max())
        bound = 2 * (np.expm1(2 * lost) + UNIT[case.dtype]) * largest(case, slots)
        np.testing.assert_allclose(executables(case)[False].run(slots)["y"], reference(case, slots), rtol=0, atol=bound)


# Lists.


def test_a_row_that_is_listed_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LATENT
    slots = case.slots(np.random.default_rng(1), 3, [50])
    slots["ids0"] = np.repeat(np.arange(-1, 44, dtype=np.int32)[None, ::3], 3, 0).repeat(3, 1)
    check(case, slots, schedules=(0, 1, 2), kinds=(False,))
    monkeypatch.setattr(flash_attn_cuda, "IN_SHARED", 4)  # their tables are in global memory
    case = Case(6, 1, 80, 64, "f16", (Part(own=False, n_ids=38),))
    slots = case.slots(np.random.default_rng(2), 3, [7])
    check(case, slots, schedules=(0, 1, 2), kinds=(False,))


@pytest.mark.parametrize("exact", [False, True])
def test_ids_out_of_range(exact: bool) -> None:
    case = CASES["lists"]
    slots = case.slots(np.random.default_rng(1), 8, [8])
    for bad, got in ((8, "-1 to 8"), (-2, "-2 to 7"), (1 << 30, "-1 to 1073741824")):
        slots["ids0"] = np.full((8, 37), -1, np.int32)
        slots["ids0"][3, 7], slots["ids0"][7, 23] = 7, bad
        with pytest.raises(InputError, match=rf"\[flash_attn\] ids0 must be below 8, or -1 for none; got {got}$"):
            executables(case)[exact].run(slots)


def test_what_selects_rows_lists_none_twice() -> None:
    """Then nothing puts lists in order; and what many heads read is put together by a launch of its own, what few read is not."""
    tokens, n = Dim("T", 600), Dim("S", 500)
    ids = top_k(input("scores", (tokens, n)), k=20)
    k = input("k", (n, 1, 80), "f16")
    run = executable(Graph(y=flash_attn(input("q", (tokens, 20, 80)), Segment(k, ids=ids), scale=0.1, d_v=64)), False)
    assert launched(run, T=1, S=9)[-2:] == ["flash_attn_tiles", "combine"] and "listed_rows" not in launched(run, T=1, S=9)
    assert launched(run, T=600, S=9)[-1] == "flash_attn_tiles"
    assert launched(executables(CASES["lists"])[False], T=1, S0=9) == ["listed_rows", "flash_attn_tiles"]
    for n_tokens in (1, 4, flash_attn_cuda.FEW):
        assert launched(executables(CASES["heads alone"])[False], T=n_tokens, S0=9) == ["flash_attn_tiles"]
        assert launched(executables(CASES["heads alone"])[True], T=n_tokens, S0=9) == ["flash_attn"]
    assert launched(executables(CASES["heads alone"])[False], T=9, S0=9) == ["flash_attn_tiles", "combine"]
    assert launched(executables(WIDE["latents"])[False], T=1, S0=9) == ["flash_attn_tiles", "combine"]


MANY_SPLITS = {
    "groups": Case(6, 2, 64, 64, "f16", sinks=True),
    "wide heads": Case(2, 1, 128, 128, "bf16", (Part(causal=False),), softcap=5.0),
    "odd widths": Case(3, 3, 33, 17, "f16", (Part(window=700),)),
    "lists": Case(6, 1, 80, 64, "f16", (Part(own=False, n_ids=1500),)),
}


@pytest.mark.parametrize("name", MANY_SPLITS)
def test_the_last_block_puts_all_splits_together(name: str) -> None:
    """Of one token and of a few, whichever block is last; counters are left as they were."""
    case = MANY_SPLITS[name]
    for n_tokens in (1, 4):
        slots = case.slots(np.random.default_rng(n_tokens), n_tokens, [2100])
        check(case, slots, schedules=(0, 1, 2, 3, 4))
    for run in executables(case).values():
        assert "combine" not in launched(run, T=4, S0=2100)
        for program in programs(run):
            at = program.mirror.memory.address + program._at["counters"]
            most = max(call.emit.counters for call in program.calls if isinstance(call.emit, Template))
            (counters,) = device().runtime.read([(at, 4 * most)])
            assert most and not counters.any()


def programs(run: Executable) -> list[Program]:
    """Of a step that has run."""
    found = [compute for made in run._programs.values() for _, compute, *_ in made]
    return [program for program in found if isinstance(program, Program)]
