"""Which backends can run on this machine."""

from __future__ import annotations

from tensorgraph import registry
from tensorgraph.device import Device, get_devices
from tensorgraph.errors import TensorGraphError

REFERENCE = "reference"


def start(backend: str) -> Device:
    """A backend's device, with whatever it runs on.

    Raises: UnsupportedError: it wants a GPU, say, or a compiler, which is not there.
    """
    (device,) = get_devices(backend)
    getattr(device, "runtime", None)  # devices that can plan without their machine look for it when it is first asked for
    return device


def others() -> list[str]:
    """All but the reference that are here; the reference alone where there is none."""
    found = []
    for name in registry.backends:
        try:
            if name != REFERENCE:
                start(name)
                found.append(name)
        except TensorGraphError:
            continue
    return found or [REFERENCE]
