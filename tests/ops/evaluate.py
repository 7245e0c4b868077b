"""Building and running the graph of one op, by slots: as conformance does it."""

from __future__ import annotations

from tensorgraph.tools.conformance.evaluate import evaluate, node_of, runner

__all__ = ["evaluate", "node_of", "runner"]
