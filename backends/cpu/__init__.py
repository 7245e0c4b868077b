"""The CPU backend: native code from llvmlite, one native call a step."""

from tensorgraph import registry
from tensorgraph.backends.cpu.device import CpuDevice

registry.backends.add("cpu", CpuDevice)
