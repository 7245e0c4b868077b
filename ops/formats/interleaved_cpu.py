"""Every weight type that has a form of its own in layout r16; importing this declares them."""

from tensorgraph.ops.formats import coded_cpu, floats_cpu

__all__ = ["coded_cpu", "floats_cpu"]
