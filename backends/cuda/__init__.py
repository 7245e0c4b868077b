"""The CUDA backend: kernels written in CUDA C, one captured graph a step; `cuda-host` runs the same kernels without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorgraph import registry
from tensorgraph.device import Device
from tensorgraph.errors import UnsupportedError

if TYPE_CHECKING:
    from tensorgraph.backends.cuda.runtime import Runtime


def _on_the_host(name: str) -> Device:
    from tensorgraph.backends.cuda.host import HostDevice

    return HostDevice(name)


def _on_a_gpu(name: str) -> Device:
    from tensorgraph.backends.cuda.device import CudaDevice

    which = name.partition(":")[2] or "0"
    if not which.isdecimal():
        raise UnsupportedError(f"[cuda] wanted the number of a GPU after the colon; got {name!r}")

    def started() -> Runtime:
        from tensorgraph.backends.cuda.gpu import CupyRuntime

        return CupyRuntime(int(which))

    return CudaDevice(name, started)


registry.backends.add("cuda", _on_a_gpu)
registry.backends.add("cuda-host", _on_the_host)
