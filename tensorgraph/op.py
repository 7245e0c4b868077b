"""Operators: one declaration carries meaning, shape rule, errors, reference, laws, costs and lowerings."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorgraph import registry
from tensorgraph.dims import ALWAYS, Bindings, Extent, Guard, Shape, evaluate
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import AttributeValueError, GraphError
from tensorgraph.graph import Node
from tensorgraph.signature import Signature
from tensorgraph.source import source_line

Slots = Mapping[str, Node]
Prepared = tuple[Mapping[str, "Node | None"], Mapping[str, Any]]

_MISSING = object()


@dataclass(frozen=True)
class Attr:
    """An attribute of an op: its type, default and range (`low` and `high` are allowed values)."""

    type: type
    default: Any = _MISSING
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None

    @property
    def required(self) -> bool:
        return self.default is _MISSING

    def check(self, op: str, name: str, value: Any) -> Any:
        if value is None and self.default is None:
            return None
        try:
            value = as_dtype(value) if self.type is DType else self._coerce(value)
        except (TypeError, ValueError) as error:
            kind = self.type.__name__
            raise AttributeValueError(f"[{op}] {name} must be {kind}; got {value!r} ({source_line()})") from error
        low, high = self.low is None or value >= self.low, self.high is None or value <= self.high
        if not (low and high) or (self.choices is not None and value not in self.choices):
            wanted = f"one of {self.choices}" if self.choices is not None else f"within [{self.low}, {self.high}]"
            raise AttributeValueError(f"[{op}] {name} must be {wanted}; got {value!r} ({source_line()})")
        return value

    def _coerce(self, value: Any) -> Any:
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.type is int and hasattr(value, "__index__") and not isinstance(value, bool):
            return int(value.__index__())
        if self.type is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        if not isinstance(value, self.type) or (isinstance(value, bool) and self.type is not bool):
            raise TypeError
        return value


@dataclass(frozen=True)
class Lowering:
    """One guarded form of an op in other ops; `build` takes what the op takes and returns the same value."""

    name: str
    build: Callable[..., Node]
    guard: Callable[[Node], Guard | bool]


@dataclass(frozen=True)
class Cost:
    """Work of one node: floating point operations, and bytes read and written."""

    flops: int
    size_bytes: int


class Op:
    """An operator.

    Args:
        name: the field's standard name.
        signature: inputs, result and their shapes (`tensorgraph.signature`); without one, give a `shape` rule.
        attrs: attributes, checked when a node is built.
        inplace: result to input: the result may take that input's memory.
        rows: inputs of which each row makes one row of the result by itself, as `row_inputs` has them.
        tolerance: largest NMSE of a backend's f32 result against the reference.
        source: paper and equation, or the operator it is named after.

    Calling an op builds a node: inputs in the signature's order or by name, attributes by name.
    """

    def __init__(
        self,
        name: str,
        signature: str | None = None,
        *,
        attrs: Mapping[str, Attr] | None = None,
        inplace: Mapping[str, str] | None = None,
        rows: Sequence[str] | None = None,
        tolerance: float = 1e-10,
        source: str = "",
    ) -> None:
        self.name, self.tolerance, self.source = name, tolerance, source
        self.module: str = sys._getframe(1).f_globals["__name__"]  # kernels stand beside it: MODULE_cpu, MODULE_cuda
        self.signature = Signature.parse(signature) if signature else None
        self.attrs = dict(attrs or {})
        self.inplace = frozenset((inplace or {}).values())
        self._rows = rows
        self.laws: list[Callable[..., None]] = []
        self.lowerings: list[Lowering] = []
        self.kernels: dict[str, Any] = {}
        self.reference_fn: Callable[..., Any] | None = None
        self.expansion: Callable[..., Node] | None = None
        self.cases_fn: Callable[..., Any] | None = None
        self.typical_fn: Callable[..., Any] | None = None
        self._shape: Callable[[Slots, Mapping[str, Any]], tuple[Shape, DType]] | None = None
        self._prepare: Callable[..., Prepared] | None = None
        self._flops: Callable[[Node], Extent] | None = None
        self._bytes: Callable[[Node, Bindings], int] | None = None
        registry.ops.add(name, self)

    # What an op's file declares, as decorators.

    def reference(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """NumPy meaning: arrays (floats as float64) in the signature's order, None where absent, and attributes.

        An op without a signature gets one mapping of slots to arrays instead.
        """
        self.reference_fn = fn
        return fn

    def law(self, fn: Callable[..., None]) -> Callable[..., None]:
        """A property of the results, asserted for every backend: `fn(run, *arrays, **attrs)`."""
        self.laws.append(fn)
        return fn

    def cases(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Test inputs where a signature is not enough: `fn(draw) -> (slots to arrays, attrs)`, `draw` as hypothesis's."""
        self.cases_fn = fn
        return fn

    def typical(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Inputs as large models have them, where a signature is not enough: as `cases`, of `rng`; floats are filled later."""
        self.typical_fn = fn
        return fn

    def shape(self, fn: Callable[[Slots, Mapping[str, Any]], tuple[Shape, DType]]) -> Any:
        """The shape rule of an op without a signature: `fn(slots, attrs) -> (shape, dtype)`."""
        self._shape = fn
        return fn

    def prepare(self, fn: Callable[..., Prepared]) -> Callable[..., Prepared]:
        """Turns a call's arguments into slots and attributes, where they are not the signature's own."""
        self._prepare = fn
        return fn

    def flops(self, fn: Callable[[Node], Extent]) -> Callable[[Node], Extent]:
        """Floating point operations of a node; one an element of the result where not declared."""
        self._flops = fn
        return fn

    def bytes_moved(self, fn: Callable[[Node, Bindings], int]) -> Callable[[Node, Bindings], int]:
        """Bytes that a node reads and writes in a step; each input and the result once where not declared."""
        self._bytes = fn
        return fn

    def expand(self, fn: Callable[..., Node]) -> Callable[..., Node]:
        """Declares a fused op: the same value in plain ops. Its meaning, its fallback, and the pattern replaced by it."""
        self.expansion = fn
        return fn

    def lowering(self, name: str, guard: Callable[[Node], Guard | bool] = lambda node: ALWAYS) -> Callable[..., Any]:
        """Declares a guarded form; the first declared whose guard holds is run, the op itself where none does."""

        def declare(fn: Callable[..., Node]) -> Callable[..., Node]:
            self.lowerings.append(Lowering(name, fn, guard))
            return fn

        return declare

    # Building nodes.

    def __call__(self, *inputs: Any, name: str = "", **given: Any) -> Node:
        slots, attrs = (self._prepare or self._bind)(*inputs, **given)
        return self.apply({s: n for s, n in slots.items() if n is not None}, attrs, name=name)

    def apply(self, slots: Slots, attrs: Mapping[str, Any], *, name: str = "") -> Node:
        """Build a node from slots and attributes, checking all of them.

        Raises: ShapeError, DTypeError, AttributeValueError: with the op, what was wanted and given, and the source line.
        """
        for slot, node in slots.items():
            if not isinstance(node, Node):
                raise GraphError(f"[{self.name}] {slot} must be a value of a graph; got {node!r} ({source_line()})")
        checked = self.check_attrs(attrs)
        shape, dtype = self.infer(slots, checked)
        return Node(self.name, tuple(slots.values()), shape, dtype, checked, tuple(slots), name)

    def infer(self, slots: Slots, attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
        if self._shape is not None:
            return self._shape(slots, attrs)
        if self.signature is None:
            raise GraphError(f"[{self.name}] has neither a signature nor a shape rule")
        return self.signature.infer(self.name, slots, attrs)

    def check_attrs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        checked = {}
        for name, value in given.items():
            if name not in self.attrs:
                known = ", ".join(self.attrs) or "none"
                raise AttributeValueError(f"[{self.name}] has no {name!r}; it has: {known} ({source_line()})")
            checked[name] = self.attrs[name].check(self.name, name, value)
        for name, attr in self.attrs.items():
            if name not in checked:
                if attr.required:
                    raise AttributeValueError(f"[{self.name}] {name} is missing ({source_line()})")
                checked[name] = attr.default
        return checked

    def _bind(self, *inputs: Any, **given: Any) -> Prepared:
        names = [a.name for a in self.signature.inputs] if self.signature else []
        if len(inputs) > len(names):
            wanted = f"wanted {len(names)} inputs ({', '.join(names)})"
            raise GraphError(f"[{self.name}] {wanted}; got {len(inputs)} ({source_line()})")
        slots = dict(zip(names, inputs, strict=False)) | {n: given[n] for n in names if n in given}
        for argument in self.signature.inputs if self.signature else ():
            if slots.get(argument.name) is None and not argument.optional:
                raise GraphError(f"[{self.name}] {argument.name} is missing ({source_line()})")
        return {n: slots.get(n) for n in names}, {k: v for k, v in given.items() if k not in names}

    def kernel(self, backend: str) -> Any:
        """How a backend computes this op, by the module MODULE_BACKEND beside the one declaring it; None where it does not."""
        if backend not in self.kernels:
            beside = f"{self.module}_{backend}"
            if beside not in sys.modules and importlib.util.find_spec(beside) is not None:
                importlib.import_module(beside)
        return self.kernels.setdefault(backend, None)

    # Meaning.

    @property
    def row_inputs(self) -> Sequence[str]:
        """Where the result is a matrix: inputs whose row i (of as many), and whatever others give all rows, makes its row i.

        Read from the signature where that gives the result and inputs `...` in front, and the others one axis at most.
        """
        if self._rows is not None or self.signature is None:
            return self._rows or ()
        leading = [a.name for a in self.signature.inputs if a.axes[:1] == ("*",)]
        others = [a for a in self.signature.inputs if a.name not in leading]
        simple = self.signature.result.axes[:1] == ("*",) and all(len(a.axes) < 2 and "*" not in "".join(a.axes) for a in others)
        return leading if simple else ()

    def arguments(self, slots: Mapping[str, Any]) -> tuple[Any, ...]:
        """Values by slot as `reference`, `expand` and `lowering` functions take them."""
        if self.signature is None:
            return (slots,)
        return tuple(slots.get(a.name) for a in self.signature.inputs)

    def compute(self, slots: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
        """The reference result, in float64 where it is a float."""
        if self.reference_fn is None:
            raise GraphError(f"[{self.name}] has no reference")
        return self.reference_fn(*self.arguments(slots), **attrs)

    def rebuild(self, fn: Callable[..., Node], node: Node) -> Node:
        """An expansion or lowering of this op applied to a node's own inputs and attributes."""
        return fn(*self.arguments(dict(zip(node.slots, node.inputs, strict=True))), **node.attrs)

    def cost(self, node: Node, dims: Bindings) -> Cost:
        """Work of one node in a step."""
        flops = self._flops(node) if self._flops else node.size
        touched = self._bytes(node, dims) if self._bytes else sum(node_bytes(n, dims) for n in (node, *node.inputs))
        return Cost(evaluate(flops, dims), touched)

    def __repr__(self) -> str:
        return f"<op {self.name}({self.signature or '...'})>"


def node_bytes(node: Node, dims: Bindings | None = None) -> int:
    """Bytes of a node's own elements, dense; at the largest extents where `dims` is None."""
    n = math.prod(e if isinstance(e, int) else e.max if dims is None else e.evaluate(dims) for e in node.shape)
    return n * node.dtype.block_bytes // node.dtype.block_size


def all_ops() -> Iterator[Op]:
    """Every registered op, by name."""
    return (registry.ops.get(name) for name in registry.ops)
