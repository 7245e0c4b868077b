"""Which folder may import what: the table of the architecture as data, and the walk that checks a file against it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ops", "backends", "models", "tools")  # every other sub-package of tensorgraph is the core
FOLDERS = ("tensorgraph", *PARTS)
FACADES = ("tensorgraph/__init__.py", "tensorgraph/testing.py")
"""They offer what lies elsewhere: the first everything, lazily."""
NUMBERS = frozenset({"numpy", "ml_dtypes"})


@dataclass(frozen=True)
class Rule:
    """What files of one folder may import beside the standard library, the core and their own folder."""

    parts: frozenset[str] = frozenset()
    outside: frozenset[str] = NUMBERS
    in_functions: frozenset[str] = frozenset()  # what only the tests' extra installs: never needed to import the file


RULES = {
    "tensorgraph": Rule(outside=NUMBERS | {"networkx", "safetensors"}),
    "ops": Rule(in_functions=frozenset({"hypothesis"})),
    "backends": Rule(outside=NUMBERS | {"llvmlite", "cupy"}),
    "models": Rule(parts=frozenset({"ops"}), outside=NUMBERS | {"safetensors", "tokenizers", "jinja2"}),
}  # tools and tests import anything
KERNELS = {"_cpu.py": "tensorgraph.backends.cpu", "_cuda.py": "tensorgraph.backends.cuda"}


def python_files() -> list[Path]:
    """Every Python file that is installed, relative to the root."""
    return sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def package_folders() -> dict[str, str]:
    """Package name -> folder, for every folder that holds Python files."""
    folders = sorted({path.parent.as_posix() for path in python_files()})
    return {".".join(installed_parts(Path(folder))): folder for folder in folders}


def installed_parts(path: Path) -> tuple[str, ...]:
    """Where a path of the repository stands once it is installed."""
    return path.parts if path.parts[0] == "tensorgraph" else ("tensorgraph", *path.parts)


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str, bool]]:
    """Each import as (line, full dotted name, whether in a function); `from a import b` is `a.b`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}", node in late) for alias in node.names)


def trespasses(path: Path, source: str, standard: frozenset[str]) -> list[str]:
    """What `path` (relative to the root) imports and may not, a sentence each."""
    rule = RULES.get(path.parts[0])
    if rule is None or path.as_posix() in FACADES:
        return []
    found = []
    for line, name, late in imported(ast.parse(source), ".".join(installed_parts(path.parent))):
        top, *rest = name.split(".")
        if top in PARTS:
            reason = f"import tensorgraph.{name}: the folders are parts of one package"
        elif top != "tensorgraph":
            allowed = top in standard | rule.outside | (rule.in_functions if late else frozenset())
            reason = "" if allowed else f"{path.parts[0]}/ may import only {sorted(rule.outside)}"
        elif rest and rest[0] in PARTS:
            own = rest[0] == path.parts[0] or rest[0] in rule.parts
            kernel = any(path.name.endswith(end) and name.startswith(helpers) for end, helpers in KERNELS.items())
            reason = "" if own or kernel else f"{path.parts[0]}/ may not import {rest[0]}"
        elif rest and ((ROOT / "tensorgraph" / rest[0]).is_dir() or (ROOT / f"tensorgraph/{rest[0]}.py").is_file()):
            reason = ""
        else:
            reason = "the facade reaches every part; import from the module that defines the name"
        if reason:
            found.append(f"{path.as_posix()}:{line}: {name}: {reason}")
    return found
