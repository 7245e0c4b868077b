"""tensorgraph: a ggml-style graph compiler and backend runtime.

This module is a lazy facade: `tensorgraph.compile`, `tensorgraph.load`, `tensorgraph.ops` ... are imported at first use.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
IMPORTED_S = time.time()  # when the first of this package's files was read

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "ops" / "__init__.py").is_file():
    # An uninstalled checkout: the sibling folders are sub-packages.
    __path__.append(str(_ROOT))

_HOMES = {
    "compiler": ("CompileOptions", "PlanCache", "compile", "run_op"),
    "device": ("Device",),
    "dims": ("Dim",),
    "dtypes": ("DType",),
    "errors": ("TensorGraphError",),
    "graph": ("Graph", "Node", "choose", "constant", "input"),
    "models": ("Model", "load"),
    "op": ("Attr", "Op"),
    "plan": ("Plan",),
    "session": ("Session",),
    "state": ("StateSpec",),
    "state_store": ("StateStore",),
}
_EXPORTS = {name: f"tensorgraph.{home}" for home, names in _HOMES.items() for name in names}
_MODULES = ("backends", "models", "ops", "testing")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"tensorgraph.{name}")
    raise AttributeError(f"module 'tensorgraph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
