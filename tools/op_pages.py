"""What is known of an op from its declaration alone: how it is called, its text, its code, and where it runs."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from tensorgraph import registry
from tensorgraph.dtypes import DType
from tensorgraph.errors import TensorGraphError
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.op import Attr, Op
from tensorgraph.signature import Argument
from tensorgraph.text import attr_text

KINDS = {"any": "any type", "float": "floats, block types too", "real": "floats", "int": "integers"}
SAMPLES, FUSED_SAMPLES = 20, 60
"""Nodes drawn of an op, and of one with an expansion: its kernel may refuse few of them, and the answer is not to be luck."""


@dataclass(frozen=True)
class Attribute:
    """An attribute of an op; one that is not required and has no default follows from the call's other arguments."""

    name: str
    type: str
    required: bool
    default: str | None  # as one writes it
    allowed: str

    @property
    def default_text(self) -> str:
        return self.default or ("required" if self.required else "follows from the call")


@dataclass(frozen=True)
class Declared:
    """What an op's module says of it.

    `call` shows all attributes, `short` those that must be given; `code` says what is computed where `text` may not: the
    declaration of an op that a function of its module made, or else, without a text, the reference.
    """

    name: str
    family: str
    module: str
    call: str
    short: str
    signature: str | None
    attributes: tuple[Attribute, ...]
    summary: str
    text: str
    code: str
    in_place: tuple[str, ...]
    tolerance: float
    laws: Mapping[str, str]  # their names and what they say of themselves
    expansion: bool  # whether it is defined by other ops
    lowerings: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Runs:
    """Where an op runs: by backend as `Support.how` says, the ops it expands into, the kernels' files beside its module.

    `unknown` says why where samples of the op could not be drawn, from which the first two are known.
    """

    backends: Mapping[str, str]
    expands_to: tuple[str, ...]
    kernels: tuple[str, ...]
    unknown: str = ""


def family_of(op: Op) -> str:
    """The folder of an op's module, or the module itself where it stands in none."""
    return ["", *op.module.split(".")][-2] or op.module


def declared(op: Op) -> Declared:
    """The op as its module declares it."""
    text, code = _text_and_code(op)
    said = text or inspect.getdoc(op.reference_fn) or ""
    return Declared(
        name=op.name,
        family=family_of(op),
        module=op.module,
        call=_call_text(op, short=False),
        short=_call_text(op, short=True),
        signature=signature_text(op),
        attributes=tuple(_attribute(op, name, attr) for name, attr in op.attrs.items()),
        summary=first_sentence(said) or op.source,
        text=said,
        code=code,
        in_place=tuple(sorted(op.inplace)),
        tolerance=op.tolerance,
        laws={law.__name__: first_sentence(inspect.getdoc(law) or "") for law in op.laws},
        expansion=op.expansion is not None,
        lowerings=tuple(lowering.name for lowering in op.lowerings),
        source=op.source,
    )


def tolerance_text(tolerance: float) -> str:
    return f"an NMSE of at most {tolerance:g}" if tolerance else "exact: the reference's result, rounded to the result's type"


def runs(op: Op, backends: Sequence[str]) -> Runs:
    """Where the op runs, asked of the backends' devices for sample nodes."""
    from tensorgraph.tools.conformance import coverage
    from tensorgraph.tools.conformance.coverage import sample_nodes

    kernels = tuple(_kernel_files(op))
    try:
        samples = SAMPLES if op.expansion is None else FUSED_SAMPLES
        found = {s.backend: s.how for s in coverage([op.name], backends, samples=samples)}
        expands_to = tuple(_expansion(op, sample_nodes(op, SAMPLES, 0))) if op.expansion is not None else ()
    except TensorGraphError as error:
        return Runs({}, (), kernels, str(error))
    return Runs(found, expands_to, kernels)


def _expansion(op: Op, nodes: Sequence[Node]) -> Iterator[str]:
    """The ops that nodes of an op expand into, each once, in order."""
    assert op.expansion is not None
    graphs = [Graph(y=op.rebuild(op.expansion, node)) for node in nodes]
    named = [[n.op for n in graph.nodes if n.op not in STRUCTURAL] for graph in graphs]
    yield from dict.fromkeys(name for names in sorted(named, key=len, reverse=True) for name in names)


def _kernel_files(op: Op) -> Iterator[str]:
    for backend in registry.backends:
        spec = importlib.util.find_spec(f"{op.module}_{backend}")
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).name


# How an op is called.


def signature_text(op: Op) -> str | None:
    """The signature as one writes it; None where a shape rule stands in its place."""
    if op.signature is None:
        return None
    inputs = ", ".join(map(argument_text, op.signature.inputs))
    return f"{inputs} -> {argument_text(op.signature.result)}".lstrip()


