"""The architectures, one file each, and `text/`: weights, tokenizers, templates, sampling, generation."""

if __name__ == "models":
    raise ImportError("import tensorgraph.models, not models: this folder is a part of the package tensorgraph")

import importlib
import pkgutil

from tensorgraph.models.architecture import Architecture, Model
from tensorgraph.models.text.model import TextModel, TextSession, find_smollm2, load

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Architecture", "Model", "TextModel", "TextSession", "find_smollm2", "load"]
