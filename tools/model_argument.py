"""What MODEL may be where no weights are needed: a GGUF file, a config.json, or the name of a published configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from tensorgraph.errors import InputError
from tensorgraph.models import Model
from tensorgraph.models.architecture import model_from_config, model_from_gguf
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.model import SMOLLM2, find_model

PUBLISHED = Path(str(files("tensorgraph.models"))) / "published"


def published() -> list[str]:
    """The names of the full-size configurations that come with the package."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


@contextmanager
def described_model(name: str, dtype: str = "f16") -> Iterator[Model]:
    """The model that a file or a name describes; without a file of weights, matrices are taken to be of `dtype`.

    Raises:
        InputError: nothing is there under that name.
    """
    config = PUBLISHED / f"{name}.json" if name in published() else Path(name)
    if config.suffix == ".json":
        if not config.is_file():
            raise InputError(f"[model] there is no file {name!r}")
        yield model_from_config(config, dtype)
        return
    if name != SMOLLM2 and not config.exists():
        known = ", ".join([SMOLLM2, *published()])
        raise InputError(f"[model] there is no file {name!r}; the names that are known: {known}")
    with GGUF.open(find_model(name)) as file:
        yield model_from_gguf(file)
