"""Code on disk: what is damaged, foreign or unwritable is as if it were not there, and no run fails for it."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu.code_cache import DAY_S, HEADER_BYTES, MAGIC, CodeCache, default_folder

ROOT = Path(__file__).resolve().parents[3]
OBJECT = b"\x7fELF" + bytes(range(256)) * 40
WRITER = """
import sys, pathlib
from tensorgraph.backends.cpu.code_cache import CodeCache
cache, who = CodeCache(pathlib.Path(sys.argv[1])), int(sys.argv[2])
good = {bytes([key, writer]) * (5000 + 3000 * writer) for key in range(6) for writer in range(2)}
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    for key in range(6):
        cache.put(f"k{key}", bytes([key, who]) * (5000 + 3000 * who))
        found = cache.get(f"k{key}")
        assert found in good and found[0] == key, (turn, key)
"""


@pytest.fixture
def cache(tmp_path: Path) -> CodeCache:
    return CodeCache(tmp_path / "code")


def names(cache: CodeCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


def test_what_was_put_is_there_for_the_next_process_too(cache: CodeCache) -> None:
    assert cache.get("a") is None
    cache.put("a", OBJECT)
    cache.put("empty", b"")
    for seen in (cache, CodeCache(cache.folder)):
        assert (seen.get("a"), seen.get("empty"), seen.get("b")) == (OBJECT, b"", None)
    cache.put("a", b"another")
    assert cache.get("a") == b"another" and names(cache) == {"a", "empty"}


def test_the_folder_is_private_and_files_too(cache: CodeCache) -> None:
    cache.put("a", OBJECT)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert (cache.folder / "a").stat().st_mode & 0o777 == 0o600


def test_an_entry_is_magic_and_checksum_and_payload(cache: CodeCache) -> None:
    cache.put("a", OBJECT)
    content = (cache.folder / "a").read_bytes()
    assert content == MAGIC + hashlib.sha256(OBJECT).digest() + OBJECT and len(content) == HEADER_BYTES + len(OBJECT)


@settings(max_examples=60)
@given(at=st.integers(0, HEADER_BYTES + len(OBJECT) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_makes_an_entry_absent(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    cache = CodeCache(tmp_path_factory.mktemp("flip"))
    cache.put("a", OBJECT)
    content = bytearray((cache.folder / "a").read_bytes())
    content[at] ^= 1 << bit
    (cache.folder / "a").write_bytes(content)
    assert cache.get("a") is None
    cache.put("a", OBJECT)
    assert cache.get("a") == OBJECT


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:10], id="cut in the magic"),
        pytest.param(lambda content: content[: len(MAGIC) + 5], id="cut in the checksum"),
        pytest.param(lambda content: content[:-1], id="truncated"),
        pytest.param(lambda content: content + b"\0", id="longer"),
        pytest.param(lambda content: content[HEADER_BYTES:], id="foreign"),
        pytest.param(lambda content: MAGIC + bytes(32) + content[HEADER_BYTES:], id="wrong checksum"),
    ],
)
def test_a_damaged_entry_is_absent_and_replaced(cache: CodeCache, damage: Callable[[bytes], bytes]) -> None:
    cache.put("a", OBJECT)
    path = cache.folder / "a"
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("a") is None
    cache.put("a", OBJECT)
    assert cache.get("a") == OBJECT


def test_a_link_is_not_followed_but_replaced(cache: CodeCache, tmp_path: Path) -> None:
    cache.put("a", OBJECT)
    elsewhere = tmp_path / "elsewhere"
    os.rename(cache.folder / "a", elsewhere)
    (cache.folder / "a").symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert cache.get("a") is None
    cache.put("a", b"new")
    assert cache.get("a") == b"new" and not (cache.folder / "a").is_symlink() and elsewhere.read_bytes() == before


def test_a_pipe_or_a_folder_in_place_of_an_entry_is_absent(cache: CodeCache) -> None:
    os.mkfifo(cache.folder / "pipe")
    (cache.folder / "folder").mkdir()
    assert cache.get("pipe") is None and cache.get("folder") is None
    cache.put("pipe", OBJECT)
    cache.put("folder", OBJECT)
    assert cache.get("pipe") == OBJECT and cache.get("folder") is None
    assert names(cache) == {"pipe", "folder"}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o720, 0o702])
def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, mode: int) -> None:
    trusted = CodeCache(tmp_path / "code")
    trusted.put("a", OBJECT)
    trusted.folder.chmod(mode)
    with pytest.warns(RuntimeWarning, match="wanted a folder of this user's that nobody else can write"):
        cache = CodeCache(trusted.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("b", OBJECT)
        assert cache.get("a") is None and cache.get("b") is None
    assert names(cache) == {"a"}


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CodeCache(tmp_path / "code").put("a", OBJECT)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(RuntimeWarning, match=f"owner {me}"):
        assert CodeCache(tmp_path / "code").get("a") is None


def test_a_folder_that_is_a_link_is_not_used(cache: CodeCache, tmp_path: Path) -> None:
    cache.put("a", OBJECT)
    (tmp_path / "link").symlink_to(cache.folder)
    with pytest.warns(RuntimeWarning, match="code cache"):
        assert CodeCache(tmp_path / "link").get("a") is None


def test_a_folder_that_cannot_be_made_is_an_empty_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = CodeCache(tmp_path / "file" / "code")
    cache.put("a", OBJECT)
    assert cache.get("a") is None


@pytest.mark.parametrize(
    ("function", "code"),
    [("write", errno.ENOSPC), ("open", errno.ENOSPC), ("open", errno.EROFS), ("open", errno.EACCES), ("replace", errno.ENOSPC)],
)
def test_what_cannot_be_written_is_dropped_and_leaves_nothing(
    cache: CodeCache, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    cache.put("a", OBJECT)

    def fails(*args: object, **kwargs: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fails)
        cache.put("a", b"another")
        cache.put("b", OBJECT)
    assert names(cache) == {"a"} and cache.get("a") == OBJECT and cache.get("b") is None


def test_a_disk_that_fills_up_halfway_leaves_nothing(cache: CodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = os.write, []

    def some(descriptor: int, data: bytes) -> int:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "full")
        written.append(write(descriptor, data[:1000]))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", some)
        cache.put("a", OBJECT)
    assert written == [1000] * 3 and names(cache) == set()


def test_short_writes_are_continued(cache: CodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:777]))
        cache.put("a", OBJECT)
    assert cache.get("a") == OBJECT


def test_a_folder_without_permissions_fails_no_run(cache: CodeCache) -> None:
    cache.put("a", OBJECT)
    cache.folder.chmod(0o500)  # which does not stop root
    try:
        cache.put("b", OBJECT)
        assert cache.get("a") == OBJECT
        assert names(cache) == ({"a", "b"} if os.geteuid() == 0 else {"a"})
    finally:
        cache.folder.chmod(0o700)


def test_the_oldest_go_when_the_limit_is_exceeded(tmp_path: Path) -> None:
    entry_bytes = HEADER_BYTES + 1000
    cache = CodeCache(tmp_path, limit_bytes=8 * entry_bytes)
    for i in range(8):
        cache.put(f"k{i}", bytes([i]) * 1000)
        os.utime(tmp_path / f"k{i}", (0, 1000.0 * ((i + 3) % 8)))  # oldest first: k5, k6, k7, k0, ...
    assert len(names(cache)) == 8
    cache.put("new", b"n" * 1000)
    assert names(cache) == {"k7", "k0", "k1", "k2", "k3", "k4", "new"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache.limit_bytes
    cache.put("newer", b"n" * 1000)
    assert len(names(cache)) == 8 and cache.get("k7") is not None


def test_what_is_used_is_not_the_oldest(tmp_path: Path) -> None:
    entry_bytes = HEADER_BYTES + 1000
    first = CodeCache(tmp_path, limit_bytes=4 * entry_bytes)
    for i in range(4):
        first.put(f"k{i}", bytes([i]) * 1000)
        os.utime(tmp_path / f"k{i}", (0, 1000.0 + i))
    second = CodeCache(tmp_path, limit_bytes=4 * entry_bytes)  # counts what another process put
    assert second.get("k0") == bytes(1000)
    second.put("new", b"n" * 1000)
    assert names(second) == {"k0", "k3", "new"}


def test_a_use_is_noted_once_a_day(cache: CodeCache) -> None:
    cache.put("a", OBJECT)
    path = cache.folder / "a"
    lately, before = time.time() - DAY_S / 2, time.time() - DAY_S * 2
    os.utime(path, (lately, lately))
    cache.get("a")
    assert path.stat().st_mtime == pytest.approx(lately, abs=1e-3)
    os.utime(path, (before, before))
    cache.get("a")
    assert path.stat().st_mtime > lately


def test_an_object_over_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, limit_bytes=2000)
    cache.put("small", b"s" * 500)
    cache.put("large", b"l" * 2000)
    assert names(cache) == {"small"}


def test_two_processes_fill_one_folder_at_once(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(who)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for who in range(2)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    ends = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ends
    assert {path.name for path in tmp_path.iterdir()} == {f"k{key}" for key in range(6)}


def test_the_default_folder_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "tensorgraph" / "code"
    for unset in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_folder() == tmp_path / "home" / ".cache" / "tensorgraph" / "code"
    monkeypatch.delenv("XDG_CACHE_HOME")
    folder = default_folder()
    assert folder == tmp_path / "home" / ".cache" / "tensorgraph" / "code"
    assert folder.stat().st_mode & 0o777 == 0o700
    CodeCache(folder).put("a", OBJECT)
    assert CodeCache(folder).get("a") == OBJECT


def test_no_home_no_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert default_folder() is None
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert default_folder() is None
