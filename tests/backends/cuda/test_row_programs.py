"""Described kernels on CUDA, one by one and joined to row programs: random graphs against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu.row_programs import emit_row_program
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.graph import Graph, constant, input
from tensorgraph.models.experts import route, weigh
from tensorgraph.ops import sigmoid, soft_max
from tests.backends.cpu.test_row_programs import grown, numbers, run
from tests.backends.cuda import where

pytestmark = pytest.mark.usefixtures("machine")
T = Dim("T", 300)


def programs(graph: Graph) -> list[list[str]]:
    """The ops of each row program."""
    plan = compile(graph, where.device())
    calls = [call for split in plan.groups for group in split for call in getattr(group, "calls", ())]
    return [[node.op for node in call.nodes] for call in calls if call.emit is emit_row_program]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_graph_of_rows(data: st.DataObject) -> None:
    graph, arrays = grown(data.draw)
    exact = run(graph, arrays, "reference")
    for fuse in (True, False):
        for name, value in run(graph, arrays, where.NAME, fuse=fuse).items():
            scale = max(1.0, float(np.abs(exact[name]).max(initial=0)))
            np.testing.assert_allclose(value, exact[name], rtol=0, atol=2e-5 * scale)


@settings(deadline=None, max_examples=12)
@given(
    n=st.sampled_from([0, 1, 2, 7, 40]),
    n_group=st.sampled_from([1, 2, 8]),
    each=st.sampled_from([2, 3, 20]),
    k=st.integers(1, 4),
    scoring=st.sampled_from([sigmoid, soft_max]),
    biased=st.booleans(),
)
def test_a_router_is_one_program(n: int, n_group: int, each: int, k: int, scoring: Any, biased: bool) -> None:
    """Its selections too, with ties: of few elements they are descriptions like all else in it."""
    experts = n_group * each
    scores = scoring(input("logits", (T, experts)))
    bias = constant("bias", shape=(experts,)) if biased else None
    ids = route(scores, bias, min(k, each), n_group=n_group, topk_group=max(1, n_group // 2), group_top=2)
    graph = Graph(ids=ids, w=weigh(scores, ids, normalise=True, scale=2.5))
    (found,) = programs(graph)
    assert found.count("top_k") == (3 if n_group > 1 else 1)
    weights = {"bias": numbers(experts, seed=1)}
    arrays = {"logits": np.round(numbers(n, experts), 1)}
    got, exact = (compile(graph, b, CompileOptions()).bind(weights.__getitem__).run(arrays) for b in (where.NAME, "reference"))
    np.testing.assert_array_equal(got["ids"], exact["ids"])
    np.testing.assert_allclose(got["w"], exact["w"], rtol=1e-5)
