"""Attributes of a number for each axis."""

from __future__ import annotations

from operator import index
from typing import Any

from tensorgraph.graph import Node


def of_every_axis(x: Node, given: Any) -> Any:
    """Numbers for the last axes with zeros for those before; what is no sequence, and what in it is no integer, as it is."""
    try:
        listed = list(given)
    except TypeError:
        return given
    numbers = [index(n) if hasattr(n, "__index__") and not isinstance(n, bool) else n for n in listed]
    return (*(0,) * ((x.ndim if isinstance(x, Node) else 0) - len(numbers)), *numbers)
