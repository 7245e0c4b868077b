"""Every kernel compiled by NVRTC for three architectures: what it takes of a processor, and that nothing is put on a stack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from tensorgraph.backends.cuda import nvrtc
from tensorgraph.backends.cuda.launches import Written, prelude
from tensorgraph.errors import KernelError, UnsupportedError
from tests import tables
from tests.backends.cuda import catalogue, full_width
from tests.backends.cuda.bare import BareRuntime
from tests.models import tiny

ARCHS = ("sm_80", "sm_90", "sm_120")
GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ENTRY = 'extern "C" __global__'
PARTS = 4
"""Of what would take minutes: the deep tests of a day are to take about as long as those of another."""
MOST_SHARED = 99 << 10
"""Bytes of shared memory of a block, static and dynamic, that every GPU since Ampere can give."""
VERSION = "13.0"
"""Of the compiler that the golden tables are of."""


@pytest.fixture(scope="module", autouse=True)
def there() -> None:
    try:
        nvrtc.library()
    except UnsupportedError as error:
        pytest.skip(str(error))


catalogued = cache(catalogue.of_all_kinds)


def usages(kernels: Mapping[str, Written], arch: str) -> dict[str, nvrtc.Usage]:
    """What each takes; those of one file are compiled together, so that it is read once."""
    together: dict[str, dict[str, Written]] = defaultdict(dict)
    for label, kernel in kernels.items():
        together[kernel.source.partition(ENTRY)[0]][label] = kernel
    found = {}
    for head, group in together.items():
        source = "".join([prelude(), head, *(kernel.source[len(head) :] for kernel in group.values())])
        used = nvrtc.compile_source(source, arch).usage
        found |= {label: used[kernel.name] for label, kernel in group.items()}
    dynamic = {label: BareRuntime.dynamic_bytes.get(kernel.name, 0) for label, kernel in kernels.items()}
    assert [label for label, used in found.items() if used.shared_bytes + dynamic[label] > MOST_SHARED] == []
    assert any(dynamic.values())  # these are known
    return found


def note(request: pytest.FixtureRequest, of: str, found: dict[str, nvrtc.Usage]) -> None:
    """A row of the table of compiled kernels."""
    spilled = sum(used.spill_bytes > 0 for used in found.values())
    on_stack = sum(used.stack_bytes > 0 for used in found.values())
    registers, shared = (max(getattr(used, name) for used in found.values()) for name in ("registers", "shared_bytes"))
    most = {"most_registers": registers, "most_shared_bytes": shared}
    tables.note(request, tables.COMPILED, of, kernels=len(found), that_spill=spilled, with_a_stack=on_stack, **most)


def assert_in_registers(found: dict[str, nvrtc.Usage]) -> None:
    spilled = [label for label, used in found.items() if used.stack_bytes or used.spill_bytes]
    assert spilled == []


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_of_models(arch: str, request: pytest.FixtureRequest) -> None:
    """Those of models' steps, with the registers and the shared memory that each takes."""
    found = usages(catalogued(), arch)
    note(request, f"models' steps, {arch}", found)
    assert_in_registers(found)
    lines = [f"{used.registers:4} {used.shared_bytes:6}  {label}" for label, used in sorted(found.items())]
    head = f"registers, bytes of shared memory, kernel ({arch}, {len(lines)} kernels, no stack, no spills)"
    text = "\n".join([head, *lines, ""])
    path = GOLDEN / f"cuda-{arch}.txt"
    if request.config.option.update_golden:
        path.write_text(text)
    if nvrtc.version() == VERSION:
        assert text == path.read_text()


@cache
def all_kernels() -> list[tuple[str, Written]]:
    """Those that differ in numbers alone too, and of steps of a few tokens at full width."""
    kernels = catalogue.of_models(tiny.ARCHITECTURES) | full_width.kernels((4,))
    return sorted(catalogue.by_label(kernels.values()).items())


@pytest.mark.deep
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_of_all_models(arch: str, part: int, request: pytest.FixtureRequest) -> None:
    found = usages(dict(all_kernels()[part::PARTS]), arch)
    note(request, f"all models' steps, {arch}", found)
    assert_in_registers(found)


@pytest.mark.parametrize("arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.deep) for arch in ("sm_80", "sm_120"))])
def test_kernels_of_ops(arch: str, request: pytest.FixtureRequest) -> None:
    """Those of a few cases of each op."""
    kernels = catalogue.by_label(catalogue.of_ops(2 if arch == "sm_90" else 3).values())
    assert len(kernels) > 100
    found = usages(kernels, arch)
    note(request, f"ops, {arch}", found)
    assert_in_registers(found)


def test_usage_is_read_from_what_the_compiler_says() -> None:
    body = "int i = x[0]; float a[64] = {}; for (int j = 0; j < 64; ++j) a[x[j] & 63] += y[j * i]; y[0] = a[i & 63];"
    source = f'extern "C" __global__ void k(int* x, float* y) {{ __shared__ float s[32]; s[x[1]] = 1; {body} y[1] = s[i]; }}'
    used = nvrtc.compile_source(source, "sm_90").usage["k"]
    assert used.stack_bytes == 256 and used.shared_bytes == 128 and used.registers > 8


def test_what_does_not_compile_is_said() -> None:
    with pytest.raises(KernelError, match=r'for sm_90; the backend cpu needs none; .*:\n.*identifier "y" is undefined'):
        nvrtc.compile_source('extern "C" __global__ void k(int* x) { x[0] = y; }', "sm_90")


def test_without_the_compiler_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find_spec", lambda name: None)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda *_: (_ for _ in ()).throw(OSError()))
    nvrtc.library.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"wanted NVRTC.*pip install 'nvidia-cuda-nvrtc==13\.0\.\*'"):
            nvrtc.library()
    finally:
        nvrtc.library.cache_clear()
