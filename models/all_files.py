"""Every file of this folder: importing them registers their architectures."""

from __future__ import annotations

import importlib
import pkgutil

from tensorgraph import models

for _module in pkgutil.iter_modules(models.__path__):
    if not _module.ispkg:
        importlib.import_module(f"{models.__name__}.{_module.name}")
