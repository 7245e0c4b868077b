"""Copies on the CPU: every size around a tile's edge, every width of element, rows long enough to be cut, memory in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.ir import F32, PTR
from tensorgraph.backends.cpu.kernel import CHUNK, Call
from tensorgraph.backends.cpu.target import TARGETS, can_run
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, Node, input
from tensorgraph.ops import concat, cont, gather, get_rows, repeat, scatter, set_rows
from tensorgraph.ops.shape.cont_cpu import copy_call, emit_rows, emit_tiles, transpose

Array = np.ndarray[Any, Any]
DEVICES = ["cpu", *(f"cpu:{name}" for name, target in TARGETS.items() if can_run(target))]
M, N = Dim("M", 80), Dim("N", 80)


def evaluate(node: Node, device: str = "cpu", **arrays: Array) -> Array:
    value: Array = compile(Graph(y=node), device, CompileOptions(fuse=False)).bind().run(arrays)["y"]
    return value


def numbers(shape: tuple[int, ...], dtype: str) -> Array:
    """Other bits in every element, as far as its bytes go; some are NaN where they are floats."""
    wanted = as_dtype(dtype).numpy
    assert wanted is not None
    raw = np.random.default_rng(5).integers(0, 256, (*shape, wanted.itemsize), np.uint8)
    return raw.view(wanted)[..., 0] if dtype != "bool" else raw[..., 0] % 2 == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i8", "i64", "bool"])
def test_a_transposed_matrix_of_any_size(dtype: str, device: str) -> None:
    x = input("x", (M, 3, N), dtype)
    transposed = {order: compile(Graph(y=cont(x.permute(*order))), device).bind() for order in ((2, 1, 0), (1, 2, 0), (2, 0, 1))}
    for m in (0, 1, 7, 8, 15, 16, 17, 40, 80):
        for n in (1, 16, 31, 33, 80):
            given = numbers((m, 3, n), dtype)
            for order, executable in transposed.items():
                got = executable.run({"x": given})["y"]
                assert got.tobytes() == np.ascontiguousarray(given.transpose(order)).tobytes(), (m, n, order)


def call_of(node: Node) -> Call:
    return copy_call(node, node.inputs[0])


def test_which_copies_are_made_in_tiles() -> None:
    x = input("x", (M, 3, N))
    assert call_of(cont(x.permute(2, 1, 0))).emit is emit_tiles
    assert call_of(cont(x.permute(1, 0, 2))).emit is emit_rows  # rows of N stay rows
    assert call_of(cont(input("x", (64, 4)).permute(1, 0))).emit is emit_rows  # too thin


def test_axes_that_run_on_are_one_row() -> None:
    x = input("x", (M, 4, 8, 16))
    for node, rows in ((cont(x[:, 1:3]), (M, 2 * 8 * 16)), (cont(x), (M * 512,))):
        for ref in call_of(node).operands.values():
            assert ref is not None and ref.index_map is not None and ref.index_map.shape == rows


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_long_rows_are_cut_into_pieces(n: int) -> None:
    x, given = input("x", (2, Dim("N", 4 * CHUNK)), "f16"), numbers((2, n), "f16")
    assert evaluate(cont(x), x=given).tobytes() == given.tobytes()
    joined = evaluate(concat(x, x, axis=0), x=given)
    assert joined.tobytes() == given.tobytes() * 2
    one = given[:, :1]
    wide = evaluate(repeat(input("x", (2, 1), "f16"), shape=(2, n)), x=np.ascontiguousarray(one))
    assert wide.tobytes() == np.ascontiguousarray(np.broadcast_to(one, given.shape)).tobytes()


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_vectors_are_transposed(lanes: int) -> None:
    """By what the shuffles say, whatever they become on a target."""
    f = Function("kernel", {"p": PTR}, TARGETS["baseline"])
    rows = [_Lanes([(i, j) for j in range(lanes)]) for i in range(lanes)]
    assert [r.lanes for r in transpose(rows)] == [[(j, i) for j in range(lanes)] for i in range(lanes)]  # type: ignore[arg-type]
    assert len(transpose([f.load(f.parameters["p"], F32.x(lanes)) for _ in range(lanes)])) == lanes


class _Lanes:
    """A vector whose lanes say where they came from."""

    def __init__(self, lanes: list[tuple[int, int]]) -> None:
        self.lanes = lanes

    def shuffle(self, picked: list[int], other: _Lanes) -> _Lanes:
        both = self.lanes + other.lanes
        return _Lanes([both[i] for i in picked])


def test_rows_are_written_in_place_and_elsewhere() -> None:
    """An intermediate gives its memory to the result; an input, and a value that is used again, do not."""
    rng = np.random.default_rng(0)
    a, b, ids = input("a", (6, 64)), input("b", (M, 64)), input("ids", (M,), "i32")
    given = {"a": rng.standard_normal((6, 64)).astype(np.float32), "b": rng.standard_normal((2, 64)).astype(np.float32)}
    wanted = given["a"].copy()
    wanted[[4, 1]] = given["b"]
    h = cont(a.permute(1, 0)).permute(1, 0)
    for source in (a, cont(h), cont(h).reshape(6, 64)):
        plan = compile(Graph(y=set_rows(source, b, ids), again=source * 1.0), "cpu")
        got = plan.bind().run({**given, "ids": np.array([4, 1], np.int32)})
        np.testing.assert_array_equal(got["y"], wanted)
        np.testing.assert_array_equal(got["again"], given["a"])
    alone = compile(Graph(y=set_rows(cont(h), b, ids)), "cpu")
    places = {n.op: alone.memory["cpu"].buffers[n].offset for n in alone.graph if n in alone.memory["cpu"].buffers}
    np.testing.assert_array_equal(alone.bind().run({**given, "ids": np.array([4, 1], np.int32)})["y"], wanted)
    assert places["set_rows"] in [b.offset for n, b in alone.memory["cpu"].buffers.items() if n.op == "cont"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [6, -2, 1 << 40])
@pytest.mark.parametrize("op", ["get_rows", "set_rows", "gather", "scatter"])
def test_numbers_out_of_range_are_refused_as_by_the_reference(op: str, bad: int) -> None:
    x, ids = input("x", (6, 4)), input("ids", (2,), "i64")
    wide = input("ids", (2, 4), "i64")
    node = {
        "get_rows": lambda: get_rows(x, ids),
        "set_rows": lambda: set_rows(x, x[:2], ids),
        "gather": lambda: gather(x, wide, axis=0),
        "scatter": lambda: scatter(x, wide, x[:2], axis=0),
    }[op]()
    numbers_given = np.array([0, bad]) if op.endswith("rows") else np.array([[0] * 4, [bad] * 4])
    arrays = {"x": np.ones((6, 4), np.float32), "ids": numbers_given}
    said = []
    for device in ("reference", "cpu"):
        with pytest.raises(InputError) as error:
            evaluate(node, device, **arrays)
        said.append(str(error.value))
    assert said[0] == said[1] == f"[{op}] ids must be below 6, or -1 for none; got {bad}"
