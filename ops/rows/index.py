"""Row numbers as the ops of this family read them: -1 stands for no row, as `top_k` gives where it has none left."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorgraph.errors import InputError

Array = np.ndarray[Any, Any]


def none_of(op: str, ids: Array, n: int) -> Array | None:
    """Where `ids` name no row; None where all of them name one.

    Raises:
        InputError: an index is below -1 or not below n.
    """
    if ids.size == 0:
        return None
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= n:
        raise InputError(f"[{op}] ids must be below {n}, or -1 for none; got {low if low < -1 else high}")
    return ids < 0 if low < 0 else None
