"""Every weight type that has a form of its own in layout r16; importing this declares them."""

from tensorgraph.ops.formats import affine_cpu, floats_cpu, recoded_cpu

__all__ = ["affine_cpu", "floats_cpu", "recoded_cpu"]
