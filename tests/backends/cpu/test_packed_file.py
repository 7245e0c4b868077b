"""Packed constants on disk: what is mapped is what would be packed, and whatever else lies there is left out and written anew."""

from __future__ import annotations

import errno
import mmap
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu import code_cache, packed_file
from tensorgraph.backends.cpu.constants import Held, mapped_file
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.packed_file import MAGIC, SUFFIX
from tensorgraph.backends.cpu.weights import FORMS, pack, unpack
from tensorgraph.dtypes import as_dtype
from tensorgraph.ops.formats import decode

Array = np.ndarray[Any, Any]
HEAD = 256
TYPES = ("q4_k", "q8_0", "f16", "iq2_xs", "nvfp4")
SHAPE = (2, 19, 512)


@dataclass
class Model:
    """A file with a tensor of each type behind its head, and the folder where packed ones are kept."""

    path: Path
    folder: Path

    @classmethod
    def write(cls, at: Path) -> Model:
        n_bytes = HEAD + sum(2 * 19 * as_dtype(name).size_bytes(512) for name in TYPES)
        path = at / "model.gguf"
        path.write_bytes(np.random.default_rng(3).integers(0, 120, n_bytes, np.uint8).tobytes())
        return cls(path, at / "packed")

    def start(self, types: tuple[str, ...] = TYPES) -> Start:
        """What a process does with the tensors of some types: map, pack, compute with them."""
        with self.path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        device, held, at = CpuDevice(), {}, HEAD
        save = device.keep_packed(self.path, content, HEAD, self.folder)
        for name in TYPES:
            dtype = as_dtype(name)
            row = dtype.size_bytes(512)
            array = np.frombuffer(content, np.uint8, 2 * 19 * row, at).reshape(2, 19, row)
            at += array.size
            array = array if dtype.is_block else array.view(dtype.numpy)
            if name in types:
                want = decode(array, dtype) if dtype.is_block else array.astype(np.float32)
                held[name] = pack(array, dtype, "r16", device)
                np.testing.assert_array_equal(unpack(held[name], dtype, device), want)
                assert held[name].shape == SHAPE and held[name].address % 64 == 0
        return Start(save, held)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@dataclass
class Start:
    save: Callable[[], None]
    held: dict[str, Held]

    @property
    def mapped(self) -> set[str]:
        return {name for name, held in self.held.items() if mapped_file(held.data) is not None}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model.write(tmp_path)


def saved(model: Model) -> Path:
    model.start().save()
    (path,) = model.files
    return path


@pytest.mark.filterwarnings("error")
def test_what_was_packed_is_mapped_by_the_next_start(model: Model) -> None:
    first = model.start()
    assert first.mapped == set() and model.files == []
    first.save()
    (path,) = model.files
    assert path.name.startswith("model-") and path.suffix == SUFFIX and path.stat().st_mode & 0o777 == 0o600
    assert model.folder.stat().st_mode & 0o777 == 0o700
    before = path.stat()
    for _ in range(2):
        second = model.start()
        assert second.mapped == set(TYPES)
        second.save()
    assert path.stat().st_ino == before.st_ino and model.files == [path]


@pytest.mark.filterwarnings("error")
def test_what_was_not_there_is_added(model: Model) -> None:
    model.start(("q4_k", "f16")).save()
    more = model.start(("q4_k", "q8_0"))
    assert more.mapped == {"q4_k"}
    more.save()
    assert model.start().mapped == {"q4_k", "q8_0", "f16"}


@pytest.mark.filterwarnings("error")
def test_a_model_in_another_place_has_a_file_of_its_own(model: Model, tmp_path: Path) -> None:
    saved(model)
    (tmp_path / "copy").mkdir()
    copy = replace(model, path=tmp_path / "copy" / model.path.name)
    copy.path.write_bytes(model.path.read_bytes())
    assert copy.start().mapped == set()
    copy.start().save()
    assert len(model.files) == 2 and copy.start().mapped == model.start().mapped == set(TYPES)
    linked = replace(model, path=tmp_path / model.path.name.replace("model", "link"))
    linked.path.symlink_to(model.path)
    assert linked.start().mapped == set(TYPES)


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "the magic alone": lambda content: content[: len(MAGIC)],
    "half of the header": lambda content: content[:200],
    "half of it": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "another magic": flip(3),
    "a longer header": flip(len(MAGIC) + 7),
    "another digest": flip(len(MAGIC) + 10),
    "another header": flip(len(MAGIC) + 100),
    "another format": lambda content: content.replace(b"packed 1", b"packed 2"),
    "something else": lambda content: os.urandom(len(content)),
}


def refused_and_rebuilt(model: Model, said: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"\[packed cache\] .*{said}"):
        start = model.start()
    assert start.mapped == set()
    start.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.start().mapped == set(TYPES)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_written_anew(kind: str, model: Model) -> None:
    path = saved(model)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    refused_and_rebuilt(model, "is not used, and written anew: it is damaged")


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def append(path: Path) -> None:
    times = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_head(path: Path) -> None:
    times = path.stat()
    path.write_bytes(flip(HEAD - 1)(path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, append, change_head])
