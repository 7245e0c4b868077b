"""Operators: attributes, declarations, the registry and its plugins."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph import registry
from tensorgraph.compiler import compile, run_op
from tensorgraph.dims import Dim
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import AttributeValueError, GraphError, UnknownNameError
from tensorgraph.graph import Graph, constant, input
from tensorgraph.op import Attr, Op, all_ops, node_bytes
from tensorgraph.ops import mul_mat, relu, scale
from tensorgraph.registry import Registry

T = Dim("T", 8)


@pytest.fixture
def op() -> Iterator[Op]:
    made = Op(
        "test_op",
        "x[N]: any -> y[N]: x",
        attrs={
            "eps": Attr(float, low=0.0, high=1.0),
            "k": Attr(int, 3, low=1),
            "layout": Attr(str, "half_split", choices=("half_split", "interleaved")),
            "flag": Attr(bool, False),
            "to": Attr(DType, None),
            "shape": Attr(tuple, ()),
        },
    )
    yield made
    registry.ops.remove("test_op")


X = input("x", (4,))


def test_attributes_are_checked_and_completed(op: Op) -> None:
    node = op(X, eps=1, to="f16", shape=[2, T])
    wanted = {"eps": 1.0, "k": 3, "layout": "half_split", "flag": False, "to": as_dtype("f16"), "shape": (2, T)}
    assert dict(node.attrs) == wanted and type(node.attrs["eps"]) is float
    assert op(X, eps=0.5, k=np.int32(7)).attrs["k"] == 7 and op(X, eps=0.5).attrs["to"] is None


@pytest.mark.parametrize(
    ("attrs", "said"),
    [
        ({}, r"\[test_op\] eps is missing"),
        ({"eps": 0.1, "epsilon": 1.0}, r"\[test_op\] has no 'epsilon'; it has: eps, k, layout, flag, to, shape"),
        ({"eps": 1.5}, r"\[test_op\] eps must be within \[0.0, 1.0\]; got 1.5"),
        ({"eps": -0.1}, r"\[test_op\] eps must be within \[0.0, 1.0\]; got -0.1"),
        ({"eps": float("nan")}, r"\[test_op\] eps must be within \[0.0, 1.0\]; got nan"),
        ({"eps": "1"}, r"\[test_op\] eps must be float; got '1'"),
        ({"eps": True}, r"\[test_op\] eps must be float; got True"),
        ({"eps": None}, r"\[test_op\] eps must be float; got None"),
        ({"eps": 0.1, "k": 0}, r"\[test_op\] k must be within \[1, None\]; got 0"),
        ({"eps": 0.1, "k": 2.0}, r"\[test_op\] k must be int; got 2.0"),
        ({"eps": 0.1, "k": True}, r"\[test_op\] k must be int; got True"),
        ({"eps": 0.1, "layout": "split"}, r"\[test_op\] layout must be one of \('half_split', 'interleaved'\); got 'split'"),
        ({"eps": 0.1, "flag": 1}, r"\[test_op\] flag must be bool; got 1"),
        ({"eps": 0.1, "to": "f33"}, r"\[test_op\] to must be DType; got 'f33'"),
        ({"eps": 0.1, "shape": 3}, r"\[test_op\] shape must be tuple; got 3"),
    ],
)
def test_attributes_that_do_not_fit(op: Op, attrs: dict[str, Any], said: str) -> None:
    with pytest.raises(AttributeValueError, match=said + r" \(test_op.py:\d+\)"):
        op(X, **attrs)


def test_a_name_is_registered_once(op: Op) -> None:
    with pytest.raises(GraphError, match=r"\[op\] 'test_op' is registered already"):
        Op("test_op", "x[N]: any -> y[N]: x")
    assert registry.ops.get("test_op") is op


def test_an_unknown_op_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"\[op\] there is no 'rms_nrm'; did you mean 'rms_norm'\? Known: .*mul_mat"):
        registry.ops.get("rms_nrm")
    with pytest.raises(UnknownNameError, match=r"\[backend\] there is no 'zzz'\. Known: .*reference"):
        registry.backends.get("zzz")
    with pytest.raises(UnknownNameError, match="did you mean 'relu'"):
        run_op("relo", np.zeros(3, np.float32))


def test_operators_list_each_op_once_by_name() -> None:
    names = [op.name for op in all_ops()]
    assert names == sorted(set(names)) and {"mul_mat", "index_top_k", "flash_attn"} <= set(names)


def test_costs() -> None:
    w, x = constant("w", shape=(6, 32), dtype="q8_0"), input("x", (T, 32))
    cost = registry.ops.get("mul_mat").cost(mul_mat(w, x), {"T": 5})
    assert cost.flops == 5 * 6 * 32 * 2
    assert cost.size_bytes == 6 * 34 + 5 * 32 * 4 + 5 * 6 * 4
    assert registry.ops.get("relu").cost(relu(x), {"T": 5}).flops == 5 * 32
    assert node_bytes(constant("b", shape=(3, 64), dtype="q4_0")) == 3 * 2 * 18
    assert node_bytes(x) == 8 * 32 * 4 and node_bytes(x, {"T": 3}) == 3 * 32 * 4


def test_laws_and_declarations_are_kept(op: Op) -> None:
    @op.reference
    def reference(x: Any, **attrs: Any) -> Any:
        return x * attrs["eps"]

    @op.law
    def law(run: Any, x: Any, **attrs: Any) -> None: ...

    assert op.laws == [law] and op.reference_fn is reference
    result = compile(Graph(y=op(X, eps=0.5))).run(x=np.arange(4, dtype=np.float32))["y"]
    np.testing.assert_array_equal(result, [0, 0.5, 1, 1.5])


def test_an_op_without_a_shape_rule_says_so() -> None:
    bare = Op("test_bare")
    try:
        with pytest.raises(GraphError, match=r"\[test_bare\] has neither a signature nor a shape rule"):
            bare.apply({"x": X}, {})
        with pytest.raises(GraphError, match=r"\[test_bare\] has no reference"):
            bare.compute({}, {})
    finally:
        registry.ops.remove("test_bare")


def test_a_registry_loads_its_home_and_then_the_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that is only on the path: its entry point is imported when a name is not found, once."""
    (tmp_path / "tg_fake_plugin.py").write_text(
        "from tensorgraph.op import Op\n"
        "double = Op('test_plugin_double', 'x[...]: real -> y[...]: x')\n"
        "double.reference(lambda x: 2 * x)\n"
    )
    info = tmp_path / "tg_fake_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tg-fake-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tensorgraph.plugins]\nfake = tg_fake_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded_plugins", False)
    try:
        assert "test_plugin_double" not in registry.ops and "tg_fake_plugin" not in sys.modules
        doubled = run_op("test_plugin_double", np.array([1, 2], np.float32))
        np.testing.assert_array_equal(doubled, [2, 4])
        import tensorgraph.ops

        assert tensorgraph.ops.test_plugin_double is registry.ops.get("test_plugin_double")
        assert "test_plugin_double" in set(registry.ops)
    finally:
        registry.ops.remove("test_plugin_double")
        sys.modules.pop("tg_fake_plugin", None)


