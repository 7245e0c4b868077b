"""What else is compared, told and refused: single elements, odd attributes, users' files, wrong arguments."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions
from tensorgraph.dims import Dim
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, append, constant, input
from tensorgraph.op import Attr, Op
from tensorgraph.ops import mul_mat, relu
from tensorgraph.ops.formats.blocks import encode_rows
from tensorgraph.tools.testing import Terms, compare, load_reproduction, rerun
from tensorgraph.tools.testing.source_lines import source_text
from tests.tools.testing.test_compare import RNG, WEIGHTS, Array, T, X, checked, gated
from tests.tools.testing.wrong_devices import last_element_off, reads, wrong_node


def one_dead(y: Array) -> Array:
    """An element of the usual size is zero."""
    y = np.array(y)
    y.reshape(-1)[np.abs(np.abs(y) - np.sqrt(np.square(y).mean())).argmin()] = 0
    return y


@pytest.mark.parametrize("exact", [True, False])
def test_one_dead_element_of_a_quantised_product_is_found(exact: bool, tmp_path: Path) -> None:
    """Of 8192, which is less than rounding activations to 8 bits costs all of them."""
    w = encode_rows(RNG.standard_normal((8192, 64)).astype(np.float32), "q4_0")
    graph = Graph(y=mul_mat(constant("w", shape=(8192, 64), dtype="q4_0"), input("x", (T, 64))))
    x, options = {"x": X["x"][:1]}, CompileOptions(exact=exact)
    device = wrong_node("wrong", reads("w"), one_dead)
    found, right = (
        compare(graph, x, {"w": w}, terms=Terms(backends=("reference", on), options=options, folder=tmp_path))
        for on in (device, "cpu")
    )
    assert found.first is not None and found.first.difference.nmse == pytest.approx(1 / 8192, rel=1e-2)
    assert found.first.alone and found.first.difference.got == 0 and right.ok
    assert rerun(load_reproduction(str(found.first.reproduction)), device).first is not None


def test_the_files_that_build_graphs_are_where_lines_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text("first\nsecond\n")
    own, users = (ModuleType(name) for name in ("tensorgraph.models.own.model", "model"))
    own.__file__, users.__file__ = str(tmp_path / "own" / "model.py"), str(tmp_path / "model.py")
    for module in (own, users):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert source_text("model.py:2") == "second"
    other = ModuleType("theirs.model")
    other.__file__ = str(tmp_path / "theirs" / "model.py")
    monkeypatch.setitem(sys.modules, other.__name__, other)
    assert source_text("model.py:2") == ""  # which of the two is not known


class Kind(Enum):
    ONE = 1


@pytest.mark.parametrize("value", [Kind.ONE, (np.float32(1.5),), (np.int64(3),)])
def test_what_was_found_is_told_whatever_attributes_its_node_has(tmp_path: Path, value: object) -> None:
    """NumPy's numbers are written as numbers; what cannot be written is said."""
    op = Op("odd_scale", "x[...]: float -> y[...]: x", attrs={"kind": Attr(type(value))})
    op.reference(lambda x, kind: x * 2)
    try:
        device = wrong_node("wrong", lambda node: node.op == "odd_scale", last_element_off)
        first = checked(Graph(y=op(input("x", (T, 64)), kind=value)), device, folder=tmp_path).first
        assert first is not None and first.node.op == "odd_scale"
        if isinstance(value, Kind):
            assert first.reproduction is None and "wanted an attribute that can be written; got <Kind.ONE: 1>" in first.unsaved
        else:
            assert rerun(load_reproduction(str(first.reproduction)), device).first is not None
    finally:
        registry.ops.remove("odd_scale")


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="there are no inputs z; known: x"):
        compare(gated(), {**X, "z": X["x"]}, WEIGHTS)
    with pytest.raises(InputError, match="there are no dims Q; known: T"):
        compare(gated(), X, WEIGHTS, dims={"Q": 5})
    with pytest.raises(InputError, match="wanted a Graph; got <relu"):
        compare(relu(input("x", (T, 64))), X)  # type: ignore[arg-type]
    for backends in (("reference",), "cpu", None):
        with pytest.raises(InputError, match="wanted two backends"):
            Terms(backends=backends)  # type: ignore[arg-type]
    for graph in (Graph(y=relu(input("%1", (T, 64)))), Graph({"%1": relu(input("x", (T, 64)))})):
        with pytest.raises(InputError, match="begin with no %; got %1"):
            compare(graph, dict.fromkeys(graph.inputs, X["x"]))
    with pytest.raises(InputError, match=r"wanted the inputs x; missing: x"):
        compare(gated(), {}, WEIGHTS)
    stored = append("k", input("x", (T, 64)), Dim("S", 64), input("x", (T, 64)).dtype)
    with pytest.raises(InputError, match="compare_model; got the streams k"):
        compare(Graph(y=stored, effects=[stored]), X)
