"""Products on CUDA: weights in planes and floats, few rows, tiles and experts, against the same arithmetic in float64.

Where `exact` is not asked for, weights in planes meet a few rows that are rounded to 8 bits by 32, as on the CPU (each element is
off by at most a 254th of the largest of its block), and many that are rounded, as they are themselves, to the 11 bits of f16
(each product is off by at most 2^-10 of it); f16 weights meet many so, and bf16 weights such of 8 bits (2^-8). What is left are
sums in f32: a product may be off by EXACT_TO of the sum of the magnitudes that are added from what these roundings alone give.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cuda.weights import codes_of
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import Dim
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import InputError
from tensorgraph.graph import Graph, Node, constant, input
from tensorgraph.ops import get_rows, mul_mat, mul_mat_id
from tensorgraph.ops.formats import decode
from tensorgraph.plan import Executable
from tests.backends.cpu.products import EXACT_TO, TYPES, activations, quantised, weights
from tests.backends.cuda import where
from tests.ops.formats.extreme_blocks import special_scales

Array = np.ndarray[Any, Any]
T = Dim("T", max=300)
BACKEND = where.NAME
PLANES = [name for name in TYPES if codes_of(as_dtype(name)) is not None]
FEW, HEIGHT, WIDTH = 8, 37, 512
ROWS = (1, 2, 3, 8, 9, 70)
SOME = ("f16", "bf16", "q8_0", "q4_k", "q6_k", "q2_k", "iq2_xs")
"""One for each way in which codes, factors, minima and floats are multiplied."""


def rounded(x: Array, bits: int) -> Array:
    """Numbers to so many bits, of any exponent."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def seen(name: str, exact: bool, n_rows: int, w: Array, x: Array) -> tuple[Array, Array]:
    """Weights and activations as a product of so many rows takes them."""
    if exact or name in ("f32", "nvfp4") or (n_rows <= FEW and name in ("f16", "bf16")):
        return w, x.astype(np.float64)
    if n_rows <= FEW:
        return w, quantised(x)
    return w if name in ("f16", "bf16") else rounded(w, 11), rounded(x, 8 if name == "bf16" else 11)


def assert_right(name: str, exact: bool, n_rows: int, got: Array, w: Array, x: Array) -> None:
    """w [..., M, K] and x [..., K] against [..., M]."""
    a, b = seen(name, exact, n_rows, w, x)
    want, most = (np.einsum("...mk,...k->...m", u, v, optimize=True) for u, v in ((a, b), (np.abs(a), np.abs(b))))
    assert got.dtype == np.float32 and got.shape == want.shape
    worst = np.max(np.abs(got - want) - EXACT_TO * most, initial=0.0)
    assert worst <= 1e-30, f"{name}, {n_rows} rows, exact={exact}: off by {worst} more than {EXACT_TO} of the magnitudes"


def bind(outputs: dict[str, Node], exact: bool, given: dict[str, Array], backend: Any = BACKEND) -> Executable:
    return compile(Graph(outputs), backend, CompileOptions(exact=exact, fuse=False)).bind(given)


# Every type.


@cache
def products(names: tuple[str, ...], exact: bool) -> tuple[Executable, dict[str, Array]]:
    """Matrices of some types times the same rows, in one graph: kernels are then built several at a time."""
    drawn = {name: weights(name, HEIGHT, WIDTH) for name in names}
    b = input("b", (T, WIDTH))
    outputs = {name: mul_mat(constant(name, shape=(HEIGHT, WIDTH), dtype=name), b) for name in names}
    return bind(outputs, exact, {name: raw for name, (raw, _) in drawn.items()}), {name: w for name, (_, w) in drawn.items()}


BOTH = (False, True)
ALL = [pytest.param(TYPES, e, n, marks=[] if not e and n in (1, 9) else pytest.mark.deep) for e in BOTH for n in ROWS]


@pytest.mark.parametrize(
    ("names", "exact", "n_rows"), [*ALL, *((SOME, False, n) for n in (0, 2, 3, 8, 70)), *((SOME, True, n) for n in (1, 3, 9))]
)
def test_every_type(names: tuple[str, ...], exact: bool, n_rows: int) -> None:
    step, matrices = products(names, exact)
    x = activations(np.random.default_rng(n_rows), n_rows, WIDTH)
    found = step.run({"b": x})
    for name, w in matrices.items():
        assert_right(name, exact, n_rows, found[name], w, x)


