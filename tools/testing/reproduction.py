"""Wrong nodes as a file: a small graph with its inputs, weights and rows of state, and what each side gave."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tensorgraph.compiler import CompileOptions
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import FormatError, InputError
from tensorgraph.graph import Graph
from tensorgraph.state import MAX_LENGTH, Layout, StateSpec
from tensorgraph.tools.testing.graph_file import MOST, graph_as_json, graph_from_json
from tensorgraph.tools.testing.side import Array, Arrays, Backend, Given, Side
from tensorgraph.tools.testing.warrant import check_arrays, check_graph, check_state, limit_bytes

ABOUT = "about.json"
OPTIONS = ("exact", "fuse", "without", "lowerings", "scratch_bytes", "placement", "layouts")
KINDS = ("input", "constant", "row", "got", "wanted")
MOST_TEXT = 1 << 24


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
            "options": {name: getattr(self.options, name) for name in OPTIONS},
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
        except BaseException as error:  # an interrupt, too, leaves nothing behind
            with suppress(OSError):
                part.unlink()
            if isinstance(error, OSError):
                raise InputError(f"[reproduction] {target} cannot be written: {error}") from error
            raise
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
        most = limit_bytes(Path(path).stat().st_size)
        with zipfile.ZipFile(path) as stored:
            text = json.loads(_array(stored, ABOUT, np.dtype(np.uint8), min(most, MOST_TEXT)).tobytes())
            groups = _groups(stored, {str(name): as_dtype(dtype) for name, dtype in text["dtypes"].items()}, most)
        return _checked(text, groups, most)
    except Exception as error:  # files hold anything
        raise FormatError(f"[reproduction] {os.fspath(path)} is damaged, or no reproduction: {error}") from error


def _groups(stored: zipfile.ZipFile, dtypes: Mapping[str, DType], most: int) -> dict[str, dict[str, Array]]:
    """The arrays that a file lists, by kind and name."""
    if sorted(stored.namelist()) != sorted(f"{name}.npy" for name in (ABOUT, *dtypes)):
        raise FormatError(f"wanted the arrays {', '.join(dtypes)}; got {', '.join(stored.namelist())}")
    groups: dict[str, dict[str, Array]] = {kind: {} for kind in KINDS}
    for name, dtype in dtypes.items():
        kind, _, own = name.partition(":")
        if dtype.numpy is None:
            raise FormatError(f"wanted an element type of NumPy; got {dtype}")
        groups[kind][own] = _array(stored, name, dtype.numpy, most)
        most -= groups[kind][own].nbytes
    return groups


def _array(stored: zipfile.ZipFile, name: str, dtype: np.dtype[Any], most: int) -> Array:
    """One array, once its header says that it is of this type and takes so many bytes at most."""
    with stored.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise FormatError(f"wanted {name} as version 1.0 of .npy")
        shape, _, held = np.lib.format.read_array_header_1_0(file)
    if held not in (dtype, np.dtype(f"u{dtype.itemsize}")) or min(shape, default=0) < 0:
        raise FormatError(f"wanted {name} as {dtype}; got {held}{list(shape)}")
    if math.prod(shape) * held.itemsize > most:
        raise FormatError(f"wanted arrays of {most} bytes at most; got {name} as {held}{list(shape)}")
    with stored.open(f"{name}.npy") as file:
        found: Array = np.lib.format.read_array(file, allow_pickle=False)
    return found if held == dtype else found.view(dtype)


def _checked(text: Mapping[str, Any], groups: Mapping[str, Mapping[str, Array]], most: int) -> Reproduction:
    """What the text and the arrays of a file are, if they fit together."""
    graph = graph_from_json(text["graph"])
    dims = {str(name): _whole(n) for name, n in text["dims"].items()}
    length, n_tokens = _whole(text["length"]), _whole(text["tokens"])
    states = {
        name: StateSpec(tuple(map(_whole, shape)), as_dtype(_text(dtype)), _whole(every), None if keep is None else _whole(keep))
        for name, (shape, dtype, every, keep) in text["states"].items()
    }
    check_graph(graph, dims, most)
    check_arrays(graph.inputs, groups["input"], dims)
    check_arrays(graph.constants, groups["constant"], dims)
    check_state(graph, states, groups["row"], length, n_tokens, most)
    if not groups["got"].keys() | groups["wanted"].keys() <= graph.outputs.keys():
        raise FormatError(f"wanted values of {', '.join(graph.outputs)}; got {', '.join(groups['got'])}")
    return Reproduction(
        graph=graph,
        given=Given(groups["input"], dims, n_tokens),
        weights=groups["constant"],
        got=groups["got"],
        wanted=groups["wanted"],
        backend=_text(text["backend"]),
        options=_options(text["options"], states),
        states=states,
        rows=groups["row"],
        length=length,
        about=tuple(map(_text, text["about"])),
    )


def _options(found: Mapping[str, Any], states: Mapping[str, StateSpec]) -> CompileOptions:
    placement, layouts = ({_text(k): _text(v) for k, v in found[name].items()} for name in ("placement", "layouts"))
    if not layouts.keys() <= states.keys() or not set(layouts.values()) <= set(get_args(Layout)):
        raise FormatError(f"wanted layouts of streams; got {layouts}")
    return CompileOptions(
        placement=placement,
        scratch_bytes=_whole(found["scratch_bytes"], MOST),
        lowerings=_texts(found["lowerings"]),
        fuse=_bool(found["fuse"]),
        exact=_bool(found["exact"]),
        layouts=layouts,  # type: ignore[arg-type]
        without=_texts(found["without"]),
    )


def _whole(value: Any, most: int = MAX_LENGTH) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"wanted a whole number from 0 to {most}; got {value!r:.60}")
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise FormatError(f"wanted true or false; got {value!r:.60}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise FormatError(f"wanted a text; got {value!r:.60}")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) is not list:
        raise FormatError(f"wanted a list of texts; got {value!r:.60}")
    return tuple(map(_text, value))