def test_a_changed_model_is_packed_anew(change: Callable[[Path], None], model: Model) -> None:
    saved(model)
    change(model.path)
    refused_and_rebuilt(model, "it was made of another model file, or for other layouts")


@pytest.mark.parametrize("part", ["codes", "parts", "unit_bytes"])
def test_other_layouts_are_packed_anew(part: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(model)
    form = FORMS["q8_0"]
    assert form.codes is not None and form.parts is not None
    parts = form.parts
    other: Any = {
        "codes": replace(form.codes, unit=2.0),
        "parts": lambda raw: parts(raw)[:, ::-1],
        "unit_bytes": form.unit_bytes + 16,
    }
    monkeypatch.setitem(FORMS, "q8_0", replace(form, **{part: other[part]}))
    with pytest.warns(RuntimeWarning, match="for other layouts"):
        assert model.start(("f16",)).mapped == set()


def test_files_that_others_could_have_written_are_not_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(model)
    path.chmod(0o666)
    refused_and_rebuilt(model, "wanted a file that this user alone can write; got -rw-rw-rw-")
    monkeypatch.setattr(packed_file, "is_private", lambda *_: True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.warns(RuntimeWarning, match="wanted a file that this user alone can write; got -rw-------, owner"):
        assert model.start().mapped == set()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_used(kind: str, model: Model, tmp_path: Path) -> None:
    path = saved(model)
    path.rename(tmp_path / "elsewhere")
    {"link": lambda: path.symlink_to(tmp_path / "elsewhere"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.warns(RuntimeWarning, match="is not used, and written anew"):
        start = model.start()
    assert start.mapped == set()
    if kind == "folder":
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            start.save()
        assert model.files == [path]
    else:
        start.save()
        assert model.start().mapped == set(TYPES) and (tmp_path / "elsewhere").exists()


def test_folders_that_others_can_write_or_that_cannot_be_made_are_not_used(model: Model, tmp_path: Path) -> None:
    model.folder.mkdir()
    model.folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"\[packed cache\] wanted a folder of this user's"):
        model.start().save()
    assert model.files == []
    beneath = replace(model, folder=model.path / "packed")
    with pytest.warns(RuntimeWarning, match="cannot be made; it is not used"):
        beneath.start().save()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")]
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_where_there_is_no_room_it_goes_on(where: str, error: OSError, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise error

    start = model.start()
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match=f"cannot be written: {error.strerror}"):
        patch.setattr(packed_file.os, where, fails)
        start.save()
    assert model.files == []
    start.save()  # it is not tried again
    assert model.files == []


def test_an_interrupt_leaves_what_was_there(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.start(("f16",)).save()
    (path,) = model.files
    before = path.read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    start = model.start()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packed_file.os, "fsync", interrupted)
        start.save()
    assert model.files == [path] and path.read_bytes() == before and model.start().mapped == {"f16"}
    start.save()
    assert model.start().mapped == set(TYPES)


def test_a_model_that_changed_meanwhile_is_not_kept(model: Model) -> None:
    start = model.start()
    touch(model.path)
    start.save()
    assert model.files == []
    again = model.start()
    model.path.unlink()
    with pytest.warns(RuntimeWarning, match="cannot be written: No such file"):
        again.save()
    assert model.files == []


def test_the_oldest_make_room(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for i in range(3):
        (tmp_path / f"{i}").mkdir()
        models.append(replace(model, path=tmp_path / f"{i}" / "model.gguf"))
        models[i].path.write_bytes(model.path.read_bytes())
    files = []
    for one in models[:2]:
        one.start().save()
        files += [path for path in model.files if path not in files]
    n_bytes = files[0].stat().st_size
    foreign = model.folder / "notes.txt"
    foreign.write_bytes(bytes(n_bytes))
    os.utime(files[0], (5, 5))
    os.utime(files[1], (3, 3))
    models[1].start()  # that is a use
    monkeypatch.setattr(packed_file, "LIMIT_BYTES", 2 * n_bytes)
    models[2].start().save()
    assert [m.start().mapped == set(TYPES) for m in models] == [False, True, True] and foreign.exists()


def test_no_home(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.path / "beneath a file"))
    assert code_cache.default_folder("packed") is None
    with model.path.open("rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with pytest.warns(RuntimeWarning, match="no cache folder"):
        CpuDevice().keep_packed(model.path, content, HEAD, None)()


def test_only_whole_arrays_of_the_file_are_kept(model: Model) -> None:
    with model.path.open("rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    device = CpuDevice()
    save = device.keep_packed(model.path, content, HEAD, model.folder)
    dtype = as_dtype("f16")
    whole = np.frombuffer(content, np.float16, 40 * 64, HEAD).reshape(40, 64)
    for array in (whole[::-1], whole[:, ::2], whole.copy()):
        np.testing.assert_array_equal(unpack(pack(array, dtype, "r16", device), dtype, device), array.astype(np.float32))
    save()
    assert model.files == []