def test_what_is_held_in_planes() -> None:
    step, _ = products(TYPES, False)
    held = step.plan.devices[0]
    layouts = {n.attrs["name"]: held.constant_layout(n, step.plan.graph) for n in step.plan.graph.constants.values()}
    assert [name for name in TYPES if layouts[name] == "dense"] == ["f32", "f16", "bf16", "nvfp4"]
    assert PLANES == [name for name in TYPES if layouts[name] == "planes"]


def test_rows_by_number_and_constants_as_they_come_back() -> None:
    """Decoded exactly, by kernels and by the device's download."""
    ids, outputs, given, values = input("ids", (T,), "i32"), dict[str, Node](), dict[str, Array](), dict[str, Array]()
    for name in TYPES:
        given[name], _ = raw, _ = weights(name, 2, 9, WIDTH)
        values[name] = decode(raw, name) if as_dtype(name).is_block else raw.astype(np.float32)
        table = constant(name, shape=(2, 9, WIDTH), dtype=name)
        outputs |= {name: get_rows(table, ids.broadcast(2, T)), f"{name} whole": table}
    step = bind(outputs, False, given)
    for chosen in ([8, 0, -1, 3, 3], []):
        found = step.run({"ids": np.array(chosen, np.int32)})
        for name in TYPES:
            want = np.where((np.array(chosen, int) < 0)[:, None], 0, values[name][:, chosen])
            np.testing.assert_array_equal(found[name], want)
            np.testing.assert_array_equal(found[f"{name} whole"], values[name].astype(found[f"{name} whole"].dtype))
    for wrong in (9, -2):
        with pytest.raises(InputError, match=rf"\[get_rows\] ids must be below 9, or -1 for none; got {wrong}$"):
            step.run({"ids": np.array([0, wrong], np.int32)})


# Shapes.

SHAPES = ((1, 256, (1, 9)), (200, 1024, (1, 33, 300)), (16, 8448, (1, 8)))
"""Height, width, rows: one row of weights; several tiles; rows that are longer than shared memory, shared by many threads."""


@pytest.mark.parametrize(("height", "width", "rows"), SHAPES)
@pytest.mark.parametrize(("names", "exact"), [(("q4_k", "f16"), False), (("q8_0", "f32"), True)])
def test_shapes(names: tuple[str, ...], exact: bool, height: int, width: int, rows: tuple[int, ...]) -> None:
    drawn, b = {name: weights(name, height, width) for name in names}, input("b", (T, width))
    outputs = {name: mul_mat(constant(name, shape=(height, width), dtype=name), b) for name in names}
    step = bind(outputs, exact, {name: raw for name, (raw, _) in drawn.items()})
    for n in rows:
        x = activations(np.random.default_rng(n), n, width)
        found = step.run({"b": x})
        for name, (_, w) in drawn.items():
            assert_right(name, exact, n, found[name], w, x)


@pytest.mark.parametrize("width", [1, 50, 257])
def test_odd_widths(width: int) -> None:
    names = ("f32", "f16", "bf16")
    drawn = {name: weights(name, 17, width) for name in names}
    b = input("b", (T, width))
    outputs = {name: mul_mat(constant(name, shape=(17, width), dtype=name), b) for name in names}
    step = bind(outputs, False, {name: raw for name, (raw, _) in drawn.items()})
    for n in (1, 10):
        x = activations(np.random.default_rng(n), n, width)
        found = step.run({"b": x})
        for name in names:
            assert_right(name, False, n, found[name], drawn[name][1], x)


