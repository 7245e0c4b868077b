"""Products: with a matrix, with a matrix chosen per row, and with the Hadamard matrix."""

from __future__ import annotations

from tensorgraph.ops.products.fwht import fwht
from tensorgraph.ops.products.mul_mat import mul_mat
from tensorgraph.ops.products.mul_mat_id import mul_mat_id

__all__ = ["fwht", "mul_mat", "mul_mat_id"]
