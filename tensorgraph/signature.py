"""Signatures: `"x[..., D]: float, w[D]?: float -> y[..., D]: x"` gives an op its shape rule, its errors and its inputs.

An axis is a name (bound at its first use, equal afterwards), a number, `*NAME` or `...` (any leading axes), or, in the
result, the name of an attribute. `?` marks an input that may be absent. A type is a dtype, `float` (block types too),
`real` (floats that are not blocks), `int`, `any`, or the name of an input or attribute that has the same dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorgraph.dims import Shape, shape_text
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import DTypeError, GraphError, ShapeError

if TYPE_CHECKING:
    from tensorgraph.graph import Node

_ARGUMENT = re.compile(r"\s*(\w+)\[([^\]]*)\](\?)?\s*:\s*(\w+)\s*(?:,|$)")

_KINDS: dict[str, Callable[[DType], bool]] = {
    "any": lambda d: True,
    "float": lambda d: d.is_float,
    "real": lambda d: d.kind == "float",
    "int": lambda d: d.kind == "int",
}


@dataclass(frozen=True)
class Argument:
    name: str
    axes: tuple[str, ...]
    type: str
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.axes)}]{'?' * self.optional}: {self.type}"


@dataclass(frozen=True)
class Signature:
    """Inputs and result of an op, parsed."""

    inputs: tuple[Argument, ...]
    result: Argument

    @staticmethod
    def parse(text: str) -> Signature:
        left, arrow, right = text.partition("->")
        inputs, results = _arguments(left), _arguments(right)
        if not arrow or len(results) != 1:
            raise GraphError(f"[signature] wanted 'a[...]: type, ... -> y[...]: type'; got {text!r}")
        return Signature(inputs, results[0])

    def infer(self, op: str, slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
        """The result's shape and dtype.

        Raises: ShapeError, DTypeError: an input does not fit; the message names the op, the input and both shapes.
        """
        axes: dict[str, Any] = {}
        roles = {a.name: a.optional for a in self.inputs}
        if not set(slots) <= set(roles) or any(role not in slots for role, optional in roles.items() if not optional):
            raise GraphError(f"[{op}] wanted the inputs {', '.join(map(str, self.inputs))}; got {', '.join(slots) or 'none'}")
        for argument in self.inputs:
            if (node := slots.get(argument.name)) is not None:
                self._check_type(op, argument, node, slots)
                self._match(op, argument, node, axes)
        known = {**attrs, **axes}
        if missing := [axis for axis in self.result.axes if axis not in known and not axis.isdigit()]:
            raise GraphError(f"[{op}] wanted an input or attribute that says {missing[0]} of {self.result}; got none")
        found = [known[axis] if axis in known else int(axis) for axis in self.result.axes]
        shape: Shape = tuple(n for value in found for n in (value if isinstance(value, tuple) else (value,)))
        kind = self.result.type
        dtype = slots[kind].dtype if kind in slots else attrs[kind] if kind in attrs else as_dtype(kind)
        return shape, dtype

    def _match(self, op: str, argument: Argument, node: Node, axes: dict[str, Any]) -> None:
        pack = next((i for i, a in enumerate(argument.axes) if a.startswith("*")), None)
        shape: list[Any] = list(node.shape)
        fixed = len(argument.axes) - (pack is not None)
        fits = len(shape) == fixed if pack is None else len(shape) >= fixed
        if fits and pack is not None:
            extra = len(shape) - fixed
            shape[pack : pack + extra] = [tuple(shape[pack : pack + extra])]
        for axis, extent in zip(argument.axes, shape, strict=False) if fits else ():
            wanted = int(axis) if axis.isdigit() else axes.setdefault(axis, extent)
            fits = fits and wanted == extent
        if not fits:
            wanted_axes = [known for axis in argument.axes if (known := str(_known(axis, axes)))]
            raise ShapeError(
                f"[{op}] {argument.name} must be [{', '.join(wanted_axes)}]; got {shape_text(node.shape)} {_where(node)}"
            )

    def _check_type(self, op: str, argument: Argument, node: Node, slots: Mapping[str, Node]) -> None:
        kind = argument.type
        same = slots.get(kind)
        fits = _KINDS[kind](node.dtype) if kind in _KINDS else node.dtype == (same.dtype if same else as_dtype(kind))
        if not fits:
            wanted = f"{same.dtype}, as {kind}" if same else kind
            raise DTypeError(f"[{op}] {argument.name} must be {wanted}; got {node.dtype} {_where(node)}")

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} -> {self.result}"


def _known(axis: str, axes: Mapping[str, Any]) -> Any:
    value = axes.get(axis, axis)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _arguments(text: str) -> tuple[Argument, ...]:
    found, position = [], 0
    text = text.strip()
    while position < len(text):
        match = _ARGUMENT.match(text, position)
        if match is None:
            raise GraphError(f"[signature] cannot read {text[position:]!r}")
        axes = tuple("*" if a.strip() == "..." else a.strip() for a in match[2].split(",") if a.strip())
        found.append(Argument(match[1], axes, match[4], bool(match[3])))
        position = match.end()
    return tuple(found)


def _where(node: Node) -> str:
    from tensorgraph.source import source_line

    places = [source_line()] + ([f'"{node.name}"'] if node.name else [])
    return f"({', '.join(p for p in places if p)})"
