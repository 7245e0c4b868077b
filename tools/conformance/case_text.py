"""A case as one line of text: what was drawn for it, in order, so that the same case can be made again anywhere.

`rms_norm([5], 33, "f16", 7, "ties", false, 1e-06, false, "dense")` are the answers that `draw_any` gets to its questions.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import InputError
from tensorgraph.tools.conformance.draw import Draw

SCALARS: Mapping[str, type] = {
    name: getattr(np, name) for name in ("float64", "float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool_")
} | {"bfloat16": ml_dtypes.bfloat16}
NUMBERS: Mapping[str, float] = {"nan": math.nan, "inf": math.inf}
NAMES: Mapping[str, Any] = {"none": None, "true": True, "false": False, **NUMBERS, **SCALARS}


@dataclass
class Recorder:
    """Draws as `draw` does and remembers what it gave."""

    draw: Draw
    given: list[Any] = field(default_factory=list)

    def __call__(self, strategy: Any) -> Any:
        value = self.draw(strategy)
        self.given.append(value)
        return value


@dataclass
class Replay:
    """Gives what was drawn before, whatever it is asked for."""

    given: list[Any]
    at: int = 0

    def __call__(self, strategy: Any) -> Any:
        if self.at == len(self.given):
            raise InputError(f"[case] wanted more than {len(self.given)} values: the case was drawn from another declaration")
        self.at += 1
        return self.given[self.at - 1]


def case_text(op: str, given: list[Any]) -> str:
    """The line of a case.

    Raises: InputError: something was drawn that has no text.
    """
    return f"{op}({', '.join(map(_text, given))})"


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array({_text(value.dtype.type)}, {_text(value.shape)}, {_text(value.reshape(-1).tolist())})"
    if isinstance(value, np.generic):
        return _text(value.item())
    if isinstance(value, DType):
        return f"dtype({_text(value.name)})"
    if isinstance(value, type):
        return _named(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)  # nan and inf are names
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    raise InputError(f"[case] wanted numbers, texts, types and arrays of them to be drawn; got {value!r}")


def _named(scalar: type) -> str:
    name = next((name for name, known in SCALARS.items() if known is scalar), None)
    if name is None:
        raise InputError(f"[case] wanted a type that has a name here ({', '.join(SCALARS)}); got {scalar!r}")
    return name


def parse_case(text: str) -> tuple[str, Replay]:
    """The op's name of a line that `case_text` wrote, and what draws its case again.

    Raises: InputError: it is no such line.
    """
    try:
        match ast.parse(text.strip(), mode="eval").body:
            case ast.Call(func=ast.Name(id=op), args=args, keywords=[]):
                return op, Replay([_value(arg) for arg in args])
    except (SyntaxError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise InputError(f"[case] wanted a line as a failing test prints it; got {text!r} ({error})") from error
    raise InputError(f"[case] wanted a line as a failing test prints it, OP(VALUE, ...); got {text!r}")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.Name(id=name):
            return NAMES[name]
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _CALLS[name](*map(_value, args))
    raise ValueError(f"{ast.unparse(node)!r} is no value")


def _array(scalar: type, shape: tuple[int, ...], values: list[Any]) -> Any:
    return np.array(values).astype(scalar).reshape(shape)


_CALLS: Mapping[str, Callable[..., Any]] = {"array": _array, "dtype": as_dtype}
