"""Row programs: the bits of node by node, the reference's values, and which nodes are joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.kernel import Call
from tensorgraph.backends.cpu.row_programs import emit_row_program
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import ALWAYS, Dim
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, Node, choose, constant, input
from tensorgraph.models.experts import route, weigh
from tensorgraph.ops import (
    argsort,
    concat,
    cumsum,
    fill,
    fwht,
    gather,
    l2_norm,
    mul_mat,
    rms_norm,
    rope,
    scatter,
    sigmoid,
    silu,
    soft_max,
    sum_rows,
    top_k,
)

Array = np.ndarray[Any, Any]
T = Dim("T", 300)
BACKENDS = ["cpu", "cpu:avx2", "cpu:baseline"]


class Noted(CpuDevice):
    """The CPU, and the calls of its last plan."""

    calls: Sequence[Call] = ()

    def groups(self, nodes: Sequence[Node], graph: Graph, options: Any) -> Any:
        found = super().groups(nodes, graph, options)
        self.calls = [call for group in found for call in getattr(group, "calls", ())]
        return found


def programs(graph: Graph) -> list[list[str]]:
    """The ops of each row program."""
    device = Noted("cpu")
    compile(graph, device)
    return [[node.op for node in call.nodes] for call in device.calls if call.emit is emit_row_program]


def run(graph: Graph, arrays: Mapping[str, Array], backend: Any, *, fuse: bool = True) -> dict[str, Array]:
    plan = compile(graph, backend, CompileOptions(fuse=fuse))
    n_rows = len(next(iter(arrays.values())))
    given = {name: x for name, x in arrays.items() if name in plan.graph.inputs}
    return plan.bind(arrays.__getitem__).run(given, dims={"T": n_rows})


def assert_same(graph: Graph, arrays: Mapping[str, Array], backend: str = "cpu") -> dict[str, Array]:
    """The bits of node by node, and the reference's values."""
    got, alone, exact = run(graph, arrays, backend), run(graph, arrays, backend, fuse=False), run(graph, arrays, "reference")
    for name, value in got.items():
        np.testing.assert_array_equal(value, alone[name])
        np.testing.assert_allclose(value, exact[name], rtol=0, atol=2e-5 * max(1.0, float(np.abs(exact[name]).max(initial=0))))
    return got


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(
    n=st.sampled_from([0, 1, 2, 7, 300]),
    n_group=st.sampled_from([1, 2, 8]),
    each=st.sampled_from([2, 3, 20]),
    k=st.integers(1, 4),
    scoring=st.sampled_from([sigmoid, soft_max]),
    biased=st.booleans(),
    normalise=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_a_router_is_one_program(
    n: int, n_group: int, each: int, k: int, scoring: Any, biased: bool, normalise: bool, backend: str
) -> None:
    """Any scoring, groups, bias, normalisation and factor."""
    experts = n_group * each
    scores = scoring(input("logits", (T, experts)))
    bias = constant("bias", shape=(experts,)) if biased else None
    k = min(k, experts // n_group)
    ids = route(scores, bias, k, n_group=n_group, topk_group=max(1, n_group // 2), group_top=2)
    graph = Graph(ids=ids, w=weigh(scores, ids, normalise=normalise, scale=2.5))
    (found,) = programs(graph)
    assert found.count("top_k") == (3 if n_group > 1 else 1) and found[0] == scoring.name
    plan = compile(graph, backend)
    weights = {"bias": numbers(experts, seed=1)}
    arrays = {"logits": np.round(numbers(n, experts), 1)}  # ties
    got = plan.bind(weights.__getitem__).run(arrays)
    alone = compile(graph, backend, CompileOptions(fuse=False)).bind(weights.__getitem__).run(arrays)
    exact = compile(graph, "reference").bind(weights.__getitem__).run(arrays)
    for name, value in got.items():
        np.testing.assert_array_equal(value, alone[name])
    np.testing.assert_array_equal(got["ids"], exact["ids"])
    np.testing.assert_allclose(got["w"], exact["w"], rtol=1e-5)


def grown(draw: Any) -> tuple[Graph, dict[str, Array]]:
    """A random graph of rows: vectors and small matrices, views of them, and outputs among what was computed."""
    x, z, w = input("x", (T, 24)), input("z", (T, 3, 8)), constant("w", shape=(40, 24))
    values: list[Node] = [x, z, fill(shape=(T, 24), value=0.5), x[:, 4:16], x.reshape(T, 4, 6).permute(0, 2, 1)]
    values += [x[:, 3], sum_rows(x).reshape(T), w[7].broadcast(T, 24), mul_mat(w[:9], x)]
    computed: list[Node] = []
    for _ in range(draw(st.integers(2, 14))):
        a = draw(st.sampled_from(values))
        same = [v for v in values if v.shape == a.shape]
        b = draw(st.sampled_from(same))
        made = draw(
            st.sampled_from(
                [
                    lambda a, b: a + b,
                    lambda a, b: a * b,
                    lambda a, b: silu(a),
                    lambda a, b: soft_max(a),
                    lambda a, b: l2_norm(a, eps=1e-3),
                    lambda a, b: rms_norm(a, eps=1e-3),
                    lambda a, b: a / (sum_rows(sigmoid(b)) + 1.0) if a.ndim > 1 else sigmoid(b),
                    lambda a, b: concat(a, b, axis=-1) if a.ndim > 1 else a + 1.0,
                    lambda a, b: concat(a, b, axis=min(1, a.ndim - 1)) if a.ndim > 1 else a * 3.0,
                    lambda a, b: gather(a, top_k(b, k=3)) if a.ndim > 1 else cumsum(a),
                    lambda a, b: scatter(a, top_k(b, k=2), gather(b, top_k(a, k=2))) if a.ndim > 1 else soft_max(a),
                    lambda a, b: cumsum(a),
                    lambda a, b: gather(b, argsort(a)),
                    lambda a, b: (a + b).cast("f16").cast("f32"),
                ]
            )
        )(a, b)
        computed.append(made)
        wide = made.shape[1:]
        values.append(made)
        if len(wide) == 2:
            values += [made.permute(0, 2, 1), made[:, min(1, wide[0]) :], made.reshape(T, -1)]
        elif wide and isinstance(wide[0], int) and wide[0] % 2 == 0:
            values += [made.reshape(T, 2, -1), made[:, : wide[0] // 2]]
        values = [v for v in values if v.shape[:1] == (T,) and all(isinstance(n, int) and n <= 100 for n in v.shape[1:])]
    chosen = draw(st.lists(st.sampled_from(computed), min_size=1, max_size=3, unique_by=id))
    n = draw(st.sampled_from([0, 1, 2, 33, 300]))
    graph = Graph({f"y{i}": node for i, node in enumerate(dict.fromkeys((*chosen, computed[-1])))})
    return graph, {"x": numbers(n, 24), "z": numbers(n, 3, 8, seed=2), "w": numbers(40, 24, seed=3)}


@settings(deadline=None, max_examples=40)
@given(data=st.data(), backend=st.sampled_from(BACKENDS))
def test_random_rows(data: Any, backend: str) -> None:
    graph, arrays = grown(data.draw)
    got, alone = run(graph, arrays, backend), run(graph, arrays, backend, fuse=False)
    for name, value in got.items():
        np.testing.assert_array_equal(value, alone[name])


def test_norm_rotation_and_transform_of_a_key() -> None:
    """As of an indexer: what comes in between is read by nothing else."""
    key = rope(rms_norm(input("x", (T, 64)), eps=1e-6), input("pos", (T,), "i32"), n_dims=32)
    graph = Graph(y=fwht(key))
    arrays = {"x": numbers(7, 64), "pos": np.arange(7, dtype=np.int32) * 11}
    (found,) = programs(graph)
    assert found[-2:] == ["rotate", "fwht"] and "rms_norm" in found
    assert_same(graph, arrays)


def test_what_others_read_is_stored() -> None:
    x, w = input("x", (T, 16)), input("w", (5, 16))
    probabilities = soft_max(x)
    weighed = probabilities * 2.0
    graph = Graph(y=mul_mat(w, weighed), p=probabilities, s=sum_rows(weighed))
    (found,) = programs(graph)
    assert sorted(found) == ["scale", "soft_max", "sum_rows"]
    assert_same(graph, {"x": numbers(9, 16), "w": numbers(5, 16, seed=3)})


def test_forms_of_a_choice_stay_apart() -> None:
    x = input("x", (T, 16))
    few, many = sum_rows(soft_max(x)) + 1.0, sum_rows(soft_max(x * 2.0))
    graph = Graph(y=choose({"few": (few, T <= 4), "many": (many, ALWAYS)}))
    for n in (1, 4, 5, 60):
        assert_same(graph, {"x": numbers(n, 16)})
    assert len(programs(graph)) == 2


@pytest.mark.parametrize("op", [soft_max, cumsum, argsort, lambda x: l2_norm(x, eps=1e-6), lambda x: rms_norm(x, eps=1e-6)])
def test_along_the_only_axis_rows_mix(op: Any) -> None:
    x = input("x", (T, 16))
    graph = Graph(y=op(x[:, 3]) * 2.0 if op is not argsort else op(x[:, 3]), z=op(sum_rows(x).reshape(T)))
    assert programs(graph) == []
    assert_same(graph, {"x": numbers(9, 16)})


def test_weights_are_left_to_products() -> None:
    """A view of a constant is read as it lies; as one of many rows it would be read for each token."""
    x, w = input("x", (T, 64)), constant("w", shape=(200, 64))
    graph = Graph(y=soft_max(l2_norm(mul_mat(w[:100], x), eps=1e-6)))
    assert programs(graph) == [["l2_norm", "soft_max"]]
    assert_same(graph, {"x": numbers(9, 64), "w": numbers(200, 64)})


def test_rows_that_mix_are_not_joined() -> None:
    """Along the first axis elements of other rows are taken."""
    x, ids = input("x", (T, 16)), input("ids", (T, 16), "i32")
    graph = Graph(y=sum_rows(l2_norm(gather(soft_max(x), ids, axis=0), eps=1e-6)))
    assert programs(graph) == [["l2_norm", "sum_rows"]]
    assert_same(graph, {"x": numbers(9, 16), "ids": np.random.default_rng(1).integers(0, 9, (9, 16)).astype(np.int32)})


def test_bad_input_is_refused_inside_too() -> None:
    x, ids = input("x", (T, 16)), input("ids", (T, 2), "i32")
    graph = Graph(y=sum_rows(gather(soft_max(x), ids)))
    assert programs(graph) == [["soft_max", "gather", "sum_rows"]]
    given = {"x": numbers(9, 16), "ids": np.full((9, 2), 3, np.int32)}
    assert_same(graph, given)
    given["ids"][7, 1] = 16
    for backend in ("cpu", "reference"):
        with pytest.raises(InputError, match="gather"):
            run(graph, given, backend)


def test_alike_blocks_are_written_once() -> None:
    """Programs that differ in what they read alone share their code."""
    x = input("x", (T, 16))
    values = [x]
    for i in range(3):
        values.append(
            mul_mat(input(f"w{i}", (16, 16)), soft_max(values[-1] * (1.0 if i < 2 else 3.0)) + l2_norm(values[-1], eps=1e-6))
        )
    device = Noted("cpu")
    compile(Graph(y=values[-1]), device)
    steps = [call.attrs["steps"] for call in device.calls if call.emit is emit_row_program]
    assert len(steps) == 3 and steps[0] is steps[1] and steps[0] != steps[2]
