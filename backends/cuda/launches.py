"""Launches: the calls of hand-written kernels, and the code of any call from what it depends on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, get_args

from tensorgraph.backends.cpu.ir import I64, PTR, Int
from tensorgraph.backends.cpu.kernel import CHUNK, Buffer, Call, Context, NodeKernel, Ref, code_of
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cuda.spread import WARP
from tensorgraph.backends.cuda.weights import LAYOUT, traits, traits_name
from tensorgraph.backends.cuda.writer import CudaKernel, Param
from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import UnsupportedError
from tensorgraph.state import Layout

BLOCK = 128
"""Threads of a block whose teams are warps."""
WIDE = 256
"""Threads of a team that is a block: of kernels with so much to do for each item."""
SHARED_BYTES = 48 << 10
C_TYPES = {"f64": "double", "f32": "float", "f16": "Half", "bf16": "Brain"}
C_TYPES |= {"i64": "i64", "i32": "int", "i16": "short", "i8": "i8", "u8": "u8", "bool": "bool"}
_INCLUDE = re.compile(r'^#include "([\w.]+:[\w.]+)"$', re.MULTILINE)
Part = int | str
"""An extent in code: a number, "n" for one that is a parameter, "d" for one that a parameter says where to read."""


@dataclass(frozen=True)
class Template:
    """A function of a hand-written file, called with the operands in order (`Absent{}` for those that are not there), then with
    `numbers`, which are literals of C, and where it may refuse its input, with where to say so and the codes of its messages.

    Attributes:
        file: as `package:name`.
        function: with its template arguments; with "{name}" in it, the whole call, in which these stand for operands: it has
            no numbers, messages or counters beside.
        before: what its file is to find declared.
        counters: of how many unsigned numbers, zeros before a launch and after it, it is given the address behind its operands.
        resident: blocks that a multiprocessor is to hold at least, for which the compiler saves registers.
    """

    file: str
    function: str
    numbers: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()
    resident: int = 1
    before: str = ""
    counters: int = 0

    def __call__(self, *_: Any) -> None:
        raise UnsupportedError(f"[cuda] {self.function} is no description of a kernel")


@dataclass(frozen=True, eq=False)
class Launch(Call):
    """A call of a hand-written kernel: `emit` is a `Template`, `items` are blocks of work, over which blocks stride.

    Attributes:
        threads: of a block.
        shared_bytes: dynamic shared memory.
    """

    threads: int = BLOCK
    shared_bytes: int = 0
    described = False


class OperandKey(NamedTuple):
    """All that code depends on of an operand."""

    name: str
    dtype: str
    layout: str
    shape: tuple[Part, ...]
    strides: tuple[Part, ...]
    offset: bool  # whether an offset is read when it runs


class Recipe(NamedTuple):
    """All that a kernel's source depends on."""

    emit: Any
    names: tuple[str, ...]
    keys: tuple[OperandKey | None, ...]
    attrs: tuple[tuple[str, Any], ...]
    lanes: int  # of a team; 0 for hand-written kernels
    threads: int
    scratch_bytes: int  # of a team
    shared: bool  # whether scratch is shared memory


class Written(NamedTuple):
    """A kernel's source, under its name, and what it is given; `label` says what it is made from."""

    name: str
    source: str
    params: tuple[Param, ...]
    label: str


def team(call: Call) -> tuple[int, int]:
    """Lanes and threads of a described call: a block for each of few large items, else a warp."""
    work = CHUNK // call.grain
    return (WIDE, WIDE) if work >= 2 * WIDE else (WARP, BLOCK)


@cache
def read_source(file: str) -> str:
    """A file of a package, as `package:name`, with those that it includes, which it names so."""
    package, _, name = file.partition(":")
    text = files(package).joinpath(name).read_text()
    return _INCLUDE.sub(lambda found: read_source(found[1]), text)


@cache
def prelude(*, host: bool = False) -> str:
    """What sources begin with, for the device; or for the host, whose header has its own wrappers."""
    return "".join(read_source(f"tensorgraph.backends.cuda:{name}.cuh") for name in ("wrappers", "prelude")[host:])


_written: dict[Recipe, Written] = {}


def write(recipe: Recipe) -> Written:
    """The kernel of a recipe.

    Raises: UnsupportedError: it asks for what CUDA kernels do not have.
    """
    if recipe not in _written:
        make = _from_template if isinstance(recipe.emit, Template) else _from_description
        source, params = make(recipe, "TG_KERNEL")
        name = "tg_" + hashlib.sha256(source.encode()).hexdigest()[:24]
        _written[recipe] = Written(name, source.replace("TG_KERNEL", name), params, _label(recipe))
    return _written[recipe]


def _label(recipe: Recipe) -> str:
    """What a kernel is made from, and the types that it reads and writes."""
    types = ", ".join(f"{key.name} {key.dtype}" for key in recipe.keys if key is not None and key.layout != "number")
    if isinstance(recipe.emit, Template):
        file, call = recipe.emit.file.partition(":")[2], recipe.emit.function
        return f"{file} {call} ({types})"
    steps = "".join(f" {getattr(step, 'op', '') or _named(step.emit)}" for step in dict(recipe.attrs).get("steps", ())[:12])
    return f"{_named(recipe.emit)}{steps} x{recipe.lanes} ({types})"


def _named(emit: Any) -> str:
    """The name of the function that writes a kernel."""
    while not hasattr(emit, "__qualname__"):
        emit = getattr(emit, "emit", None) or emit.func
    return str(emit.__qualname__)


