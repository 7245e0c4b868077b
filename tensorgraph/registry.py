"""What is registered by import or by plugin: ops, backends, architectures."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from tensorgraph.errors import GraphError, UnknownNameError

if TYPE_CHECKING:
    from tensorgraph.device import Device
    from tensorgraph.op import Op

T = TypeVar("T")

PLUGINS = "tensorgraph.plugins"
_loaded_plugins = False


def load_plugins() -> None:
    """Import every entry point of the group `tensorgraph.plugins`, once; importing is what registers."""
    global _loaded_plugins
    before, _loaded_plugins = _loaded_plugins, True
    if not before and _any_may_be_there():
        from importlib.metadata import entry_points  # takes half as long to import as NumPy

        for point in entry_points(group=PLUGINS):
            try:
                point.load()
            except Exception as error:
                raise GraphError(f"[plugin] {point.name} ({point.value}) cannot be loaded: {error}") from error


def _any_may_be_there() -> bool:
    """Whether a distribution names the group, or is kept in a way that only `importlib.metadata` can read."""
    try:
        places = [place for place in map(Path, sys.path) if place.exists()]
        if any(not place.is_dir() or place.suffix == ".egg" for place in places):
            return True
        return any(PLUGINS in f.read_text(errors="replace") for place in places for f in place.glob("*-info/entry_points.txt"))
    except (OSError, TypeError, ValueError):
        return True


class Registry(Generic[T]):
    """Names to things of one kind. A name that is missing loads `home` and the plugins before it is an error."""

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        if self._items.setdefault(name, item) is not item:
            raise GraphError(f"[{self.kind}] {name!r} is registered already")
        return item

    def remove(self, name: str) -> None:
        self._items.pop(name, None)

    def get(self, name: str) -> T:
        if name not in self._items:
            self._load()
        if name not in self._items:
            close = difflib.get_close_matches(name, self._items, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UnknownNameError(f"[{self.kind}] there is no {name!r}{hint} Known: {', '.join(sorted(self._items))}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def _load(self) -> None:
        importlib.import_module(self.home)
        load_plugins()


ops: Registry[Op] = Registry("op", "tensorgraph.ops")
backends: Registry[Callable[[str], Device]] = Registry("backend", "tensorgraph.backends")
decoders: Registry[Callable[[np.ndarray], np.ndarray]] = Registry("block type", "tensorgraph.ops.formats")
"""By dtype: `uint8 [..., row_bytes]` -> f32 [..., n], exactly."""
encoders: Registry[Callable[[np.ndarray], np.ndarray]] = Registry("type of streams", "tensorgraph.ops.formats")
"""Of block types that streams may have: floats [..., n] -> `uint8 [..., row_bytes]`, rounded."""
architectures: Registry[Any] = Registry("architecture", "tensorgraph.models.all_files")