@pytest.mark.parametrize("exact", [False, True])
def test_several_matrices_shared_by_neighbours_and_matrices_seen_in_pieces(exact: bool) -> None:
    """Pieces of whole tiles of 16 rows are multiplied where they lie; of others the matrix is decoded."""
    b, wide = input("b", (3, 4, T, WIDTH)), input("c", (2, T, WIDTH))
    outputs, given, matrices = dict[str, Node](), dict[str, Array](), dict[str, Array]()
    for name in ("q6_k", "f16"):
        given[name], matrices[name] = weights(name, 2, 33, WIDTH)
        outputs[name] = mul_mat(constant(name, shape=(2, 33, WIDTH), dtype=name), b)
        for rows in (32, 24):
            key = f"{name} {rows}"
            given[key], matrices[key] = weights(name, 2 * rows, WIDTH)
            whole = constant(key, shape=(2 * rows, WIDTH), dtype=name)
            outputs[key] = mul_mat(whole.reshape(2, rows, WIDTH), wide)
    step = bind(outputs, exact, given)
    held = {n.attrs["name"]: n for n in step.plan.graph.constants.values()}
    layouts = {key: step.plan.devices[0].constant_layout(node, step.plan.graph) for key, node in held.items()}
    assert [key for key, layout in layouts.items() if layout == "planes"] == ["q6_k", "q6_k 32"]
    for n in (1, 11):
        x, y = (activations(np.random.default_rng(n), *shape, n, WIDTH) for shape in ((3, 4), (2,)))
        found = step.run({"b": x, "c": y})
        for name in ("q6_k", "f16"):
            assert_right(name, exact, n, found[name], matrices[name][[0, 0, 1, 1]][:, None], x)
            for rows in (32, 24):
                key = f"{name} {rows}"
                kind = "f32" if key == "q6_k 24" else name
                assert_right(kind, exact, n, found[key], matrices[key].reshape(2, rows, WIDTH)[:, None], y)


def test_weights_without_rows_and_without_columns() -> None:
    a, b = constant("a", shape=(3, 0, 64)), input("b", (3, T, 64))
    c, d = constant("c", shape=(5, 0), dtype="f16"), input("d", (T, 0))
    ids = input("ids", (T, 2), "i32")
    outputs = {"y": mul_mat(a, b), "z": mul_mat(c, d), "e": mul_mat_id(a, b.permute(1, 0, 2).slice(1, 0, 2), ids)}
    step = bind(outputs, False, {"a": np.zeros((3, 0, 64), np.float32), "c": np.zeros((5, 0), np.float16)})
    for n in (1, 9, 40):
        given = {"b": np.ones((3, n, 64), np.float32), "d": np.ones((n, 0), np.float32), "ids": np.ones((n, 2), np.int32)}
        found = step.run(given)
        assert found["y"].shape == (3, n, 0) and found["e"].shape == (n, 2, 0)
        np.testing.assert_array_equal(found["z"], np.zeros((n, 5)))


# Numbers.


@pytest.mark.parametrize("name", ["q4_k", "mxfp4", "f16", "bf16", "f32"])
def test_any_size(name: str) -> None:
    """Activations from 1e-30 to 1e30, and rows that are not finite, which leave others as they are."""
    raw, w = weights(name, HEIGHT, WIDTH)
    step = bind({"y": mul_mat(constant("a", shape=(HEIGHT, WIDTH), dtype=name), input("b", (T, WIDTH)))}, False, {"a": raw})
    sizes = 10.0 ** np.array([-30, -20, -9, -5, 0, 4.5, 5, 9, 20, 30])
    x = (np.random.default_rng(1).uniform(-1, 1, (len(sizes), WIDTH)) * sizes[:, None]).astype(np.float32)
    for rows in (x, x[:3], x[-3:]):
        fine = step.run({"b": rows})["y"]
        assert_right(name, False, len(rows), fine, w, rows)
        for value in (np.nan, np.inf, -np.inf):
            odd = rows.copy()
            odd[1, WIDTH - 1] = value
            got = step.run({"b": odd})["y"]
            assert not np.isfinite(got[1]).any()
            np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(fine, 1, 0))


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_weights_beyond_the_range_of_f16(size: float) -> None:
    """In tiles, rows of small or large weights keep their 11 bits; scales that are no numbers stay in their rows."""
    names = ("q4_k", "q6_k", "mxfp4")
    drawn = {name: weights(name, HEIGHT, WIDTH, deviation=size) for name in names}
    given = {name: raw for name, (raw, _) in drawn.items()}
    given |= {f"{name} odd": special_scales(name, HEIGHT, WIDTH).reshape(HEIGHT, -1) for name in names}
    b = input("b", (T, WIDTH))
    outputs = {key: mul_mat(constant(key, shape=(HEIGHT, WIDTH), dtype=key.split()[0]), b) for key in given}
    step = bind(outputs, False, given)
    for n in (3, 12):
        x = activations(np.random.default_rng(n), n, WIDTH)
        found = step.run({"b": x})
        for name in names:
            assert_right(name, False, n, found[name], drawn[name][1], x)
            odd = decode(given[f"{name} odd"], name).astype(np.float64)
            good = np.isfinite(odd).all(axis=1)
            assert_right(name, False, n, found[f"{name} odd"][:, good], odd[good], x)
            assert not np.isfinite(found[f"{name} odd"][:, ~good]).any()