def _from_description(recipe: Recipe, name: str) -> tuple[str, tuple[Param, ...]]:
    k = CudaKernel(recipe.lanes, recipe.threads, recipe.scratch_bytes, recipe.shared)
    operands = {n: None if key is None else _operand(k, key) for n, key in zip(recipe.names, recipe.keys, strict=True)}
    recipe.emit(k, operands, **dict(recipe.attrs))
    angles = read_source("tensorgraph.backends.cuda:angles.cuh") if k.has_angles else ""
    return angles + k.source(name) + _for_the_host(name, len(k.params)), tuple(k.params)


def _operand(k: CudaKernel, key: OperandKey) -> Operand:
    dtype = as_dtype(key.dtype)

    def number(part: Part, which: str, at: int = 0) -> Int:
        if isinstance(part, int):
            return part
        if part == "n":
            return k.param(Param("number", key.name, (which, at)), I64)
        return k.load(k.param(Param("extent", key.name, (which, at)), PTR), I64)

    if key.layout == "number":
        return Operand(k, dtype, (number(key.shape[0], "shape"),), (), k.zero(PTR), key.layout)
    address = k.param(Param("address", key.name), PTR)
    table = k.param(Param("table", key.name), PTR) if key.layout in get_args(Layout) else None
    if key.offset:
        by = number("d", "offset")
        assert not isinstance(by, int)
        address = address + by * (4 if dtype.is_block else dtype.block_bytes)
    shape = tuple(number(part, "shape", i) for i, part in enumerate(key.shape))
    strides = tuple(number(part, "strides", i) for i, part in enumerate(key.strides))
    return Operand(k, dtype, shape, strides, address, key.layout, table)


def _for_the_host(name: str, n: int) -> str:
    """How the host's runtime calls the kernel: with an array of its parameters."""
    listed = ", ".join(f"a[{i}]" for i in range(n))
    return f'#ifdef TG_HOST\nextern "C" void {name}__host(const i64* a) {{ {name}({listed}); }}\n#endif\n'


def _from_template(recipe: Recipe, name: str) -> tuple[str, tuple[Param, ...]]:
    template: Template = recipe.emit
    params: list[Param] = []

    def param(kind: str, of: str, part: Any = None) -> str:
        params.append(Param(kind, of, part))
        return f"p{len(params) - 1}"

    def number(part: Part, of: str, which: str, at: int = 0) -> str:
        if isinstance(part, int):
            return f"{part}"
        found = param("number" if part == "n" else "extent", of, (which, at))
        return found if part == "n" else f"*(const i64*){found}"

    named: dict[str, str] = {}
    for name_of, key in zip(recipe.names, recipe.keys, strict=True):
        if key is None:
            named[name_of] = "Absent{}"
        elif key.layout == "number":
            named[name_of] = f"(i64)({number(key.shape[0], key.name, 'shape')})"
        else:
            named[name_of] = _tensor(key, param, number)
    given = list(named.values())
    if template.counters:
        given.append(f"(unsigned*){param('counters', 'counters')}")
    refusing = [f"{code_of(message)}LL" for message in template.messages]
    if refusing:
        refusing.insert(0, f"(u64*){param('status', 'status')}")
    if "{" in template.function:
        assert not (template.numbers or template.messages or template.counters)
        body = template.function.format(**named) + ";"
    else:
        body = f"{template.function}({', '.join([*given, *template.numbers, *refusing])});"
    listed = ", ".join(f"i64 p{i}" for i in range(len(params)))
    head = f'extern "C" __global__ void __launch_bounds__({recipe.threads}, {template.resident}) {name}({listed}) {{'
    entry = f"{head}\n    {body}\n}}\n"
    held = dict.fromkeys(as_dtype(key.dtype) for key in recipe.keys if key is not None and key.layout == LAYOUT)
    types = "".join(map(traits, held))
    return f"{types}{template.before}{read_source(template.file)}\n{entry}{_for_the_host(name, len(params))}", tuple(params)


def _tensor(key: OperandKey, param: Any, number: Any) -> str:
    dtype = as_dtype(key.dtype)
    address = param("address", key.name)
    table = param("table", key.name) if key.layout in get_args(Layout) else None
    shape = ", ".join(number(part, key.name, "shape", i) for i, part in enumerate(key.shape)) or "1"
    c, n = c_name(dtype), len(key.shape)
    if key.layout == LAYOUT:
        return f"Weights<{traits_name(dtype)}, {n}>{{(const u8*){address}, {{{shape}}}}}"
    if table is not None:
        return f"Stream<{c}, {n}>{{(char*){address}, (const i64*){table}, {{{shape}}}}}"
    strides = ", ".join(number(part, key.name, "strides", i) for i, part in enumerate(key.strides)) or "1"
    offset = f" + {number('d', key.name, 'offset')}" if key.offset else ""
    return f"Tensor<{c}, {n}>{{({c}*){address}{offset}, {{{shape}}}, {{{strides}}}}}"


def c_name(dtype: DType) -> str:
    """An element's type in hand-written kernels; block types that are no constants are held in f32."""
    return "float" if dtype.is_block else C_TYPES[dtype.name]


__all__ = [
    "CHUNK",
    "Buffer",
    "Call",
    "Context",
    "Launch",
    "NodeKernel",
    "OperandKey",
    "Part",
    "Recipe",
    "Ref",
    "Template",
    "Written",
    "c_name",
    "prelude",
    "read_source",
    "team",
    "write",
]
