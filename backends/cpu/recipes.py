"""What kernels are written from, and on disk the key of what came out: a warm start finds its code without writing any.

A recipe's own key holds a digest of all of this package's source that kernels can be written by. So recipes are followed only
where no other code takes part: not where another package has registered an op or a form of weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from tensorgraph import registry
from tensorgraph.backends.cpu import weights
from tensorgraph.backends.cpu.elementwise import ElementwiseKernel
from tensorgraph.backends.cpu.program import Recipe

PACKAGE = "tensorgraph."
SOURCES = ("tensorgraph.ops", "tensorgraph.backends")  # folders beside the core where nothing is installed
_PLAIN = (int, float, str, bytes, bool, type(None))


class Entry(NamedTuple):
    """What is kept of a recipe: the key of the object that came out, and what else writing it left in the process."""

    object_key: str
    messages: Sequence[str]

    def content(self) -> bytes:
        return json.dumps(self).encode()


def read_entry(content: bytes | None) -> Entry | None:
    """What `Entry.content` gave; None where it is something else."""
    try:
        object_key, messages = json.loads(content or b"")
    except ValueError:
        return None
    well = isinstance(object_key, str) and isinstance(messages, list) and all(isinstance(m, str) for m in messages)
    return Entry(object_key, messages) if well else None


def key_of(recipe: Recipe, target_key: str) -> str | None:
    """The same for the same recipe in every process, and another wherever its text might be; None where that is not known."""
    try:
        said = f"{_digest()}|{target_key}|{_described(recipe)}"
    except _Undescribed:
        return None
    return hashlib.sha256(said.encode()).hexdigest()


def only_ours() -> bool:
    """Whether all that kernels find by name is this package's."""
    ops = [registry.ops.get(name) for name in registry.ops]
    formulas = [k.formula for op in ops if isinstance(k := op.kernels.get("cpu"), ElementwiseKernel)]
    writers = [form.write for form in weights.FORMS.values()]
    return all(map(_is_ours, (*formulas, *writers))) and all(op.module.startswith(PACKAGE) for op in ops)


class _Undescribed(Exception):
    """A value that has no text of its own."""


def _described(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _is_ours(type(value)):
        fields = (f"{f.name}={_described(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{_place(type(value))}({', '.join(fields)})"
    if isinstance(value, partial):
        return f"partial {_described((value.func, value.args, *sorted(value.keywords.items())))}"
    if callable(value) and _is_ours(value) and _at(_place(value)) is value:
        return _place(value)
    raise _Undescribed(repr(value))


def _place(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _at(place: str) -> Any:
    """What stands at the top of a module, under a name; None where nothing does."""
    module, _, name = place.partition(":")
    return getattr(sys.modules.get(module), name, None)


def _is_ours(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").startswith(PACKAGE)


@cache
def _digest() -> str:
    """Of the source of the core, the ops and the backends, and of the interpreter."""
    folders = [os.path.dirname(str(sys.modules[name].__file__)) for name in ("tensorgraph", *SOURCES)]
    return digest_of(folders) + sys.version


def digest_of(folders: Sequence[str]) -> str:
    """Of the names and contents of all Python files in folders and theirs."""
    digest = hashlib.sha256()
    for folder in folders:
        for place, _, names in sorted(os.walk(folder)):
            for name in sorted(names):
                if name.endswith(".py"):
                    with open(os.path.join(place, name), "rb", buffering=0) as file:
                        content = file.read()
                    digest.update(f"{os.path.join(place, name)}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()
