"""The machine and the software that figures are of."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NOTABLE = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""Features that kernels for products of quantised matrices use, as Linux spells them."""
PACKAGES = ("numpy", "llvmlite")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@cache
def processor() -> tuple[str, tuple[str, ...]]:
    """Its name, and which of `NOTABLE` it has (none where the system does not say)."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.processor() or platform.machine(), tuple(f for f in NOTABLE if f in flags)


@cache
def l3_bytes() -> int:
    """The largest cache that a core sees; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes)


def describe() -> dict[str, Any]:
    """Machine, versions and the time, as JSON takes them; `load` is how many processes ran or waited in the last minute."""
    name, features = processor()
    machine: dict[str, Any] = {"processor": name, "cores": cores(), "features": list(features), "cache_bytes": l3_bytes()}
    machine |= {"system": platform.platform(), "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    return {"date": datetime.now(UTC).isoformat(timespec="minutes"), "machine": machine, "versions": versions()}


def versions() -> dict[str, str]:
    """Of tensorgraph, Python, and the packages that compute."""
    from tensorgraph import __version__

    found = {"tensorgraph": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
