"""Extents and guards as Python functions of the values of Dims: all of a program at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tensorgraph.dims import Dim, Extent, FloorDiv, Guard, Poly
from tensorgraph.errors import GraphError


def compiled(extents: Sequence[Extent]) -> Callable[[Mapping[str, int]], tuple[int, ...]]:
    """A function from the values of Dims to those of extents; from arrays of values, to arrays."""
    listed = "".join(f"{_source(e)}, " for e in extents)
    made: Callable[[Mapping[str, int]], tuple[int, ...]] = eval(f"lambda d: ({listed})")  # from extents, no text of a user's
    return made


def compiled_guards(guards: Sequence[Guard]) -> Callable[[Mapping[str, int]], tuple[bool, ...]]:
    """A function from the values of Dims to whether guards hold; from arrays of values, to arrays."""
    texts = []
    for guard in guards:
        bounds = [f"({low} <= {_source(e)})" for e, low, _ in guard.bounds if low is not None]
        bounds += [f"({_source(e)} <= {high})" for e, _, high in guard.bounds if high is not None]
        texts.append(f"({' & '.join(bounds) or 'True'}), ")
    made: Callable[[Mapping[str, int]], tuple[bool, ...]] = eval(f"lambda d: ({''.join(texts)})")
    return made


def _source(extent: Extent) -> str:
    if isinstance(extent, int):
        return str(extent)
    if isinstance(extent, Dim):
        return f"d[{extent.name!r}]"
    if isinstance(extent, FloorDiv):
        return f"(({_source(extent.dividend)}) // {extent.divisor})"
    if isinstance(extent, Poly):
        return " + ".join("*".join([str(c), *(f"({_source(s)})" for s in symbols)]) for symbols, c in extent.terms)
    raise GraphError(f"[cpu] {extent!r} has no value")