def argument_text(argument: Argument) -> str:
    axes = ", ".join("..." if axis == "*" else axis for axis in argument.axes)
    return f"{argument.name}[{axes}]{'?' * argument.optional}: {argument.type}"


def _parameters(op: Op) -> list[inspect.Parameter]:
    """The parameters of a call; an attribute's default is that of its declaration, or else that of the call."""
    slot, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    if op._prepare is not None:
        given = list(inspect.signature(op._prepare).parameters.values())
    else:
        inputs = op.signature.inputs if op.signature else ()
        last = max((i for i, a in enumerate(inputs) if not a.optional), default=-1)  # what comes before it is given, if as None
        given = [inspect.Parameter(a.name, slot, default=_empty(i <= last, None)) for i, a in enumerate(inputs)]
        given.append(inspect.Parameter("attrs", inspect.Parameter.VAR_KEYWORD))
    found = []
    for parameter in given:
        attr = op.attrs.get(parameter.name)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest = {name: a for name, a in op.attrs.items() if name not in {p.name for p in given}}
            found += [inspect.Parameter(n, keyword, default=_empty(a.required, a.default)) for n, a in rest.items()]
        elif attr is not None:
            default = parameter.default if attr.required else attr.default
            found.append(parameter.replace(default=_empty(attr.required and default is None, default)))
        else:
            found.append(parameter)
    return found


def _empty(is_empty: bool, default: Any) -> Any:
    return inspect.Parameter.empty if is_empty else default


def _call_text(op: Op, *, short: bool) -> str:
    shown, starred, left_out = [], False, False
    for p in _parameters(op):
        is_given = p.default is not inspect.Parameter.empty
        if short and is_given and p.name in op.attrs:
            left_out = True
            continue
        if p.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        star = "*" if p.kind is inspect.Parameter.VAR_POSITIONAL else ""
        shown.append(f"{star}{p.name}" + (f"={_value_text(p.default)}" if is_given else ""))
    return f"{op.name}({', '.join(shown + ['...'] * left_out)})"


def _value_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value) if isinstance(value, float) else attr_text(value)


def _attribute(op: Op, name: str, attr: Attr) -> Attribute:
    called = {p.name: p.default for p in _parameters(op)}
    required = called.get(name) is inspect.Parameter.empty
    default = None if required or name not in called else _value_text(called[name])
    return Attribute(name, "dtype" if attr.type is DType else attr.type.__name__, required, default, _allowed(attr))


def _allowed(attr: Attr) -> str:
    if attr.choices is not None:
        return ", ".join(map(_value_text, attr.choices))
    if attr.low is not None and attr.high is not None:
        return f"{attr.low:g} to {attr.high:g}"
    return f"at least {attr.low:g}" if attr.low is not None else f"at most {attr.high:g}" if attr.high is not None else ""


# What the source says.


def first_sentence(text: str) -> str:
    """The first line where a sentence ends with it, else the first paragraph."""
    first, _, _ = text.partition("\n")
    return first if first.endswith(".") else " ".join(text.partition("\n\n")[0].split())


@cache
def _statements(module: ModuleType) -> tuple[str, tuple[ast.stmt, ...]]:
    """A module's source and its statements; none where it cannot be read."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return "", ()
    return source, tuple(ast.parse(source).body)


def _text_and_code(op: Op) -> tuple[str, str]:
    """The string that follows the op's assignment, and the code that `Declared` describes."""
    module = sys.modules.get(op.module)
    source, statements = _statements(module) if module is not None else ("", ())
    for statement, after in zip(statements, (*statements[1:], None), strict=False):
        match statement:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Call() as call) if getattr(module, name, None) is op:
                pass
            case ast.AnnAssign(target=ast.Name(name), value=ast.Call() as call) if getattr(module, name, None) is op:
                pass
            case _:
                continue
        text = _string(after)
        if ast.unparse(call.func).split(".")[-1] == "Op":
            return text, "" if text else _source_of(op.reference_fn)
        return text, "\n\n\n".join((ast.get_source_segment(source, statement) or "", *_functions(op, module, call)))
    return "", _source_of(op.reference_fn)


def _string(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return inspect.cleandoc(text)
    return ""


def _functions(op: Op, module: ModuleType | None, call: ast.Call) -> Iterator[str]:
    """The sources of the module's functions that a declaration hands over, laws left out."""
    given = (*call.args, *(keyword.value for keyword in call.keywords))
    for name in dict.fromkeys(n.id for value in given for n in ast.walk(value) if isinstance(n, ast.Name)):
        function = getattr(module, name, None)
        if isinstance(function, FunctionType) and function.__module__ == op.module and function not in op.laws:
            yield _source_of(function)


def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function).strip() if function is not None else ""
    except (OSError, TypeError):
        return ""
