"""The machines that code can be made for, as data: the one this process runs on, and four that are always the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm

from tensorgraph.errors import UnknownNameError


@dataclass(frozen=True)
class Target:
    """A machine as the code generator knows it, and what kernels may rely on there."""

    name: str
    triple: str
    cpu: str  # LLVM's name
    features: str  # LLVM's feature string; every "+feature" in it is one that the code needs
    vector_bytes: int  # the widest register: 64, 32 or 16
    has: frozenset[str]  # some of the keys of PROMISES

    @property
    def key(self) -> str:
        """A text that differs between any two targets whose code could differ."""
        code = "|".join((self.triple, self.cpu, self.features, str(self.vector_bytes), *sorted(self.has)))
        return f"{self.name}:{hashlib.sha256(code.encode()).hexdigest()}"

    @property
    def family(self) -> str:
        """The instruction set: x86_64 or aarch64, or LLVM's name of another."""
        first = self.triple.partition("-")[0]
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(first, first)


# What kernels ask for by name -> the features of LLVM that this takes. "vnni" is vpdpbusd on 512-bit registers.
AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
PROMISES: dict[str, tuple[str, ...]] = {
    "avx512": AVX512,
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "vnni": (*AVX512, "avx512vnni"),
    "avxvnni": ("avxvnni",),
    "avx512bf16": (*AVX512, "avx512bf16"),
    "neon": ("neon",),
    "dotprod": ("dotprod",),
}

# A processor's name alone lets the code generator use these too, so they are spelled out where `can_run` sees them.
_HASWELL = "+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt"
_SKYLAKE = ",".join((_HASWELL, *(f"+{feature}" for feature in AVX512)))
_LINUX = "x86_64-unknown-linux-gnu"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("avx512", _LINUX, "skylake-avx512", _SKYLAKE, 64, frozenset({"avx512", "avx2", "fma", "f16c"})),
        Target("avx2", _LINUX, "haswell", _HASWELL, 32, frozenset({"avx2", "fma", "f16c"})),
        Target("baseline", _LINUX, "x86-64", "", 16, frozenset()),
        Target("aarch64", "aarch64-unknown-linux-gnu", "generic", "+neon", 16, frozenset({"neon"})),
    )
}


@cache
def host() -> Target:
    """The machine this process runs on."""
    features = llvm.get_host_cpu_features()
    has = frozenset(name for name, needed in PROMISES.items() if all(features.get(feature) for feature in needed))
    vector_bytes = 64 if "avx512" in has else 32 if "avx2" in has else 16
    return Target("host", llvm.get_process_triple(), llvm.get_host_cpu_name(), features.flatten(), vector_bytes, has)


def find_target(name: str) -> Target:
    """The target of that name: `host` or one of `TARGETS`.

    Raises: UnknownNameError, which lists the names that exist.
    """
    if name == "host":
        return host()
    if name not in TARGETS:
        raise UnknownNameError(f"[target] wanted one of host, {', '.join(TARGETS)}; got {name!r}")
    return TARGETS[name]


def can_run(target: Target) -> bool:
    """Whether this process can run code made for the target: of its family, and every feature it needs is there."""
    here = host()
    needed = {feature for feature in target.features.split(",") if feature.startswith("+")}
    return target.family == here.family and target.has <= here.has and needed <= set(here.features.split(","))
