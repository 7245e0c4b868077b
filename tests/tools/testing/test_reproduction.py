"""Graphs and reproductions as files: the same again; damaged ones are refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
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
from tensorgraph.tools.testing.reproduction import ABOUT
from tensorgraph.tools.testing.side import Given
from tensorgraph.tools.testing.warrant import limit_bytes
from tests.models import tiny

Array = np.ndarray[Any, Any]

T = Dim("T", 8)
OPTIONS = CompileOptions(
    placement={"blk.1.*": "cpu"}, scratch_bytes=1 << 33, lowerings=("some",), exact=True, without=("fuse_declared",)
)


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
        options=OPTIONS,
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


def places(value: Any) -> list[tuple[Any, Any]]:
    """Where the values of a JSON text stand: containers and keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(value, key), *places(item)]]


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Array]], object]) -> Path:
    """A reproduction whose text and arrays are changed."""
    with np.load(path) as stored:
        arrays = dict(stored)
    text = json.loads(arrays.pop(ABOUT).tobytes())
    change(text, arrays)
    np.savez_compressed(path.open("wb"), **{ABOUT: np.frombuffer(json.dumps(text).encode(), np.uint8), **arrays})  # type: ignore[arg-type]
    return path


OTHERS = st.sampled_from(
    [
        None,
        True,
        0,
        1,
        -1,
        3,
        2.5,
        1 << 20,
        1 << 30,
        1 << 33,
        1 << 70,
        "x",
        "q8_0",
        "f16",
        "mul",
        [],
        ["x"],
        [["x"]],
        {},
        {"x": 1},
    ]
    + [{"tuple": [1 << 33]}, {"dim": ["T", 8]}, {"dim": ["Q", 1 << 40]}, {"quotient": [{"dim": ["T", 8]}, 2]}, {"dtype": "f16"}]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_files_that_say_something_else_are_refused_or_computed(tmp_path: Path, data: st.DataObject) -> None:
    """With values of the text changed: one of our errors at most, and no more memory than a small file warrants."""

    def change(text: dict[str, Any], _: object) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            found = places(text)
            container, key = found[data.draw(st.integers(0, len(found) - 1))]
            container[key] = deepcopy(data.draw(OTHERS))

    path = rewritten(saved().save(tmp_path / "one.npz"), change)
    tracemalloc.start()
    try:
        back = load_reproduction(path)
        with suppress(TensorGraphError):
            assert rerun(back, "reference").steps == 1
    except FormatError as error:
        assert "one.npz" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < limit_bytes(0)


def fill_large(text: dict[str, Any], _: object) -> None:
    text["graph"]["nodes"] = [{**NODE, "op": "fill", "shape": [1 << 33], "attrs": {"shape": {"tuple": [1 << 33]}, "value": 1.0}}]
    text["graph"] |= {"outputs": {"value 7": 0}, "effects": []}


def with_largest_extent(text: dict[str, Any], _: object) -> None:
    text["graph"] = json.loads(json.dumps(text["graph"]).replace('["T", 8]', f'["T", {1 << 40}]'))


def without_input(text: dict[str, Any], arrays: dict[str, Array]) -> None:
    del text["dtypes"]["input:value 4"], arrays["input:value 4"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text, _: text["states"].update(k=[[1 << 30], "f32", 1, None]), "wanted rows of k"),
        (lambda text, _: text.update(length=1 << 30), "wanted state of"),
        (lambda text, _: text["dims"].update(T=9), "the extent T from 0 to 8"),
        (lambda text, _: text["options"].update(without=[["x"]]), "wanted a text"),
        (lambda text, _: text["options"].update(layouts=5), "damaged"),
        (lambda text, _: text["options"].update(layouts={"v": "rows"}), "wanted layouts of streams"),
        (lambda _, arrays: arrays.update(x=np.zeros(1 << 28, np.uint8)), "wanted the arrays"),
        (lambda _, arrays: arrays.update({"constant:w": np.zeros(1 << 29, np.uint8)}), "bytes at most"),
        (lambda _, arrays: arrays.update({"constant:w": np.zeros((32, 60), np.uint8)}), "wanted w as q8_0"),
        (without_input, "wanted the arrays value 4"),
        (with_largest_extent, "wanted a plan of"),
        (fill_large, "damaged"),
    ],
)
def test_what_no_file_warrants_is_refused(tmp_path: Path, change: Any, problem: str) -> None:
    path = rewritten(saved().save(tmp_path / "one.npz"), change)
    tracemalloc.start()
    with pytest.raises(FormatError, match=problem):
        load_reproduction(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_a_view_outside_its_base_is_refused(tmp_path: Path) -> None:
    x = input("x", (T, 4))
    about = saved(
        graph=Graph(y=scale(x[:, 1:3], scale=2.0)),
        given=Given({"x": np.ones((2, 4), np.float32)}, {"T": 2}),
        **{"weights": {}, "states": {}, "rows": {}, "length": 0, "got": {}, "wanted": {}},
    )
    path = about.save(tmp_path / "one.npz")
    assert rerun(load_reproduction(path), "reference").ok
    for at, value in (
        (1, {"tuple": [1 << 30, 1]}),
        (1, {"tuple": [-4, 1]}),
        (2, 1 << 28),
        (2, -1),
        (2, 2.5),
        (3, "x"),
        (3, {"tuple": [1]}),
    ):

        def change(text: dict[str, Any], _: object, at: int = at, value: Any = value) -> None:
            text["graph"]["nodes"][1]["attrs"]["map"]["map"][at] = value

        with pytest.raises(FormatError, match="damaged"):
            load_reproduction(rewritten(about.save(path), change))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_interrupted_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(file: Any, **_: object) -> None:
        file.write(b"PK")
        raise error

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(error):
        saved().save(tmp_path / "one.npz")
    assert not list(tmp_path.iterdir())


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
