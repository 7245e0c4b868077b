"""What a model file builds with: scoped weights, the step's inputs, state streams and named taps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from tensorgraph import registry
from tensorgraph.dims import Dim, Extent, Shape, shape_text
from tensorgraph.dtypes import DType, f32, i32
from tensorgraph.engine import LOGITS
from tensorgraph.errors import GraphError, ShapeError, UnknownNameError
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, Node, append, constant, input
from tensorgraph.ops.attention import Segment
from tensorgraph.source import hide_source, source_line
from tensorgraph.state import StateSpec

hide_source(__file__)


Wanted = Literal["matrix", "table", "optional"]
"""Why a weight is looked for: a float that must be there, integers that must be there, or one that may be absent."""


class WeightCatalog(Protocol):
    """Which weights there are, and how they are stored."""

    def find(self, name: str, shape: tuple[int, ...], wanted: Wanted) -> tuple[tuple[int, ...], DType] | None:
        """Shape and dtype of a weight, None where there is none."""


@dataclass(frozen=True)
class AssumedWeights:
    """The weights of a configuration without a file: matrices of one dtype, vectors in f32.

    Attributes:
        present: ends of the names of those optional weights that there are.
    """

    dtype: DType
    present: tuple[str, ...] = ()

    def find(self, name: str, shape: tuple[int, ...], wanted: Wanted) -> tuple[tuple[int, ...], DType] | None:
        if wanted == "optional" and not name.endswith(self.present):
            return None
        return shape, i32 if wanted == "table" else self.dtype if len(shape) > 1 else f32


@dataclass(frozen=True)
class FileWeights:
    """The weights of a file, by name."""

    tensors: Mapping[str, tuple[tuple[int, ...], DType]]

    def find(self, name: str, shape: tuple[int, ...], wanted: Wanted) -> tuple[tuple[int, ...], DType] | None:
        return self.tensors.get(name)


@dataclass
class _Shared:
    """What all scopes of one graph have in common."""

    catalog: WeightCatalog
    extents: Extents
    kv_dtype: DType
    states: Mapping[str, StateSpec]
    weights: dict[str, Node] = field(default_factory=dict)
    inputs: dict[str, Node] = field(default_factory=dict)
    appends: list[Node] = field(default_factory=list)


class Builder:
    """`g` in model files. T is the number of new tokens of all sequences, O that of the rows whose logits are wanted."""

    def __init__(self, shared: _Shared, prefix: str = "") -> None:
        self._shared, self.prefix = shared, prefix

    @staticmethod
    def begin(catalog: WeightCatalog, extents: Extents, kv_dtype: DType, states: Mapping[str, StateSpec]) -> Builder:
        return Builder(_Shared(catalog, extents, kv_dtype, states))

    def block(self, i: int) -> Builder:
        """The scope of layer `i`: names below it begin with `blk.i.`."""
        return Builder(self._shared, f"{self.prefix}blk.{i}.")

    # The step's inputs.

    @property
    def T(self) -> Dim:  # noqa: N802 (the field's letter)
        return self._shared.extents.new_tokens

    @property
    def tokens(self) -> Node:
        """Token ids [T]."""
        return self._input("tokens", self.T)

    @property
    def positions(self) -> Node:
        """Each new token's position in its sequence [T]."""
        return self._input("positions", self.T)

    @property
    def seqs(self) -> Node:
        """Which sequence of the batch each new token belongs to [T]."""
        return self._input("seqs", self.T)

    @property
    def out_ids(self) -> Node:
        """The rows, of T, whose logits are wanted [O]."""
        return self._input("out_ids", self._shared.extents.out_tokens)

    def _input(self, name: str, extent: Extent) -> Node:
        inputs = self._shared.inputs
        if name not in inputs:
            inputs[name] = input(name, (extent,), i32)
        return inputs[name]

    # Weights.

    def weight(self, name: str, *shape: int) -> Node:
        """The weight `name` (with `.weight` or `.bias` and this scope's prefix).

        Raises:
            UnknownNameError: it is missing. ShapeError: it has another shape.
        """
        return self._present(name, shape, "matrix")

    def table(self, name: str, *shape: int) -> Node:
        """A weight of whole numbers (i32), such as experts by token."""
        return self._present(name, shape, "table")

    def optional(self, name: str, *shape: int) -> Node | None:
        """As `weight`, None where the model has none."""
        return self._find(name, shape, "optional")

    def _present(self, name: str, shape: tuple[int, ...], wanted: Wanted) -> Node:
        node = self._find(name, shape, wanted)
        if node is None:
            raise UnknownNameError(f"[weight] {self.prefix}{name} is missing; wanted {shape_text(shape)} ({source_line()})")
        return node

    def _find(self, name: str, shape: tuple[int, ...], wanted: Wanted) -> Node | None:
        full, weights = self.prefix + name, self._shared.weights
        if full not in weights:
            found = self._shared.catalog.find(full, shape, wanted)
            if found is None:
                return None
            weights[full] = constant(full, shape=found[0], dtype=found[1])
        if weights[full].shape != shape:
            given = shape_text(weights[full].shape)
            raise ShapeError(f"[weight] {full} must be {shape_text(shape)}; the file has {given} ({source_line()})")
        return weights[full]

    @property
    def root(self) -> Builder:
        """The scope without a prefix."""
        return Builder(self._shared)

    def literal(self, name: str, value: np.ndarray) -> Node:
        """A constant that the model computes from its configuration; one of a name in a graph."""
        node = self._shared.weights.setdefault(f"literal:{name}", constant(f"literal:{name}", value))
        if not np.array_equal(np.asarray(node.data), value):
            raise GraphError(f"[literal] {name!r} stands for other numbers already ({source_line()})")
        return node

    def linear(self, name: str, x: Node, n_out: int, *, biased: bool = False) -> Node:
        """`x @ weight.T`, plus the bias if there is one, which must be if `biased`. Shapes: x [..., n_in] -> [..., n_out]."""
        n_in = x.shape[-1]
        assert isinstance(n_in, int)
        y: Node = registry.ops.get("mul_mat")(self.weight(f"{name}.weight", n_out, n_in), x)
        bias = self.weight(f"{name}.bias", n_out) if biased else self.optional(f"{name}.bias", n_out)
        return y if bias is None else y + bias

    # State.

    def append(self, stream: str, rows: Node) -> Node:
        """Append the rows that this step completes and read all visible ones. Shapes: rows [N, *row] -> [S, *row]."""
        spec = self._spec(stream)
        seen = self._shared.extents.seen_rows(spec.stream_class)
        wanted: Shape = (self._shared.extents.new_rows(spec.stream_class), *spec.row_shape)
        if rows.shape != wanted:
            given = shape_text(rows.shape)
            raise ShapeError(f"[append] {self.prefix}{stream} takes {shape_text(wanted)}; got {given} ({source_line()})")
        node = append(self.prefix + stream, rows, seen, spec.stored_dtype(self._shared.kv_dtype))
        self._shared.appends.append(node)
        return node

    def row_pos(self, stream: str) -> Node:
        """The index in its sequence of each visible row [S]."""
        return self._rows(stream, "pos")

    def row_seq(self, stream: str) -> Node:
        """The sequence of each visible row [S]."""
        return self._rows(stream, "seq")

    def new_rows(self, stream: str) -> Node:
        """The index in its sequence of each row that the step completes [N]."""
        return self._rows(stream, "new")

    def new_row_positions(self, stream: str) -> Node:
        """The position of the first token of each row that the step completes [N]."""
        return self._rows(stream, "new_first")

    def new_row_seqs(self, stream: str) -> Node:
        """The sequence of each row that the step completes [N]."""
        return self._rows(stream, "new_seq")

    def segment(
        self, stream: str, k: Node, v: Node | None = None, *, window: int | None = None, ids: Node | None = None
    ) -> Segment:
        """What `flash_attn` reads of a stream: rows of this sequence, complete at the query's position."""
        every = self._spec(stream).every
        return Segment(k, v, self.row_pos(stream), self.row_seq(stream), window=window, every=every, ids=ids)

    def _rows(self, stream: str, what: str) -> Node:
        stream_class, extents = self._spec(stream).stream_class, self._shared.extents
        extent = extents.new_rows(stream_class) if what.startswith("new") else extents.seen_rows(stream_class)
        return self._input(f"rows.{stream_class.name}.{what}", extent)

    def _spec(self, stream: str) -> StateSpec:
        full = self.prefix + stream
        if full not in self._shared.states:
            known = ", ".join(list(self._shared.states)[:12])
            raise UnknownNameError(f"[state] no stream {full!r} is declared; declared: {known} ({source_line()})")
        return self._shared.states[full]

    # Results.

    def tap(self, name: str, x: Node) -> Node:
        """`x` under a name in this scope, for taps and errors."""
        return x.named(self.prefix + name)

    def finish(self, result: Node, name: str = LOGITS) -> Graph:
        """The graph of one step. Shapes: result [O, V], of an encoder [O, D]."""
        return Graph({name: result.named(name)}, effects=self._shared.appends)
