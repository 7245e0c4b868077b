"""What kernels are written from, and on disk the key of what came out: a warm start finds its code without writing any.

A recipe's own key holds a digest of all of this package's source that kernels can be written by. So recipes are followed only
where no other code takes part: not where another package has registered an op or a form of weights, and not where a file of ours
has changed since this process began, which may or may not have read it before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

from tensorgraph import dtypes, registry
from tensorgraph.backends.cpu import weights
from tensorgraph.backends.cpu.elementwise import ElementwiseKernel
from tensorgraph.backends.cpu.program import Recipe

PACKAGE = "tensorgraph."
MARGIN_S = 1.0  # clocks of file systems are coarse
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
    except (ValueError, TypeError):
        return None
    well = isinstance(object_key, str) and isinstance(messages, list) and all(isinstance(m, str) for m in messages)
    return Entry(object_key, messages) if well else None


def keys_of(recipes: Sequence[Recipe], compiler_key: str) -> dict[Recipe, str]:
    """A key for each recipe that has one: the same in every process, and another wherever text or object might be."""
    source, keys = source_key(), dict[Recipe, str]()
    for recipe in recipes if source is not None else ():
        with suppress(_Undescribed):
            said = f"{source}|{compiler_key}|{_described(recipe)}"
            keys[recipe] = hashlib.sha256(said.encode()).hexdigest()
    return keys


def source_key() -> str | None:
    """What depends on this package's source holds for, and on all types; None where other code takes part, or may."""
    digest = _digest()
    if digest is None or _last_change_s() > sys.modules["tensorgraph"].IMPORTED_S - MARGIN_S or not only_ours():
        return None
    weights.interleaved(dtypes.f32)  # which fills the table
    forms = tuple((name, form.codes) for name, form in sorted(weights.FORMS.items()))
    try:
        return f"{digest}|{_described((*sorted(dtypes.BY_NAME.values(), key=str), *forms))}"
    except _Undescribed:
        return None


def only_ours() -> bool:
    """Whether all that kernels find by name is this package's."""
    ops = [registry.ops.get(name) for name in registry.ops]
    found = [k.formula for op in ops if isinstance(k := op.kernels.get("cpu"), ElementwiseKernel)]
    for form in weights.FORMS.values():
        found += [value for value in vars(form).values() if callable(value)]
    return all(map(_is_ours, found)) and all(op.module.startswith(PACKAGE) for op in ops)


class _Undescribed(Exception):
    """A value that has no text of its own."""


def _described(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _is_ours(type(value)):
        fields = (f"{f.name}={_described(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.compare)
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
def _digest() -> str | None:
    """Of the source of the core, the ops and the backends, and of the interpreter; None where it cannot be read."""
    try:
        return digest_of(_folders()) + sys.version
    except OSError:
        return None


def digest_of(folders: Sequence[str]) -> str:
    """Of the names and contents of all Python files in folders and theirs.

    Raises: OSError: one cannot be read, or there is none.
    """
    digest = hashlib.sha256()
    for path in _files(folders):
        with open(path, "rb", buffering=0) as file:
            content = file.read()
        digest.update(f"{path}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def _last_change_s() -> float:
    """When the last of our files was changed or put in its place; never before now where that cannot be read."""
    try:
        return max(os.stat(path).st_ctime for path in _all_files())
    except OSError:
        return float("inf")


@cache
def _all_files() -> tuple[str, ...]:
    return tuple(_files(_folders()))


def _folders() -> list[str]:
    specs = [find_spec(name) for name in ("tensorgraph", *SOURCES)]
    return [os.path.dirname(spec.origin) if spec is not None and spec.origin is not None else "" for spec in specs]


def _files(folders: Sequence[str]) -> Iterator[str]:
    """Python files, in an order that is always the same."""
    for folder in folders:
        found = []
        for place, _, names in os.walk(folder, onerror=_raise):
            found += [os.path.join(place, name) for name in names if name.endswith(".py")]
        if not found:
            raise FileNotFoundError(f"no Python file lies in {folder}")
        yield from sorted(found)


def _raise(error: OSError) -> NoReturn:
    raise error
