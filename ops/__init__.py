"""The ops: one folder a family, one op a file, its kernels beside it."""

if __name__ == "ops":
    raise ImportError("import tensorgraph.ops, not ops: this folder is a part of the package tensorgraph")

import importlib
import pkgutil

from tensorgraph import registry
from tensorgraph.op import Op

for _family in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_family.name}")


def __getattr__(name: str) -> Op:
    """`tensorgraph.ops.mul_mat`: any registered op, plugins' too."""
    if name.startswith("_"):
        raise AttributeError(name)
    return registry.ops.get(name)
