"""Signatures: what they parse to, what they infer, and what their errors say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tensorgraph import registry
from tensorgraph.dims import Dim, Shape
from tensorgraph.dtypes import as_dtype
from tensorgraph.errors import DTypeError, GraphError, ShapeError, TensorGraphError
from tensorgraph.graph import Node, constant, input
from tensorgraph.op import Op
from tensorgraph.ops import add, get_rows, mul_mat, mul_mat_id, rms_norm, sigmoid, soft_max
from tensorgraph.signature import Argument, Signature

T, S = Dim("T", 8), Dim("S", 9)


def infer(text: str, attrs: dict[str, Any] | None = None, **shapes: tuple[Shape, str]) -> tuple[Shape, str]:
    nodes = {name: input(name, shape, dtype) for name, (shape, dtype) in shapes.items()}
    shape, dtype = Signature.parse(text).infer("op", nodes, attrs or {})
    return shape, dtype.name


def test_parsing() -> None:
    parsed = Signature.parse("x[..., D]: float, w[D, 4]?: x, ids[*B, K]: int -> y[*B, D]: f32")
    assert parsed.inputs == (
        Argument("x", ("*", "D"), "float"),
        Argument("w", ("D", "4"), "x", optional=True),
        Argument("ids", ("*B", "K"), "int"),
    )
    assert parsed.result == Argument("y", ("*B", "D"), "f32")
    assert Signature.parse(str(parsed).replace("*,", "...,")) == parsed


@pytest.mark.parametrize(
    "text",
    ["x[N]: f32", "x[N] -> y[N]: x", "x[N]: f32 -> ", "x[N]: f32 -> y[N]: x, z[N]: x", "x N: f32 -> y[N]: x", "-> y[", ""],
)
def test_what_cannot_be_parsed(text: str) -> None:
    with pytest.raises(GraphError, match=r"\[signature\]"):
        Signature.parse(text)


@pytest.mark.parametrize(
    ("text", "shapes", "attrs", "result"),
    [
        ("x[N]: any -> y[N]: x", {"x": ((T,), "i32")}, {}, ((T,), "i32")),
        ("x[..., D]: float -> y[..., D]: x", {"x": ((4,), "f16")}, {}, ((4,), "f16")),
        ("x[..., D]: float -> y[..., D]: f32", {"x": ((T, 2, 4), "f16")}, {}, ((T, 2, 4), "f32")),
        ("x[..., D]: float -> y[..., D, D]: x", {"x": ((T, 3), "f32")}, {}, ((T, 3, 3), "f32")),
        (
            "x[*B, M, K]: any, w[N, K]: x -> y[*B, M, N]: w",
            {"x": ((2, T, 5), "f32"), "w": ((7, 5), "f32")},
            {},
            ((2, T, 7), "f32"),
        ),
        ("x[*B, 2]: any -> y[*B]: x", {"x": ((T, S, 2), "u8")}, {}, ((T, S), "u8")),
        ("x[..., N]: any -> y[..., k]: i32", {"x": ((T, 9), "f32")}, {"k": 3}, ((T, 3), "i32")),
        ("x[...]: any -> y[shape]: dtype", {"x": ((2,), "f32")}, {"shape": (T, 4), "dtype": as_dtype("i8")}, ((T, 4), "i8")),
        ("x[N]: any, w[M]?: x -> y[N]: x", {"x": ((3,), "f32")}, {}, ((3,), "f32")),
        ("x[N]: any, w[N]: any -> y[1]: x", {"x": ((T + 1,), "f32"), "w": ((1 + T,), "u8")}, {}, ((1,), "f32")),
    ],
)
def test_inference(text: str, shapes: dict[str, Any], attrs: dict[str, Any], result: tuple[Shape, str]) -> None:
    assert infer(text, attrs, **shapes) == result


@pytest.mark.parametrize("shape", [(3,), (T, 3), (T, S, 3)])
def test_a_pack_takes_any_number_of_axes(shape: Shape) -> None:
    assert infer("x[*B, N]: any, w[*B, N]: any -> y[*B]: x", x=(shape, "f32"), w=(shape, "i32")) == (shape[:-1], "f32")


@pytest.mark.parametrize(
    ("text", "shapes", "said"),
    [
        ("x[N, M]: any -> y[N]: x", {"x": ((3,), "f32")}, r"\[op\] x must be \[N, M\]; got \[3\]"),
        ("x[N]: any, w[N]: any -> y[N]: x", {"x": ((3,), "f32"), "w": ((4,), "f32")}, r"\[op\] w must be \[3\]; got \[4\]"),
        ("x[N]: any, w[N]: any -> y[N]: x", {"x": ((T,), "f32"), "w": ((S,), "f32")}, r"\[op\] w must be \[T\]; got \[S\]"),
        ("x[N, 4]: any -> y[N]: x", {"x": ((3, 5), "f32")}, r"\[op\] x must be \[3, 4\]; got \[3, 5\]"),
        (
            "x[*B, N]: any, w[*B]: any -> y[*B]: x",
            {"x": ((T, 2, 3), "f32"), "w": ((T, 3), "f32")},
            r"\[op\] w must be \[T, 2\]; got \[T, 3\]",
        ),
        ("x[..., 3, 4]: any -> y[...]: x", {"x": ((4,), "f32")}, r"\[op\] x must be \[\*, 3, 4\]; got \[4\]"),
    ],
)
def test_a_wrong_shape(text: str, shapes: dict[str, Any], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        infer(text, **shapes)


@pytest.mark.parametrize(
    ("kind", "takes", "refuses"),
    [
        ("any", ("f32", "q8_0", "i32", "bool"), ()),
        ("float", ("f64", "f32", "f16", "bf16", "q8_0", "mxfp4"), ("i32", "u8", "bool")),
        ("real", ("f32", "bf16"), ("q8_0", "i64", "bool")),
        ("int", ("i64", "i32", "i16", "i8", "u8"), ("f32", "q4_0", "bool")),
        ("f16", ("f16",), ("f32", "bf16")),
    ],
)
def test_kinds_of_types(kind: str, takes: tuple[str, ...], refuses: tuple[str, ...]) -> None:
    for dtype in takes:
        assert infer(f"x[N]: {kind} -> y[N]: x", x=((32,), dtype)) == ((32,), dtype)
    for dtype in refuses:
        with pytest.raises(DTypeError, match=rf"\[op\] x must be {kind}; got {dtype}"):
            infer(f"x[N]: {kind} -> y[N]: x", x=((32,), dtype))


def test_a_type_that_follows_another_input() -> None:
    with pytest.raises(DTypeError, match=r"\[op\] w must be f16, as x; got f32"):
        infer("x[N]: float, w[N]: x -> y[N]: x", x=((3,), "f16"), w=((3,), "f32"))


def f(name: str, *shape: Any, dtype: str = "f32") -> Node:
    return input(name, shape, dtype)


def w(name: str, *shape: int, dtype: str = "f32") -> Node:
    return constant(name, shape=shape, dtype=dtype)


@pytest.mark.parametrize(
    ("build", "kind", "names"),
    [
        (
            lambda: rms_norm(f("x", T, 64), w("norm.weight", 63), eps=1e-5),
            ShapeError,
            ("[rms_norm]", "[64]", "[63]", '"norm.weight"'),
        ),
        (lambda: mul_mat(w("q.weight", 8, 5), f("x", T, 4)), ShapeError, ("[mul_mat]", "5", "4")),
        (lambda: f("x", T, 4) + w("bias", 3), ShapeError, ("[add]", "[4]", "[T, 4]", "[3]", '"bias"')),
        (lambda: add(f("x", 4), f("y", T, 4)), ShapeError, ("[add]", "[4]", "[T, 4]", '"y"')),
        (lambda: get_rows(w("embd", 5, 4), f("ids", T)), DTypeError, ("[get_rows]", "int", "f32", '"ids"')),
        (lambda: sigmoid(f("ids", T, dtype="i32")), DTypeError, ("[sigmoid]", "i32", '"ids"')),
        (lambda: sigmoid(w("w", 32, dtype="q8_0")), DTypeError, ("[sigmoid]", "q8_0", '"w"')),
        (lambda: soft_max(f("x", T, dtype="bool")), DTypeError, ("[soft_max]", "bool", '"x"')),
        (
            lambda: mul_mat_id(w("experts", 4, 8, 6), f("x", T, 2, 5), f("ids", T, 2, dtype="i32")),
            ShapeError,
            ("[mul_mat_id]", "6", "5"),
        ),
    ],
)
def test_errors_name_the_op_the_shapes_the_tensor_and_the_line(
    build: Callable[[], Node], kind: type[TensorGraphError], names: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        build()
    for name in (*names, "test_signature.py:"):
        assert name in str(caught.value), f"{name} is not in: {caught.value}"


@pytest.fixture
def pair() -> Iterator[Op]:
    op = Op("test_pair", "a[N]: any, b[N]?: a, c[N]: a -> y[N]: a")
    yield op
    registry.ops.remove("test_pair")


def test_inputs_by_place_and_by_name(pair: Op) -> None:
    a, b, c = (f(name, 3) for name in "abc")
    assert pair(a, b, c).slots == ("a", "b", "c")
    assert pair(a, c=c).slots == ("a", "c") == pair(a, None, c).slots
    assert pair(c=c, a=a).inputs == (a, c)
    assert pair(a, c=c).at("b") is None and pair(a, c=c).at("c") is c


def test_inputs_that_do_not_fit(pair: Op) -> None:
    a = f("a", 3)
    with pytest.raises(GraphError, match=r"\[test_pair\] c is missing \(test_signature.py:\d+\)"):
        pair(a, a)
    with pytest.raises(GraphError, match=r"\[test_pair\] wanted 3 inputs \(a, b, c\); got 4 \(test_signature.py:\d+\)"):
        pair(a, a, a, a)
    with pytest.raises(GraphError, match=r"\[test_pair\] c must be a value of a graph; got 3.0 \(test_signature.py:\d+\)"):
        pair(a, c=3.0)


def test_an_axis_of_the_result_that_nothing_gives_is_said() -> None:
    for text in ("x[..., N]: real -> y[..., M]: x", "x[..., N]: real, w[M]?: real -> y[M]: x"):
        with pytest.raises(GraphError, match=r"\[op\] wanted an input or attribute that says M of y\[.*M\]: x; got none"):
            Signature.parse(text).infer("op", {"x": input("x", [4], "f32")}, {})