@pytest.mark.parametrize("kept", ["dist-info", "egg-info", "zip", "egg"])
def test_plugins_are_asked_for_only_where_there_may_be_some(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ("place.egg" if kept == "egg" else "place")
    info = place / f"other-1.0.{kept if kept.endswith('info') else 'dist-info'}" / "entry_points.txt"
    info.parent.mkdir(parents=True)
    info.write_text("[console_scripts]\nother = other:main\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nowhere"), str(place)])
    if kept == "egg":
        assert registry._any_may_be_there()
        return
    assert not registry._any_may_be_there()
    monkeypatch.setattr(sys, "path", [*sys.path, "x" * 5000])
    assert registry._any_may_be_there()  # what only `importlib.metadata` copes with
    sys.path.pop()
    if kept == "zip":
        (tmp_path / "place.zip").write_bytes(b"")
        sys.path.append(str(tmp_path / "place.zip"))
    else:
        info.write_text("[console_scripts]\nother = other:main\n[tensorgraph.plugins]\na = b\n")
    assert registry._any_may_be_there()


def test_a_registry_alone() -> None:
    things: Registry[int] = Registry("thing", "tensorgraph.ops")
    assert things.add("one", 1) == 1 and things.get("one") == 1 and "one" in things and list(things) == ["one"]
    things.remove("one")
    assert "one" not in things
    with pytest.raises(UnknownNameError) as caught:
        things.get("one")
    assert isinstance(caught.value, KeyError) and str(caught.value).startswith("[thing] there is no 'one'")


def test_operators_written_with_symbols() -> None:
    x, y = input("x", (4,)), input("y", (4,))
    arrays = {"x": np.array([1, 2, 3, 4], np.float32), "y": np.array([4, 8, 2, 1], np.float32)}
    written = {
        "a": (x + y, [5, 10, 5, 5]),
        "b": (x - y, [-3, -6, 1, 3]),
        "c": (x * y, [4, 16, 6, 4]),
        "d": (x / y, [0.25, 0.25, 1.5, 4]),
        "e": (2 + x * 3 - 1, [4, 7, 10, 13]),
        "f": (-(x / 2), [-0.5, -1, -1.5, -2]),
        "g": (scale(x, scale=2.0, bias=1.0), [3, 5, 7, 9]),
    }
    results = compile(Graph({k: node for k, (node, _) in written.items()})).run(**arrays)
    for name, (_, wanted) in written.items():
        np.testing.assert_array_equal(results[name], np.array(wanted, np.float32))
