"""Which types each input of an op may have, and which of them a backend computes: asked of the devices, for typical nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorgraph import registry
from tensorgraph.device import Device
from tensorgraph.dtypes import BY_NAME, DType, as_dtype
from tensorgraph.errors import GraphError, TensorGraphError
from tensorgraph.graph import Node, constant, input
from tensorgraph.op import Op
from tensorgraph.tools.conformance.coverage import devices_of, runs_expanded
from tensorgraph.tools.conformance.draw import Slots
from tensorgraph.tools.conformance.typical import typical_cases

CLASSES: Mapping[str, tuple[str, ...]] = {
    "real": ("f64", "f32", "f16", "bf16"),
    "int": ("i64", "i32", "i16", "i8", "u8"),
    "bool": ("bool",),
}
"""What groups of types are called, beside `blocks`: all block types."""


@dataclass(frozen=True)
class Types:
    """The types that one input (or attribute) of an op may have, and how each backend that is here computes them.

    `own` are those that a backend has a kernel for, `expanded` those for which it runs what the op expands into.
    """

    op: str
    slot: str
    accepted: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]]
    expanded: Mapping[str, tuple[str, ...]]


def support(ops: Sequence[str], backends: Sequence[str]) -> tuple[list[Types], dict[str, str]]:
    """Of each op in order, a line for each input whose type may vary; and why nothing is known of some ops, by name.

    Raises: UnknownNameError: there is no such op or backend.
    """
    devices = {name: device for name, device in devices_of(backends).items() if device is not None}
    lines: list[Types] = []
    unknown = {}
    for name in ops:
        try:
            lines += _of(registry.ops.get(name), devices)
        except GraphError as error:
            unknown[name] = str(error)
    return lines, unknown


def _of(op: Op, devices: Mapping[str, Device]) -> Iterator[Types]:
    slots, attrs = typical_cases(op)[0]
    varied = [s for s, x in slots.items() if as_dtype(x.dtype).kind != "bool"]
    varied += [name for name, attr in op.attrs.items() if attr.type is DType and attrs.get(name) is not None]
    for slot in varied:
        nodes = {dtype.name: node for dtype in _types() if (node := _node(op, slots, attrs, slot, dtype)) is not None}
        if len(nodes) > 1:
            own = {name: tuple(t for t, node in nodes.items() if device.supports(node)) for name, device in devices.items()}
            expanded = {
                name: tuple(t for t, node in nodes.items() if t not in own[name] and runs_expanded(node, device))
                for name, device in devices.items()
            }
            yield Types(op.name, slot, tuple(nodes), own, expanded)


def _types() -> list[DType]:
    import tensorgraph.ops.formats  # noqa: F401  (declares the block types)

    return list(BY_NAME.values())


def _node(op: Op, slots: Slots, attrs: Mapping[str, Any], slot: str, dtype: DType) -> Node | None:
    """The op with one input of another type, and with it whatever must be of the same; None where it takes none such."""
    tied = {a.name for a in op.signature.inputs if a.type == slot} if op.signature is not None else set()
    floats = {s for s, x in slots.items() if as_dtype(x.dtype).is_float}
    together = [floats] if op.signature is None and slot in floats else []
    for changed in ({slot} | tied, *together):
        given = {s: _value(s, x.shape, dtype if s in changed else as_dtype(x.dtype)) for s, x in slots.items()}
        try:
            return op.apply(given, {**attrs, slot: dtype} if slot in op.attrs and slot not in slots else attrs)
        except TensorGraphError:
            continue
    return None


def _value(name: str, shape: Sequence[int], dtype: DType) -> Node:
    return constant(name, shape=shape, dtype=dtype) if dtype.is_block else input(name, shape, dtype)


def types_text(names: Collection[str]) -> str:
    """Types in few words: `real, blocks`, `int but i8`, `f32, f16`; `none`."""
    classes = dict(CLASSES) | {"blocks": tuple(d.name for d in _types() if d.is_block)}
    said = []
    for label, members in classes.items():
        has = [name for name in members if name in names]
        lacks = [name for name in members if name not in names]
        if len(members) > 1 and len(has) > len(lacks) and len(has) > 1:
            said.append(label + (f" but {' '.join(lacks)}" if lacks else ""))
        elif has:
            said.append(" ".join(has))
    return ", ".join(said) or "none"


def computed_text(types: Types, backend: str) -> str:
    """What a backend computes of the types that an input may have: `all`, or which."""
    own, expanded = types.own[backend], types.expanded[backend]
    said = "all" if own == types.accepted else types_text(own) if own else ""
    more = "" if not expanded else "all by expansion" if expanded == types.accepted else f"{types_text(expanded)} by expansion"
    return "; ".join(filter(None, (said, more))) or "none"
