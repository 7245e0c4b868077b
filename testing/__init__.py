"""Whole-graph checks: one graph on two backends, or with and without a pass, and the first node that differs."""

if __name__ == "testing":
    raise ImportError("import tensorgraph.testing, not testing: this folder is a part of the package tensorgraph")

from tensorgraph.testing.compare import Terms, compare, compare_model, rerun
from tensorgraph.testing.difference import Difference, Limits, Statistics
from tensorgraph.testing.report import Fault, Report
from tensorgraph.testing.reproduction import Reproduction, load_reproduction

__all__ = [
    "Difference",
    "Fault",
    "Limits",
    "Report",
    "Reproduction",
    "Statistics",
    "Terms",
    "compare",
    "compare_model",
    "load_reproduction",
    "rerun",
]
