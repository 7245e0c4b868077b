"""Object code kept on disk between processes: one checked file per key in a folder that only its owner can write.

Nothing here may fail a run: an entry that cannot be read, or is not what was written, is absent; one that cannot be written
is dropped. Processes share a folder without locks, since an entry appears by being renamed into place whole.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

MAGIC = b"tensorgraph code 1\n"
HEADER_BYTES = len(MAGIC) + hashlib.sha256().digest_size
DAY_S = 86400.0
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither follow a link nor wait for a pipe


def default_folder(name: str = "code") -> Path | None:
    """The user's own cache folder of a name, made where it is missing; None without a home or where it cannot be made."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "tensorgraph" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder


class CodeCache:
    """Objects by key in one folder, the least recently used removed when they exceed a limit in bytes.

    A folder that is not the user's own, or that others may write, is not used: whoever writes there would choose what this
    process runs. A warning says so, once.
    """

    def __init__(self, folder: Path, limit_bytes: int = 512 << 20) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._held_bytes: int | None = None  # counted at the first put
        self._usable = is_private(folder, "code cache")

    def get(self, key: str) -> bytes | None:
        """What was put under the key, a file's name; None where that is absent, damaged or anything but a file of ours."""
        if not self._usable:
            return None
        try:
            descriptor = os.open(self.folder / key, _READ)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            usable = stat.S_ISREG(status.st_mode) and status.st_size <= self.limit_bytes
            content = os.read(descriptor, status.st_size) if usable else b""
            payload = content[HEADER_BYTES:]
            if content[:HEADER_BYTES] != MAGIC + hashlib.sha256(payload).digest():
                return None
            if time.time() - status.st_mtime > DAY_S and os.utime in os.supports_fd:
                with suppress(OSError):
                    os.utime(descriptor)
            return payload
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def put(self, key: str, object: bytes) -> None:
        """Keep an object under a key, in place of what is there; dropped silently where it cannot be written."""
        content = MAGIC + hashlib.sha256(object).digest() + object
        if not self._usable or len(content) > self.limit_bytes:
            return
        with suppress(OSError):
            self._write(key, content)
            self._held_bytes = self._scan_bytes() if self._held_bytes is None else self._held_bytes + len(content)
            if self._held_bytes > self.limit_bytes:
                self._held_bytes = self._remove_oldest(keep=key)

    def _write(self, key: str, content: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".")
        try:
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
            os.replace(temporary, self.folder / key)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _entries(self) -> list[tuple[float, int, str]]:
        """Each file as (time of last use, bytes, name)."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, status.st_size, entry.name))
        return found

    def _scan_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes, _ in self._entries())

    def _remove_oldest(self, keep: str) -> int:
        """Remove files down to seven eighths of the limit, so that the next put need not look again; the bytes that are left."""
        entries = sorted(self._entries())
        held_bytes = sum(size_bytes for _, size_bytes, _ in entries)
        for _, size_bytes, name in entries:
            if held_bytes <= self.limit_bytes * 7 // 8:
                break
            if name != keep:
                with suppress(OSError):
                    os.unlink(self.folder / name)
                    held_bytes -= size_bytes
        return held_bytes


def is_private(folder: Path, what: str) -> bool:
    """Whether a folder, made where it is missing, is one that only this user can write; a warning says so where it is not."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return False
    ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    if stat.S_ISDIR(status.st_mode) and ours and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    got = f"{folder} (mode {stat.filemode(status.st_mode)}, owner {status.st_uid})"
    wanted = "a folder of this user's that nobody else can write"
    warnings.warn(f"[{what}] wanted {wanted}; got {got}; it is not used", RuntimeWarning, stacklevel=3)
    return False
