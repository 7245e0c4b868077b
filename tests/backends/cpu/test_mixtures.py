"""Mixtures of experts as the CPU joins them: which nodes, and the results of node by node, by a few tokens and by many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.ops import add_id, geglu, mul_mat, mul_mat_id, sum_rows, swiglu, swiglu_oai
from tests.backends.cpu.emulated import emulation
from tests.backends.cpu.products import weights
from tests.backends.cpu.test_products import OTHERS

Array = np.ndarray[Any, Any]
T = Dim("T", max=256)
OAI = partial(swiglu_oai, alpha=1.702, limit=7.0)


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    with emulation():
        yield


@dataclass(frozen=True)
class Shape:
    """Sizes of a mixture: experts, those of a token, channels of x, of units and of the result."""

    n_experts: int = 20
    n_used: int = 3
    width: int = 64
    size: int = 96
    height: int = 48


@dataclass
class Mixture:
    """The nodes of a mixture of experts in plain ops, and the arrays of its constants."""

    shape: Shape
    types: tuple[str, str, str] = ("f32", "f32", "f32")
    unit: Callable[..., Node] = swiglu
    biases: bool = False

    def __post_init__(self) -> None:
        s, self.arrays = self.shape, dict[str, Array]()
        self.x, self.ids = input("x", (T, s.width)), input("ids", (T, s.n_used), "i32")
        self.w = input("w", (T, s.n_used))
        self.gate, self.up = (self.product(name, self.x.reshape(T, 1, s.width), s.size, s.width) for name in ("gate", "up"))
        self.hidden = self.unit(self.gate, self.up)
        self.down = self.product("down", self.hidden, s.height, s.size)
        self.weighed = self.down * self.w.reshape(T, s.n_used, 1)
        self.y = sum_rows(self.weighed.permute(0, 2, 1)).reshape(T, s.height)

    def product(self, name: str, rows: Node, height: int, width: int) -> Node:
        kind, n = self.types[("gate", "up", "down").index(name)], self.shape.n_experts
        self.arrays[name] = weights(kind, n, height, width)[0]
        y = mul_mat_id(constant(name, shape=(n, height, width), dtype=kind), rows, self.ids)
        if not self.biases:
            return y
        self.arrays[f"{name}_bias"] = np.random.default_rng(height).standard_normal((n, height)).astype(np.float32)
        return add_id(y, constant(f"{name}_bias", shape=(n, height)), self.ids)

    def inputs(self, n_tokens: int, ids: Array | None = None, seed: int = 0) -> dict[str, Array]:
        """Rows, weights and, unless they are given, experts of each token, none of them twice."""
        s, rng = self.shape, np.random.default_rng(seed)
        if ids is None:
            ids = np.argsort(rng.random((n_tokens, s.n_experts)), axis=1)[:, : s.n_used]
        x, w = rng.standard_normal((n_tokens, s.width)), rng.random((n_tokens, s.n_used))
        return {"x": x.astype(np.float32), "ids": ids.astype(np.int32), "w": w.astype(np.float32)}

    @property
    def ops(self) -> list[str]:
        """Of the nodes that are to be computed together, views left out."""
        biases = ["add_id"] * (3 * self.biases)
        return sorted(["mul_mat_id", "mul_mat_id", "mul_mat_id", *biases, self.hidden.op, "mul", "sum_rows"])


def joined(*outputs: Node, weight: str = "down") -> list[str]:
    """The ops, views left out, of the nodes that are computed together with the product of a weight."""
    plan = compile(Graph({f"y{i}": node for i, node in enumerate(outputs)}), "cpu")
    groups = [group.nodes for split in plan.groups for group in split]
    (found,) = [g for g in groups if any(i.op == "constant" and i.attrs["name"] == weight for n in g for i in n.inputs)]
    return sorted(n.op for n in found if n.op != "view")


def run(m: Mixture, y: Node, given: dict[str, Array], backend: Any = "cpu", **options: bool) -> Array:
    step = compile(Graph(y=y), backend, CompileOptions(**options)).bind(m.arrays)
    return step.run({name: given[name] for name in step.plan.graph.inputs})["y"]


def nmse(got: Array, wanted: Array) -> float:
    error, size = got.astype(np.float64) - wanted, wanted.astype(np.float64)
    return float(np.sum(error * error) / max(np.sum(size * size), 1e-30))


def assert_same(m: Mixture, y: Node, given: dict[str, Array], backend: str = "cpu", *, exact: bool = False) -> None:
    """Fused, node by node and as the reference computes. Where units are rounded, a last bit may move one to a neighbour."""
    fused, plain = (run(m, y, given, backend, exact=exact, fuse=fuse) for fuse in (True, False))
    rounded = [as_dtype(kind).is_block and not exact for kind in m.types]
    assert fused.shape == plain.shape and fused.dtype == np.float32
    assert nmse(fused, plain) <= (1e-6 if rounded[2] else 1e-12)
    assert nmse(fused, run(m, y, given, "reference")) <= (3e-4 if any(rounded) else 1e-12)


COUNTS = (1, 2, 4, 5, 17, 130)
TYPES = [("f32", "f32", "f32"), ("q4_k", "q4_k", "q8_0"), ("q8_0", "q8_0", "f16"), ("f16", "f16", "q4_0")]


@pytest.mark.parametrize("types", TYPES)
def test_types(types: tuple[str, str, str]) -> None:
    """By tokens: one, those of which sums are made where products are, and more; pieces of few rows and of many."""
    m = Mixture(Shape(width=256 if "q4_k" in types else 64), types)
    for n_tokens in COUNTS:
        assert_same(m, m.y, m.inputs(n_tokens))


@pytest.mark.parametrize("backend", OTHERS)
def test_targets(backend: str) -> None:
    m = Mixture(Shape(), ("q4_0", "q4_0", "q8_0"))
    for n_tokens in (1, 4, 17, 130):
        assert_same(m, m.y, m.inputs(n_tokens), backend)


def test_exactly() -> None:
    m = Mixture(Shape(), ("q4_0", "q4_0", "q8_0"))
    for n_tokens in COUNTS:
        assert_same(m, m.y, m.inputs(n_tokens), exact=True)


@pytest.mark.parametrize("unit", [OAI, swiglu, partial(geglu, swapped=True)], ids=["swiglu_oai", "swiglu", "swapped"])
def test_units_and_biases(unit: Callable[..., Node]) -> None:
    """And last tiles that are not whole."""
    m = Mixture(Shape(5, 2, 50, 41, 37), unit=unit, biases=True)
    assert joined(m.y) == m.ops
    for n_tokens in (1, 3, 5, 40):
        assert_same(m, m.y, m.inputs(n_tokens))


@pytest.mark.parametrize("n_added", [1, 2, 3])
def test_what_is_added(n_added: int) -> None:
    """Up to two values, on either side, belong to the mixture."""
    m, sums = Mixture(Shape()), list[Node]()
    given = m.inputs(17)
    for i in range(n_added):
        name = f"more{i}"
        given[name] = np.random.default_rng(i).standard_normal((17, m.shape.height)).astype(np.float32)
        other, before = input(name, (T, m.shape.height)), sums[-1] if sums else m.y
        sums.append(before + other if i % 2 else other + before)
    y = sums[-1]
    assert joined(y) == sorted([*m.ops, *["add"] * min(n_added, 2)])
    assert_same(m, y, given)
    assert_same(m, y, {name: array[:3] for name, array in given.items()})


def test_a_shared_expert_and_a_residual() -> None:
    """As DeepSeek's layers end."""
    m = Mixture(Shape(width=48))
    m.arrays["shared"] = weights("f32", 48, 48)[0]
    shared = mul_mat(constant("shared", shape=(48, 48)), m.x)
    y = m.x + (m.y + shared)
    assert joined(y) == sorted([*m.ops, "add", "add"]) and joined(y, weight="shared") == ["mul_mat"]
    for n_tokens in (2, 17):
        assert_same(m, y, m.inputs(n_tokens))


