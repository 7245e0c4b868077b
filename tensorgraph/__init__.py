"""tensorgraph: a ggml-style graph compiler and backend runtime.

This module is a lazy facade: `tensorgraph.compile`, `tensorgraph.load`, `tensorgraph.ops` ... are imported at first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "ops" / "__init__.py").is_file():
    # An uninstalled checkout: the sibling folders are sub-packages.
    __path__.append(str(_ROOT))

_EXPORTS = {
    "Attr": "tensorgraph.op",
    "CompileOptions": "tensorgraph.compiler",
    "DType": "tensorgraph.dtypes",
    "Device": "tensorgraph.device",
    "Dim": "tensorgraph.dims",
    "Graph": "tensorgraph.graph",
    "Model": "tensorgraph.models",
    "Node": "tensorgraph.graph",
    "Op": "tensorgraph.op",
    "Plan": "tensorgraph.plan",
    "PlanCache": "tensorgraph.compiler",
    "Session": "tensorgraph.session",
    "StateSpec": "tensorgraph.state",
    "StateStore": "tensorgraph.state_store",
    "TensorGraphError": "tensorgraph.errors",
    "choose": "tensorgraph.graph",
    "compile": "tensorgraph.compiler",
    "constant": "tensorgraph.graph",
    "input": "tensorgraph.graph",
    "load": "tensorgraph.models",
    "run_op": "tensorgraph.run",
}
_MODULES = ("backends", "models", "ops")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"tensorgraph.{name}")
    raise AttributeError(f"module 'tensorgraph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