@pytest.mark.parametrize("name", ["q4_k", "f16"])
def test_the_order_of_threads_changes_nothing(name: str) -> None:
    raw, _ = weights(name, 3, HEIGHT, WIDTH)
    a = constant("a", shape=(3, HEIGHT, WIDTH), dtype=name)
    b, ids = input("b", (T, 3, WIDTH)), input("ids", (T, 3), "i32")
    device = where.device()
    step = bind({"y": mul_mat(a, b.permute(1, 0, 2)), "z": mul_mat_id(a, b, ids)}, False, {"a": raw}, device)
    for n in (1, 12, 40, 260):
        rng = np.random.default_rng(n)
        given = {"b": activations(rng, n, 3, WIDTH), "ids": rng.integers(-1, 3, (n, 3)).astype(np.int32)}
        found = []
        for schedule in (0, 1, 2, 3):
            device.set_threads(schedule)
            found.append(step.run(given))
        for other in found[1:]:
            for key in ("y", "z"):
                np.testing.assert_array_equal(other[key], found[0][key])


# Experts.

COUNTS = ((1, 0, 5), (4, -1, 5), (20, -1, 3), (9, 2, 3), (30, -1, 0), (0, 0, 1), (70, 3, 4), (150, -1, 5))
"""Tokens, and between what their experts lie: few pairs, many, one expert for all or for none."""


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("exact", [False, True])
def test_experts(exact: bool, shared: bool) -> None:
    n_experts, n_used, names = 5, 3, ("f16", "q4_k", "iq2_xs")
    drawn = {name: weights(name, n_experts, HEIGHT, WIDTH) for name in names}
    b, ids = input("b", (T, 1 if shared else n_used, WIDTH)), input("ids", (T, n_used), "i32")
    outputs = {n: mul_mat_id(constant(n, shape=(n_experts, HEIGHT, WIDTH), dtype=n), b, ids) for n in names}
    step = bind(outputs, exact, {name: raw for name, (raw, _) in drawn.items()})
    rng = np.random.default_rng(5)
    for n, low, high in COUNTS:
        x = activations(rng, n, 1 if shared else n_used, WIDTH)
        chosen = rng.integers(low, high, (n, n_used)).astype(np.int32)
        found = step.run({"b": x, "ids": chosen})
        rows, few = np.broadcast_to(x, (n, n_used, WIDTH)), chosen.size <= 16
        for name, (_, w) in drawn.items():
            assert not found[name][chosen < 0].any()
            for expert in range(n_experts):
                mine = chosen == expert
                assert_right(name, exact, 1 if few else 99, found[name][mine], w[expert], rows[mine])
    for n in (2, 20):
        for wrong in (-2, n_experts, 2**31 - 1):
            chosen = np.zeros((n, n_used), np.int32)
            chosen[n - 1, 1] = wrong
            with pytest.raises(InputError, match=rf"\[mul_mat_id\] ids must be below 5, or -1 for none; got {wrong}$"):
                step.run({"b": np.zeros((n, 1 if shared else n_used, WIDTH), np.float32), "ids": chosen})


def test_experts_that_are_computed() -> None:
    """Matrices that are no constants, in either order of their axes."""
    rng = np.random.default_rng(6)
    x, chosen = rng.standard_normal((6, 3, 21)).astype(np.float32), rng.integers(-1, 3, (6, 3)).astype(np.int32)
    w = rng.standard_normal((3, 70, 21)).astype(np.float32)
    b, ids = input("b", (6, 3, 21)), input("ids", (6, 3), dtype="i32")
    turned = input("c", (3, 21, 70)).permute(0, 2, 1)
    outputs = {"y": mul_mat_id(input("a", (3, 70, 21)), b, ids), "z": mul_mat_id(turned, b, ids)}
    step = bind(outputs, False, {})
    found = step.run({"a": w, "c": np.ascontiguousarray(w.transpose(0, 2, 1)), "b": x, "ids": chosen})
    for got in found.values():
        assert not got[chosen < 0].any()
        assert_right("f32", False, 99, got[chosen >= 0], w[chosen[chosen >= 0]].astype(np.float64), x[chosen >= 0])
