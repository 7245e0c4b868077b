"""`tensorgraph new-op`: the files of a new op, whose conformance fails until they are filled in."""

from __future__ import annotations

import ast
import json
import keyword
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.signature import Signature

ELEMENTWISE = "x[...]: real -> y[...]: x"
OP = '''"""NAME: a sentence that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorgraph.op import Op

Array = NDArray[Any]

NAME = Op(
    "NAME",
    "SIGNATURE",
    source="the paper and equation, or the operator it is named after",
)
"""The formula, in one line."""


@NAME.reference
def reference(PARAMETERS) -> Array:
    raise NotImplementedError("fill in the reference of NAME: its result in NumPy; floats come as float64")


@NAME.law
def holds(run: Callable[..., Array], PARAMETERS) -> None:
    """What is always true of it."""
    raise NotImplementedError("fill in a law of NAME: assert something about run(ARGUMENTS), whatever the inputs are")
'''
FORMULA = '''"""The formula of NAME on the CPU."""

from __future__ import annotations

from tensorgraph.backends.cpu.elementwise import cpu_formula
from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import Kernel
from PACKAGE.NAME import NAME


@cpu_formula(NAME)
def emit(k: Kernel, VALUES) -> Value:
    raise NotImplementedError("fill in the kernel of NAME: a value made of values, with `+`, `k.max`, `k.fma`, ...")
'''
KERNEL = '''"""NAME on the CPU."""

from __future__ import annotations

from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from PACKAGE.NAME import NAME


@cpu_kernel(NAME)
def emit(k: Kernel, OPERANDS, y: Operand) -> None:
    with k.rows(y.shape[:-1]) as index:
        raise NotImplementedError("fill in the kernel of NAME: the row of y at this index, from rows of its inputs")
'''
PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
dependencies = ["tensorgraph-runtime"]

[project.entry-points."tensorgraph.plugins"]
{package} = "{package}"

[tool.setuptools]
packages = ["{package}"]
"""


def new_op(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The op's name, a Python name.", show_default=False)],
    family: Annotated[str, typer.Option(help="Its family: the folder that it stands in.", metavar="FAMILY", show_default=False)],
    signature: Annotated[
        str, typer.Option(help="Its inputs and result, as other ops state theirs (see `tensorgraph ops`).", metavar="TEXT")
    ] = ELEMENTWISE,
    package: Annotated[
        Path | None,
        typer.Option(
            help="Make it part of a plugin, a package of your own in this folder, which is made where it is missing.",
            metavar="FOLDER",
            show_default="ops/ of the checkout that this is run in",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the files of a new op: its declaration with a reference and a law, and its CPU kernel, each to be filled in.

    `tensorgraph test-ops --op NAME` then fails, and says what is missing, until all of them are right. Nothing else has to be
    written: the tests, the documentation and the tables of types come from the declaration. No file that is there is changed,
    but for the family's __init__.py, which gets a line that imports the op.

    \b
    tensorgraph new-op softsign --family elementwise
    tensorgraph new-op row_range --family reduce --signature "x[..., N]: real -> y[..., 1]: x"
    tensorgraph new-op wave --family wave_ops --package ~/wave
    """
    parsed = _checked(name, family, signature)
    if package is None:
        if not (Path("ops/__init__.py").is_file() and Path("tensorgraph/op.py").is_file()):
            raise InputError(
                "[new-op] wanted to be run at the root of a checkout of tensorgraph, or --package FOLDER; got neither"
            )
        home, full_name = Path("ops") / family, f"tensorgraph.ops.{family}"
    else:
        home, full_name = package / family, family
    wanted = {
        home / f"{name}.py": _op_text(name, signature, parsed),
        home / f"{name}_cpu.py": _kernel_text(name, full_name, parsed),
    }
    there = [str(path) for path in wanted if path.exists()]
    if there:
        raise InputError(f"[new-op] {' and '.join(there)} must not be there yet, so that nothing is lost; nothing was written")
    written = [*_write(wanted), _imported(home, full_name, name)]
    if package is not None and not (package / "pyproject.toml").exists():
        written += _write({package / "pyproject.toml": PROJECT.format(name=family.replace("_", "-"), package=family)})
    following = [*_following(name, family, package)]
    if as_json:
        typer.echo(json.dumps({"op": name, "files": list(map(str, written)), "next": following}))
        return
    typer.echo("\n".join([*(f"wrote {path}" for path in written), "", *following]))