@pytest.mark.parametrize("types", [("f32", "f32", "f32"), ("q4_0", "q4_0", "q4_0")])
def test_experts_that_nobody_or_everybody_chose(types: tuple[str, str, str]) -> None:
    """One for all tokens takes several pieces; the one that is none adds nothing, whatever its weight."""
    m = Mixture(Shape(), types, biases=True)
    for n_tokens in (1, 4, 5, 140):
        rng = np.random.default_rng(n_tokens)
        same = np.tile([7, 0, 19], (n_tokens, 1))
        few = rng.integers(3, 5, (n_tokens, 3))
        some = rng.integers(-1, 20, (n_tokens, 3))
        some[n_tokens // 2] = -1
        for ids in (same, few, some):
            given = m.inputs(n_tokens, ids)
            assert_same(m, m.y, given)
        assert not run(m, m.y, given)[n_tokens // 2].any()
    assert run(m, m.y, m.inputs(0)).shape == (0, 48)


def test_one_expert_of_a_token() -> None:
    m = Mixture(Shape(n_used=1))
    assert joined(m.y) == m.ops
    for n_tokens in (1, 9):
        assert_same(m, m.y, m.inputs(n_tokens))


@pytest.mark.parametrize("n_tokens", [2, 20])
def test_wrong_ids(n_tokens: int) -> None:
    m = Mixture(Shape())
    given = m.inputs(n_tokens)
    for wrong in (-2, 20, 2**31 - 1):
        given["ids"][n_tokens - 1, 1] = wrong
        with pytest.raises(InputError, match=rf"\[mul_mat_id\] ids must be below 20, or -1 for none; got {wrong}$"):
            run(m, m.y, given)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    m = Mixture(Shape(height=400), ("q4_0", "q4_0", "q8_0"))
    for n_tokens in (1, 4, 30):
        found = []
        for threads in (1, 2, 5):
            device = CpuDevice("cpu")
            device.set_threads(threads)
            found.append(run(m, m.y, m.inputs(n_tokens), device))
        for other in found[1:]:
            np.testing.assert_array_equal(found[0].view(np.uint32), other.view(np.uint32))


def test_what_is_wanted_otherwise_is_computed() -> None:
    """A value that is an output, or that another node reads, and a sum of another kind: node by node, and right."""
    m = Mixture(Shape())
    for inner in (m.gate, m.hidden, m.down, m.weighed):
        for other in (inner, inner * 2.0):
            assert joined(m.y, other) == ["mul_mat_id"]
    for y in (sum_rows(m.weighed), m.weighed, sum_rows(m.down.permute(0, 2, 1)), sum_rows(m.weighed.permute(1, 2, 0))):
        assert joined(y) == ["mul_mat_id"]


def test_products_that_do_not_belong_together() -> None:
    """Units of other experts' rows, of rows of each expert's own, and of weights that lie otherwise."""
    m, s = Mixture(Shape()), Shape()
    other = input("other", (T, s.n_used), "i32")
    up, down = (constant(f"{name}2", shape=shape) for name, shape in (("up", (20, 96, 64)), ("down", (20, 48, 96))))
    own = input("own", (T, s.n_used, s.width))
    rows = m.x.reshape(T, 1, s.width)
    quantised = constant("gate2", shape=(20, 96, 64), dtype="q8_0")
    for unit, ids in (
        (swiglu(m.gate, mul_mat_id(up, rows, other)), m.ids),
        (swiglu(mul_mat_id(up, own, m.ids), m.gate), m.ids),
        (swiglu(mul_mat_id(quantised, rows, m.ids), m.gate), m.ids),
        (swiglu(mul_mat_id(input("a", (20, 96, 64)), rows, m.ids), m.gate), m.ids),
        (m.hidden, other),
    ):
        product = mul_mat_id(down, unit, ids)
        y = sum_rows((product * m.w.reshape(T, 3, 1)).permute(0, 2, 1))
        assert joined(y, weight="down2") == ["mul_mat_id"]


def test_a_swapped_unit_of_two_products_of_one_matrix_each() -> None:
    x, rng = input("x", (T, 64)), np.random.default_rng(0)
    arrays = {name: rng.standard_normal((32, 64)).astype(np.float32) for name in "ab"}
    a, b = (mul_mat(constant(name, shape=(32, 64)), x) for name in "ab")
    given = {"x": rng.standard_normal((9, 64)).astype(np.float32)}
    for swapped in (False, True):
        graph = Graph(y=swiglu(a, b, swapped=swapped))
        fused, wanted = (compile(graph, backend).bind(arrays).run(given)["y"] for backend in ("cpu", "reference"))
        assert nmse(fused, wanted) <= 1e-12
