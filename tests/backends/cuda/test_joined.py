"""Products that are one launch with what comes before and after them: which are, and the results of node by node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cuda.host import HostDevice
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.ops import geglu, mul_mat, rms_norm, swiglu, swiglu_clamp
from tensorgraph.plan import Plan
from tests.backends.cpu.products import weights
from tests.backends.cpu.test_mixtures import Mixture, Shape

pytestmark = pytest.mark.usefixtures("compiler")
Array = np.ndarray[Any, Any]
T = Dim("T", max=64)
WIDTH, HEIGHT = 64, 96


@pytest.fixture(scope="module")
def device() -> Iterator[HostDevice]:
    yield HostDevice("cuda-host")


def planned(outputs: dict[str, Node], device: HostDevice) -> Plan:
    return compile(Graph(outputs), device, CompileOptions(exact=True))


def joined(plan: Plan) -> list[list[str]]:
    """The ops of each group of several nodes."""
    groups = [sorted(n.op for n in group.nodes if n.op != "view") for split in plan.groups for group in split]
    return sorted(ops for ops in groups if len(ops) > 1)


def assert_same(outputs: dict[str, Node], device: HostDevice, arrays: dict[str, Array], inputs: dict[str, Array]) -> None:
    """As the reference computes them, in sums of another order."""
    plain = compile(Graph(outputs), "reference", CompileOptions(fuse=False)).bind(arrays).run(inputs)
    for name, got in planned(outputs, device).bind(arrays).run(inputs).items():
        np.testing.assert_allclose(got, plain[name], rtol=2e-5, atol=2e-5 * np.abs(plain[name]).max())


MIXED = [
    (("q8_0", "q4_k", "f32"), True),  # both in planes
    (("q8_0", "f16", "q8_0"), False),  # one in planes
    (("f32", "f16", "f32"), False),  # which lanes take four and eight elements of
    (("f16", "bf16", "mxfp4"), True),
]


@pytest.mark.parametrize(("types", "one"), MIXED)
@pytest.mark.parametrize("n_tokens", [1, 3, 9])
def test_mixtures_of_several_types(types: tuple[str, str, str], one: bool, n_tokens: int, device: HostDevice) -> None:
    m = Mixture(Shape(n_experts=6, n_used=2, width=256, size=64, height=32), types, biases=True)
    groups = joined(planned({"y": m.y}, device))
    assert (["add_id"] * 3 + ["mul", "mul_mat_id", "mul_mat_id", "mul_mat_id", "sum_rows", "swiglu"] in groups) is one
    assert_same({"y": m.y}, device, m.arrays, m.inputs(n_tokens))


def product(x: Node, name: str, arrays: dict[str, Array]) -> Node:
    """Rows of a matrix that no other has."""
    rows = weights("q8_0", HEIGHT, WIDTH)[0]
    arrays[name] = np.roll(rows, len(arrays), axis=0)
    return mul_mat(constant(name, shape=(HEIGHT, WIDTH), dtype="q8_0"), x)


@pytest.mark.parametrize("n_tokens", [1, 4, 5])
@pytest.mark.parametrize("normed", [True, False])
def test_gates_of_several_formulas_of_one_value(n_tokens: int, normed: bool, device: HostDevice) -> None:
    """Each is computed by its own: a launch has one."""
    arrays: dict[str, Array] = {"norm": np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)}
    x = input("x", (T, WIDTH))
    value = rms_norm(x, constant("norm", shape=(WIDTH,)), eps=1e-5) if normed else x
    units = {"a": swiglu, "b": geglu, "c": lambda gate, up: swiglu_clamp(gate, up, limit=0.25), "d": swiglu}
    outputs = {n: unit(product(value, f"{n} gate", arrays), product(value, f"{n} up", arrays)) for n, unit in units.items()}
    outputs["e"] = product(value, "e", arrays)
    groups = joined(planned(outputs, device))
    assert ["geglu", "mul_mat", "mul_mat"] in groups and ["mul_mat", "mul_mat", "swiglu_clamp"] in groups
    assert [ops.count("swiglu") for ops in groups if "swiglu" in ops] == [2]
    given = {"x": np.random.default_rng(n_tokens).standard_normal((n_tokens, WIDTH)).astype(np.float32)}
    assert_same(outputs, device, arrays, given)
