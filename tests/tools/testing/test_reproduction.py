"""Graphs and reproductions as files: the same again; damaged ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import f16, f32
from tensorgraph.errors import FormatError, InputError, TensorGraphError
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, append, constant, input
from tensorgraph.ops import mul_mat, scale
from tensorgraph.state import StateSpec
from tensorgraph.tools.testing import Reproduction, load_reproduction, rerun
from tensorgraph.tools.testing.cuts import kept
from tensorgraph.tools.testing.graph_file import graph_as_json, graph_from_json
from tensorgraph.tools.testing.side import Given
from tests.models import tiny

T = Dim("T", 8)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_graphs_of_models_come_back(architecture: str) -> None:
    """Dims, floor divisions, products of them, guards, views, streams: all there are."""
    graph = tiny.model(architecture).graph(Extents(), f16)
    back = graph_from_json(json.loads(json.dumps(graph_as_json(graph))))
    assert back.key == graph.key and str(back) == str(graph)


def test_extents_come_back_as_they_are() -> None:
    n = Dim("N", 9)
    for extent in (n, n * 3 + 2, n * T - 4 * T, (n + 1) // 2, ((n * 2 + T) // 3) * n, 7):
        graph = Graph(x=input("x", (extent, 4)))
        assert graph_from_json(graph_as_json(graph)).inputs["x"].shape == (extent, 4)


def saved(**changes: Any) -> Reproduction:
    """A product with weights in blocks, of bf16 activations, over an appended stream."""
    rng = np.random.default_rng(0)
    x, w = input("%4", (T, 64), "bf16"), constant("w", shape=(32, 64), dtype="q8_0")
    rows = append("k", mul_mat(w, x), Dim("S", 16), f32)
    graph = kept(Graph({"%7": scale(rows, scale=2.0)}, effects=[rows]))
    given = {"value 4": rng.standard_normal((2, 64)).astype(ml_dtypes.bfloat16)}
    about = Reproduction(
        graph=graph,
        given=Given(given, {"T": 2, "S": 5}, 2),
        weights={"w": rng.integers(0, 60, (32, 68)).astype(np.uint8)},
        got={"value 7": np.zeros((5, 32), np.float32)},
        wanted={"value 7": np.ones((5, 32), np.float32)},
        backend="cpu",
        options=CompileOptions(exact=True, without=("fuse_declared",)),
        states={"k": StateSpec((32,), f32)},
        kv_dtype=f32,
        rows={"k": rng.standard_normal((3, 32)).astype(np.float32)},
        length=3,
        about=("one line", "another"),
    )
    return replace(about, **changes)


def test_a_reproduction_comes_back(tmp_path: Path) -> None:
    about = saved()
    back = load_reproduction(about.save(tmp_path / "new" / "one.npz"))
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "one.npz"]
    assert back.graph.key == about.graph.key
    assert (list(back.graph.inputs), list(back.graph.outputs)) == (["value 4"], ["value 7"])
    for name in ("backend", "options", "length", "about", "states"):
        assert getattr(back, name) == getattr(about, name), name
    assert back.given.dims == about.given.dims and back.given.n_tokens == 2
    held = [tuple(getattr(each, kind) for each in (back, about)) for kind in ("weights", "rows", "got", "wanted")]
    for mine, theirs in [(back.given.inputs, about.given.inputs), *held]:
        assert mine.keys() == theirs.keys()
        for name, array in theirs.items():
            assert mine[name].dtype == array.dtype and mine[name].tobytes() == array.tobytes()


def test_rows_that_were_there_before_count() -> None:
    about = saved()
    side = about.side("cpu", about.options)
    assert side.length == 3
    run = side.run(about.graph, about.given)
    dense = compile(Graph(y=about.graph.constants["w"])).bind(about.weights).run({})["y"].astype(np.float64)
    new = about.given.inputs["value 4"].astype(np.float64) @ dense.T
    np.testing.assert_allclose(run.rows["k"], np.concatenate([about.rows["k"], new]), rtol=1e-5, atol=1e-5)
    report = rerun(about)
    assert report.ok and report.nodes == 3 and report.got == "cpu"


def test_the_options_of_the_side_that_was_wrong_are_kept(tmp_path: Path) -> None:
    about = saved(options=CompileOptions(exact=False, fuse=False))
    report = rerun(load_reproduction(about.save(tmp_path / "one.npz")), "cpu")
    assert not report.exact and report.ok and 1e-6 < report.worst["mul_mat"].nmse < 1e-2


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Cut off, or with bytes changed: read as if whole, or refused with one of our errors."""
    path = tmp_path / "one.npz"
    content = bytearray(saved().save(path).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert isinstance(load_reproduction(path), Reproduction)
    except FormatError as error:
        assert "one.npz" in str(error)


NODE = {"op": "input", "inputs": [], "slots": [], "shape": [4], "dtype": "f32", "attrs": {"name": "x"}, "name": "x", "where": ""}


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": [0]},
        {"inputs": [-1]},
        {"inputs": [True]},
        {"inputs": ["x"]},
        {"dtype": "f99"},
        {"shape": [{"dim": ["T"]}]},
        {"shape": [{"quotient": [4, 0]}]},
        {"attrs": {"name": {"code": "x"}}},
        {"attrs": {"name": [1]}},
        {"attrs": {"name": {"a": 1, "b": 2}}},
        {"attrs": None},
    ],
)
def test_graphs_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    text = {"nodes": [{**NODE, **wrong}], "outputs": {"x": 0}, "effects": []}
    with pytest.raises(TensorGraphError, match="wanted"):
        graph_from_json(text)
    assert graph_from_json({**text, "nodes": [NODE]}).inputs["x"].shape == (4,)


def test_a_file_that_is_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_reproduction(tmp_path / "none.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        saved().save(tmp_path / "file" / "one.npz")
    (tmp_path / "text.npz").write_text("{}")
    with pytest.raises(FormatError, match="is damaged, or no reproduction"):
        load_reproduction(tmp_path / "text.npz")
