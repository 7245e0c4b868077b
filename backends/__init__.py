"""The backends: how each compiles, allocates, copies and runs a plan."""

if __name__ == "backends":
    raise ImportError("import tensorgraph.backends, not backends: this folder is a part of the package tensorgraph")

import importlib
import pkgutil

for _backend in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_backend.name}")
