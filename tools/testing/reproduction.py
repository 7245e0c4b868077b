"""Wrong nodes as a file: a small graph with its inputs, weights and rows of state, and what each side gave."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tensorgraph.compiler import CompileOptions
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import FormatError, InputError, TensorGraphError
from tensorgraph.graph import Graph
from tensorgraph.state import StateSpec
from tensorgraph.tools.testing.graph_file import graph_as_json, graph_from_json
from tensorgraph.tools.testing.side import Arrays, Backend, Given, Side

ABOUT = "about.json"
KINDS = ("input", "constant", "row", "got", "wanted")
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, TensorGraphError, LookupError, TypeError, ValueError, AttributeError),
    *(RecursionError, ArithmeticError, NotImplementedError, MemoryError),
)
"""What reading a damaged file raises."""


@dataclass(frozen=True, eq=False)
class Reproduction:
    """A graph that a backend computes wrongly, with all that it takes.

    Attributes:
        backend, options: what computed it.
        given: inputs and extents of the step.
        weights: the graph's constants, as `bind` takes them.
        states: the streams that it uses; `rows` of them were visible before, at a length of so many tokens.
        got, wanted: outputs of the two sides.
        about: lines for people.
    """

    graph: Graph
    given: Given
    weights: Arrays
    got: Arrays
    wanted: Arrays
    backend: str
    options: CompileOptions = field(default_factory=CompileOptions)
    states: Mapping[str, StateSpec] = field(default_factory=dict)
    kv_dtype: DType = field(default_factory=lambda: as_dtype("f16"))
    rows: Arrays = field(default_factory=dict)
    length: int = 0
    about: tuple[str, ...] = ()

    def side(self, backend: Backend, options: CompileOptions) -> Side:
        """A backend with the weights and the state; the one that computed it holds streams as it did."""
        layouts = self.options.layouts if backend == self.backend else None
        states = self.states or None  # of a graph without state, no sequence
        side = Side(backend, options, self.weights, graph=self.graph, states=states, kv_dtype=self.kv_dtype, layouts=layouts)
        if self.length:
            side.keep_rows(self.rows, self.length)
        return side

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it, whole or not at all, as an .npz file with a text in JSON.

        Raises: InputError: it cannot be written.
        """
        groups = dict(zip(KINDS, (self.given.inputs, self.weights, self.rows, self.got, self.wanted), strict=True))
        arrays = {f"{kind}:{name}": np.asarray(x) for kind, group in groups.items() for name, x in group.items()}
        text = {
            "graph": graph_as_json(self.graph),
            "dims": dict(self.given.dims),
            "tokens": self.given.n_tokens,
            "backend": self.backend,
            "options": {"exact": self.options.exact, "fuse": self.options.fuse, "without": list(self.options.without)},
            "layouts": dict(self.options.layouts),
            "states": {name: _as_list(spec, self.kv_dtype) for name, spec in self.states.items()},
            "length": self.length,
            "dtypes": {name: as_dtype(x.dtype).name for name, x in arrays.items()},
            "about": list(self.about),
        }
        bits = {name: x.view(f"u{x.dtype.itemsize}") for name, x in arrays.items() if x.dtype.kind not in "biuf"}
        plain: dict[str, Any] = {**arrays, **bits}
        target, part = Path(path), Path(f"{os.fspath(path)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez_compressed(file, **{ABOUT: np.frombuffer(json.dumps(text, indent=1).encode(), np.uint8), **plain})
            os.replace(part, target)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise InputError(f"[reproduction] {target} cannot be written: {error}") from error
        return target


def _as_list(spec: StateSpec, kv_dtype: DType) -> list[Any]:
    return [list(spec.row_shape), spec.stored_dtype(kv_dtype).name, spec.every, spec.keep]


def load_reproduction(path: str | os.PathLike[str]) -> Reproduction:
    """What `Reproduction.save` wrote.

    Raises: InputError: there is no such file. FormatError: it holds something else, or is damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"[reproduction] there is no file {os.fspath(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        text = json.loads(arrays.pop(ABOUT).tobytes())
        groups: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for name, dtype in text["dtypes"].items():
            kind, _, own = name.partition(":")
            wanted = as_dtype(dtype).numpy
            groups[kind][own] = arrays[name] if arrays[name].dtype == wanted else arrays[name].view(wanted)
        states = {
            name: StateSpec(tuple(map(int, shape)), as_dtype(dtype), int(every), None if keep is None else int(keep))
            for name, (shape, dtype, every, keep) in text["states"].items()
        }
        options, length = text["options"], int(text["length"])
        dims = {str(name): int(n) for name, n in text["dims"].items()}
        return Reproduction(
            graph=graph_from_json(text["graph"]),
            given=Given(groups["input"], dims, int(text["tokens"])),
            weights=groups["constant"],
            got=groups["got"],
            wanted=groups["wanted"],
            backend=str(text["backend"]),
            options=CompileOptions(
                fuse=bool(options["fuse"]),
                exact=bool(options["exact"]),
                without=tuple(options["without"]),
                layouts=text["layouts"],
            ),
            states=states,
            rows=groups["row"],
            length=length,
            about=tuple(map(str, text["about"])),
        )
    except FormatError:
        raise
    except DAMAGE as error:
        raise FormatError(f"[reproduction] {os.fspath(path)} is damaged, or no reproduction: {error}") from error
