"""The NumPy reference backend: the definition that every other backend is compared with."""

from tensorgraph import registry
from tensorgraph.backends.reference.device import ReferenceDevice

registry.backends.add("reference", ReferenceDevice)
