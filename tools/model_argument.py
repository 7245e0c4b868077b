"""What MODEL may be where no weights are needed: a GGUF file, a folder, a config.json, or the name of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path

from tensorgraph.errors import InputError
from tensorgraph.models import Model
from tensorgraph.models.architecture import model_from_config
from tensorgraph.models.text.model import open_model
from tensorgraph.models.text.packaged import PACKAGED, find_model

PUBLISHED = Path(str(files("tensorgraph.models"))) / "published"


def published() -> list[str]:
    """The names of the full-size configurations that come with the package."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def gguf_path(name: str) -> Path | None:
    """The GGUF file that MODEL means, None where it is a configuration or a folder.

    Raises:
        InputError: nothing is there under that name, or its packages are not installed.
    """
    if name in published():
        return None
    path = find_model(name)
    if path.is_dir():
        return None
    if not path.is_file():
        known = ", ".join([*PACKAGED, *published()])
        raise InputError(f"[model] there is no file {name!r}; the names that are known: {known}")
    return None if name.endswith(".json") else path


@contextmanager
def described_model(name: str, dtype: str = "f16") -> Iterator[Model]:
    """The model that MODEL describes; without a file of weights, matrices are taken to be of `dtype`.

    Raises:
        InputError: nothing is there under that name. FormatError, UnknownNameError: it cannot be read.
    """
    path = gguf_path(name)
    if path is None and (name in published() or not find_model(name).is_dir()):
        yield model_from_config(PUBLISHED / f"{name}.json" if name in published() else name, dtype)
        return
    model = open_model(name)
    assert model.file is not None
    with closing(model.file):
        yield model