def _checked(name: str, family: str, signature: str) -> Signature:
    """The signature, parsed.

    Raises: InputError: a name is not one, or is taken. GraphError: the signature cannot be read.
    """
    import tensorgraph.ops  # noqa: F401  (importing registers)
    from tensorgraph import registry
    from tensorgraph.signature import Signature

    for what, text in (("NAME", name), ("--family", family)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", text) or keyword.iskeyword(text):
            raise InputError(f"[new-op] {what} must be a lower-case Python name; got {text!r}")
    if name.endswith(("_cpu", "_cuda")):
        raise InputError(f"[new-op] NAME must not end like a kernel's file; got {name!r}")
    if name in registry.ops:
        raise InputError(f"[new-op] NAME must be new; there is an op {name!r} already: tensorgraph ops {name}")
    parsed = Signature.parse(signature)
    names = [a.name for a in parsed.inputs]
    for each in names:
        if not each.isidentifier() or keyword.iskeyword(each) or each in ("k", "run", "y") or names.count(each) > 1:
            wanted = "each a Python name of its own, and not k, run or y, which the files use themselves"
            raise InputError(f"[new-op] the inputs of --signature must be {wanted}; got {each!r}")
    _check_result(parsed)
    return parsed


def _check_result(signature: Signature) -> None:
    """Raises: InputError: an axis or the type of the result is that of no input, nor a number or a type itself."""
    from tensorgraph.dtypes import BY_NAME

    axes = {axis for a in signature.inputs for axis in a.axes}
    types = {a.name for a in signature.inputs} | set(BY_NAME)
    unknown = [axis for axis in signature.result.axes if axis not in axes and not axis.isdigit()]
    unknown += [signature.result.type] if signature.result.type not in types else []
    if unknown:
        shown = "..." if unknown[0] == "*" else unknown[0]
        instead = f"an axis or type of an input, or a number or a type; an attribute {shown} is added to the op's file afterwards"
        raise InputError(f"[new-op] {shown} in the result of --signature must be {instead}")


def _write(files: Mapping[Path, str]) -> Iterator[Path]:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        yield path


def _imported(home: Path, full_name: str, name: str) -> Path:
    """The family's `__init__.py` with the op imported, in order, and named in `__all__` where there is one."""
    path = home / "__init__.py"
    text = path.read_text() if path.exists() else f'"""{home.name}: a sentence that says what its ops have in common."""\n\n'
    lines, body = text.splitlines(), ast.parse(text).body
    named = next((n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), None)
    if isinstance(named, ast.List):  # first, since it stands below
        names = sorted({*ast.literal_eval(named), name})
        many = named.lineno != named.end_lineno
        shown = ["__all__ = [", *(f'    "{n}",' for n in names), "]"] if many else [f"__all__ = {json.dumps(names)}"]
        lines[named.lineno - 1 : named.end_lineno] = shown
    ours = [n for n in body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(f"{full_name}.")]
    before = [n.end_lineno or 0 for n in ours if (n.module or "") < f"{full_name}.{name}"]
    at = max(before) if before else ours[0].lineno - 1 if ours else len(lines)
    lines.insert(at, f"from {full_name}.{name} import {name}")
    path.write_text("\n".join(lines) + "\n")
    return path


def _op_text(name: str, signature: str, parsed: Signature) -> str:
    inputs = [a.name for a in parsed.inputs]
    parameters = ", ".join(f"{a.name}: Array{' | None' * a.optional}" for a in parsed.inputs)
    replaced = {"NAME": name, "ARGUMENTS": ", ".join(inputs), "SIGNATURE": signature}
    text = OP.replace("(PARAMETERS)", f"({parameters})")
    text = text.replace(", PARAMETERS)", f", {parameters})" if inputs else ")")
    return _filled(text, replaced)


def _kernel_text(name: str, package: str, parsed: Signature) -> str:
    """A formula of single elements where all inputs have the result's axes, else a kernel of rows."""
    elementwise = all(a.axes == parsed.result.axes and not a.optional for a in parsed.inputs) and bool(parsed.inputs)
    values = ", ".join(f"{a.name}: Value" for a in parsed.inputs)
    operands = "".join(f"{a.name}: Operand{' | None' * a.optional}, " for a in parsed.inputs)
    text = FORMULA.replace("VALUES", values) if elementwise else KERNEL.replace("OPERANDS, ", operands)
    return _filled(text, {"PACKAGE": package, "NAME": name})


def _filled(text: str, replaced: Mapping[str, str]) -> str:
    for word, by in replaced.items():
        text = text.replace(word, by)
    return text


def _unlisted(family: str, project: Path) -> Iterator[str]:
    """The lines that a plugin's own pyproject.toml lacks for a family."""
    try:
        settings = tomllib.loads(project.read_text())
    except tomllib.TOMLDecodeError:  # not ours to mend: all is said
        settings = {"tool": {"setuptools": {"packages": []}}}
    packages = settings.get("tool", {}).get("setuptools", {}).get("packages")
    if isinstance(packages, list) and family not in packages:
        yield f'The family is new: add "{family}" to packages in {project}'
    if family not in settings.get("project", {}).get("entry-points", {}).get("tensorgraph.plugins", {}).values():
        yield f'The family is new: add {family} = "{family}" to [project.entry-points."tensorgraph.plugins"] in {project}'


def _following(name: str, family: str, package: Path | None) -> Iterator[str]:
    """What to do next, a line each."""
    yield f"Fill in the reference, the law and the kernel; until then this fails: tensorgraph test-ops --op {name}"
    if package is not None:
        yield from _unlisted(family, package / "pyproject.toml")
        yield f"Make the plugin known, once: pip install -e {package}"
        return
    if f'"tensorgraph.ops.{family}"' not in Path("pyproject.toml").read_text():
        yield f'The family is new: add "tensorgraph.ops.{family}" to packages in pyproject.toml'
    yield "Then renew the documentation: tensorgraph ops --markdown > docs/ops.md"
